import dataclasses
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from accelerate import Accelerator
from accelerate.commands import launch as accelerate_launch
from accelerate.commands.config import config_args
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import set_seed
from conftest import ROOT
from images import encode, noise, parquet_of

import data
import launch
import loading
import models
from config import DataConfig, ModelConfig
from engine import validate
from errors import UserError
from processes import cores_per_process

TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
ACCELERATE = (sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch")
TWO_PROCESSES = {
    "ACCELERATE_USE_CPU": "true",
    "GLOO_SOCKET_IFNAME": "lo",
    "PYTHONPATH": str(ROOT),
    "OMP_NUM_THREADS": "1",
}


def test_two_processes_measure_and_train_as_one(command, parquet, tmp_path):
    images = [encode(image) for image in noise(30)]
    images[7] = images[11] = {"bytes": b"", "path": None}
    corrupted = parquet_of(tmp_path, images)
    result = command("tests/distributed.py", str(parquet), str(corrupted), launcher=TORCHRUN, env=TWO_PROCESSES)
    assert result.returncode == 0, result.stderr[-3000:]
    measured = json.loads(result.stdout.splitlines()[-1])

    config = DataConfig(source=str(parquet), workers=0)
    source = data.load(config)
    assert len(source.validation) % 14, "the rows must not divide into batches, or this proves nothing"
    accelerator = Accelerator(cpu=True)
    for kind in ("mapped", "streamed"):
        set_seed(0)
        model, _ = models.create(ModelConfig(name="test_resnet"), source.class_names, source.size)
        rows = loading.loader(source, "validation", config, 7)
        alone = validate(accelerator, model, rows, lambda images: images.float() / 255, 7)
        assert measured[f"validate_{kind}"] == pytest.approx(alone, rel=1e-5), kind
    assert measured["head"] == measured["layer3"] == len(source.train) // 32 * 32


def test_train_py_runs_on_two_processes(command, parquet, tmp_path):
    result = command(
        "train.py", "--config", "recipes/demo_finetune.yaml", "--data.source", str(parquet),
        "--output_dir", str(tmp_path),
        "--run_name", "run", "--data.workers", "0", "--data.streaming", "true",
        "--phases.head.epochs", "1", "--phases.finetune.epochs", "1",
        launcher=TORCHRUN, env=TWO_PROCESSES,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.count("phase finetune") == 1, "one process speaks"
    history = (tmp_path / "run" / "history.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in history] == [1, 2]
    rows = len(data.load(DataConfig(source=str(parquet), streaming=False)).train)
    assert json.loads(history[0])["step"] == rows // 64, "each process takes its share of a batch, not the whole of it"
    environment = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["environment"]
    assert environment["processes"] == 2


def test_two_jobs_that_believe_to_be_alone_are_refused(make_config, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(
        UserError, match=r"2 processes were launched, but each believes that it is alone.*--num_processes 2 train.py"
    ):
        launch.make_accelerator(make_config())


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        ("ACCELERATE_USE_FSDP", "true", "FSDP"),
        ("ACCELERATE_USE_DEEPSPEED", "true", "DEEPSPEED"),
        ("ACCELERATE_MIXED_PRECISION", "fp8", "fp8"),
    ],
)
def test_what_the_loop_does_not_know_is_refused(make_config, monkeypatch, variable, value, said):
    """As a configuration that was made for another program makes accelerate launch ask for it."""
    monkeypatch.setenv(variable, value)
    with pytest.raises(UserError, match=rf"{said}: this loop .* --config_file accelerate_config.yaml"):
        launch.make_accelerator(make_config())


def test_fp16_on_a_cpu_is_refused(make_config, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    with pytest.raises(UserError, match="use --mixed_precision bf16"):
        launch.make_accelerator(make_config())


@pytest.mark.parametrize(
    ("given", "processes", "threads"), [("1", 1, "all"), (None, 1, "all"), ("1", 2, "half"), ("3", 1, 7)]
)
def test_threads_are_all_cores_unless_the_user_says_otherwise(make_config, monkeypatch, given, processes, threads):
    """accelerate launch sets OMP_NUM_THREADS to 1 where the user did not."""
    monkeypatch.setattr("processes.os.sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setattr("processes.CPU_MAX", Path("nowhere"))
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    monkeypatch.setenv("OMP_NUM_THREADS", given) if given else monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    before = torch.get_num_threads()
    torch.set_num_threads(7)
    try:
        launch.make_accelerator(make_config())
        assert torch.get_num_threads() == {"all": 8, "half": 4}.get(threads, threads)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("quota", "siblings", "cores"),
    [
        ("200000 100000\n", 1, 2),
        ("50000 100000\n", 1, 1),
        ("400000 100000\n", 2, 2),
        ("max 100000\n", 1, 8),
        (None, 1, 8),
    ],
)
def test_cores_are_no_more_than_a_containers_quota(monkeypatch, tmp_path, quota, siblings, cores):
    monkeypatch.setattr("processes.os.sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setattr("processes.CPU_MAX", tmp_path / "cpu.max")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(siblings))
    if quota:
        (tmp_path / "cpu.max").write_text(quota)
    assert cores_per_process() == cores


@pytest.mark.parametrize(
    ("processes", "micro", "share"), [(1, None, (64, 64)), (1, 16, (64, 16)), (4, None, (16, 16)), (4, 8, (16, 8))]
)
def test_the_batch_is_shared_out(make_config, processes, micro, share):
    config = make_config(data={"batch_size": 64, "micro_batch_size": micro})
    assert launch.share_of_batch(config, SimpleNamespace(num_processes=processes)) == share


@pytest.mark.parametrize(
    ("processes", "batch", "micro", "message"),
    [
        (1, 50, 16, "16 does not divide the 50 images of each .*: 10 or 25"),
        (1, 8, 16, "16 on 1 process.* is more than data.batch_size 8"),
        (4, 50, None, "50 images can't be divided equally among 4 processes; nearest: 48 or 52$"),
        (4, 2, None, "nearest: 4$"),
        (2, 50, 10, "10 does not divide the 25 images of each .*: 5 or 25"),
    ],
)
def test_a_batch_that_can_not_be_shared_names_the_nearest(make_config, processes, batch, micro, message):
    config = make_config(data={"batch_size": batch, "micro_batch_size": micro})
    with pytest.raises(UserError, match=message):
        launch.share_of_batch(config, SimpleNamespace(num_processes=processes))


def test_the_shipped_accelerate_config_is_one_process_anywhere():
    shipped = yaml.safe_load((ROOT / "accelerate_config.yaml").read_text())
    assert (shipped["num_processes"], shipped["distributed_type"], shipped["mixed_precision"]) == (1, "NO", "no")
    assert shipped["use_cpu"] is False


@pytest.mark.parametrize("precision, hinted", [("no", True), ("bf16", False)])
def test_bf16_is_hinted_at_where_the_machine_has_it_and_it_is_not_used(
    make_config, monkeypatch, capsys, precision, hinted
):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True}, raising=False)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", precision)
    launch.hint_at_speed(launch.make_accelerator(make_config()))
    assert ("--mixed_precision bf16" in capsys.readouterr().out) == hinted


@pytest.mark.parametrize(
    "bf16, capability, hinted", [(True, (9, 0), "bf16"), (False, (7, 5), "fp16"), (False, (6, 1), None)]
)
def test_the_faster_precision_of_a_gpu_is_hinted_at(monkeypatch, capsys, bf16, capability, hinted):
    """A T4 has no instructions for bf16; before it, none are much faster."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: bf16)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(launch.shutil, "which", lambda _: None)
    launch.hint_at_speed(SimpleNamespace(device=torch.device("cuda"), mixed_precision="no", print=print))
    said = capsys.readouterr().out
    assert f"--mixed_precision {hinted} ..." in said if hinted else said == ""


def test_a_gpu_that_this_torch_can_not_use_is_hinted_at(make_config, monkeypatch, capsys):
    monkeypatch.setattr(launch.shutil, "which", lambda name: {"nvidia-smi": "/bin/nvidia-smi"}.get(name))
    accelerator = launch.make_accelerator(make_config())
    for build, hinted in ((None, True), ("13.0", False)):
        monkeypatch.setattr(torch.version, "cuda", build)
        launch.hint_at_speed(accelerator)
        assert ("the installed torch is a CPU build" in capsys.readouterr().out) == hinted


@pytest.mark.parametrize(
    ("has", "said"),
    [
        ({"avx2": True, "avx512_bf16": False, "amx_bf16": False}, "warning: this CPU has no instructions for bf16"),
        ({"avx2": True, "avx512_bf16": True, "amx_bf16": False}, ""),
        ({"neon": True}, ""),  # torch can't tell
    ],
)
def test_bf16_without_instructions_for_it_is_warned_of(make_config, monkeypatch, capsys, has, said):
    """It is emulated, and took 20 times as long as fp32."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has, raising=False)
    monkeypatch.setattr(launch.shutil, "which", lambda _: None)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    launch.hint_at_speed(launch.make_accelerator(make_config()))
    out = capsys.readouterr().out
    assert out.startswith(said) and bool(out) == bool(said)


def test_a_configuration_that_was_trained_otherwise_says_so(capsys):
    accelerator = Accelerator(cpu=True)
    launch.hint_at_launch(accelerator, None)
    same = launch.environment(accelerator)
    launch.hint_at_launch(accelerator, same)
    assert capsys.readouterr().out == ""
    launch.hint_at_launch(accelerator, dataclasses.replace(same, mixed_precision="bf16", device_type="cuda"))
    assert capsys.readouterr().out.endswith("was started with accelerate launch --mixed_precision bf16 train.py\n")


def test_nothing_is_hinted_at_where_the_machine_has_no_bf16(make_config, monkeypatch, capsys):
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict, raising=False)
    monkeypatch.setattr(launch.shutil, "which", lambda _: None)
    launch.hint_at_speed(launch.make_accelerator(make_config()))
    assert capsys.readouterr().out == ""


def test_only_copies_to_cudas_gpus_do_not_wait(make_config):
    """test_gpu.py looks at those."""
    accelerator = launch.make_accelerator(make_config())
    assert not accelerator.prepare(torch.utils.data.DataLoader([0]))._non_blocking


def test_weights_are_channels_last_on_a_gpu_alone():
    for device, layout in (("cuda", torch.channels_last), ("cpu", torch.contiguous_format)):
        model = launch.suited(torch.nn.Conv2d(3, 4, 3), torch.device(device))
        assert model.weight.is_contiguous(memory_format=layout), device


def test_a_gpus_peak_memory_is_told(monkeypatch):
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 3 * 2**20)
    assert launch.peak_memory(SimpleNamespace(device=torch.device("cuda"))) == {"peak_memory_mb": 3}
    assert launch.peak_memory(SimpleNamespace(device=torch.device("cpu"))) == {}


@pytest.mark.parametrize("precision, option", [("no", ""), ("bf16", "--mixed_precision bf16 ")])
def test_the_way_on_names_the_precision(make_config, monkeypatch, precision, option):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", precision)
    accelerator = launch.make_accelerator(make_config())
    assert (
        launch.resume_hint(accelerator, "runs/x") == f"go on with: accelerate launch {option}train.py --resume runs/x"
    )
    recorded = dataclasses.replace(launch.environment(accelerator), mixed_precision="fp16")
    with pytest.raises(UserError, match=rf"mixed_precision fp16, not {precision}: .*--mixed_precision fp16"):
        launch.check_same(recorded, accelerator)


def test_the_way_on_names_processes_and_machines(make_config, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    accelerator = SimpleNamespace(num_processes=4, mixed_precision="bf16", device=torch.device("cpu"))
    on_four = "ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 4 "
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert launch.resume_hint(accelerator, "x") == f"go on with: {on_four}--mixed_precision bf16 train.py --resume x"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert f"{on_four}--num_machines 2 --machine_rank RANK --main_process_ip IP" in launch.resume_hint(accelerator, "x")
    alone = launch.make_accelerator(make_config())
    recorded = dataclasses.replace(launch.environment(alone), processes=4)
    with pytest.raises(UserError, match=rf"started with processes 4, not 1: {on_four}train.py --resume"):
        launch.check_same(recorded, alone)


def test_the_way_on_uploads_what_was_to_be_uploaded(make_config):
    alone = launch.make_accelerator(make_config())
    assert launch.resume_hint(alone, "x", "me/model").endswith("train.py --resume x --push_to_hub me/model")


def test_the_way_on_leads_past_a_gpu_that_the_run_did_not_use(make_config, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    alone = launch.make_accelerator(make_config())
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    _, _, options = launch.resume_hint(alone, "x").partition("accelerate launch ")
    assert options == "--cpu --num_processes 1 train.py --resume x"
    launched, *_ = _validate_launch_command(launch_command_parser().parse_args(options.split()))
    assert launched.use_cpu and launched.num_processes == 1


def test_the_way_on_of_one_process_is_one_process_whatever_the_launcher_would_start(tmp_path, monkeypatch):
    run = SimpleNamespace(num_processes=1, mixed_precision="no", device=torch.device("cuda"))
    assert launch.resume_hint(run, "x") == "go on with: accelerate launch train.py --resume x"
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "device_count", lambda: 4)
        _, _, options = launch.resume_hint(run, "x").partition("accelerate launch ")
        launched, *_ = _validate_launch_command(launch_command_parser().parse_args(options.split()))
        assert (launched.num_processes, launched.multi_gpu) == (1, False)
    settings = tmp_path / "default_config.yaml"
    own = yaml.safe_load((ROOT / "accelerate_config.yaml").read_text())
    own |= {"distributed_type": "MULTI_GPU", "num_processes": 4, "mixed_precision": "bf16"}
    settings.write_text(yaml.safe_dump(own))
    for module in (launch, config_args, accelerate_launch):
        monkeypatch.setattr(module, "default_config_file", str(settings))
    for processes, multi in ((1, False), (2, True)):
        run.num_processes = processes
        _, _, options = launch.resume_hint(run, "x").partition("accelerate launch ")
        launched, *_ = _validate_launch_command(launch_command_parser().parse_args(options.split()))
        assert (launched.num_processes, launched.multi_gpu, launched.mixed_precision) == (processes, multi, "no")


def test_more_processes_than_gpus_are_refused(make_config, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    launch._check_launched_as_meant()
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(UserError, match=r"^2 processes were started on a machine with 1 GPU\(s\): --num_processes 1"):
        launch.make_accelerator(make_config())
    monkeypatch.setenv("ACCELERATE_USE_CPU", "yes")
    launch._check_launched_as_meant()


@pytest.mark.parametrize("minutes", [0.2, 10, 30])
def test_processes_wait_as_long_for_one_another_as_is_said(minutes):
    """Accelerate leaves out what is its own default, and gloo then takes another one."""
    assert launch._waiting(minutes).to_kwargs()["timeout"].total_seconds() == pytest.approx(60 * minutes, abs=1e-3)


@pytest.mark.parametrize("option", ["sync_batch_norm", "tf32"])
def test_what_only_gpus_have_is_refused_on_a_cpu(make_config, monkeypatch, option):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    with pytest.raises(UserError, match=rf"^{option}: not available on this device \(cpu\); leave it out"):
        launch.make_accelerator(make_config(**{option: True}))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "env"),
    [
        ((*ACCELERATE, "--cpu", "--num_processes", "2"), {}),
        ((*ACCELERATE, "--config_file", "{multi_cpu}"), {}),
        ((*ACCELERATE, "--multi_gpu", "--num_processes", "2"), {}),
        (TORCHRUN, {}),
        ((*ACCELERATE, "--cpu", "--num_machines", "2", "--num_processes", "2", "--machine_rank", "0",
          "--main_process_ip", "127.0.0.1", "--main_process_port", "29511"), {}),
    ],
    ids=["cpu", "multi_cpu", "multi_gpu", "torchrun", "two machines"],
)  # fmt: skip
def test_launches_that_would_train_something_else_are_refused(command, tmp_path, launcher, env):
    multi_cpu = tmp_path / "multi_cpu.yaml"
    multi_cpu.write_text("distributed_type: MULTI_CPU\nnum_processes: 2\nnum_machines: 1\nmixed_precision: 'no'\n")
    launcher = [part.format(multi_cpu=multi_cpu) for part in launcher]
    result = command("train.py", "--config", "recipes/demo_scratch.yaml", "--output_dir", str(tmp_path / "runs"),
                     launcher=launcher, env={"CUDA_VISIBLE_DEVICES": ""} | env)  # fmt: skip
    assert result.returncode != 0
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes" in errors[0]
    assert not (tmp_path / "runs").exists()


def test_one_process_that_was_meant_to_be_several_says_so(make_config, monkeypatch):
    for name, value in (("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "29500"), ("ACCELERATE_MIXED_PRECISION", "no")):
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="several processes were asked for, but accelerate launch started one"):
        launch.make_accelerator(make_config())
    monkeypatch.delenv("MASTER_ADDR")
    assert launch.make_accelerator(make_config()).num_processes == 1


def test_the_batch_is_described_as_it_is_shared_out(make_config):
    config, accelerator = make_config(data={"batch_size": 64}), SimpleNamespace(num_processes=4)
    accelerator.device = torch.device("cpu")
    assert launch.describe_batch(config, accelerator, 8, 1000) == (
        "64 images a step on 4 processes (cpu), 16 on each, in 2 forward passes of 8; 15 steps an epoch"
    )
    accelerator.num_processes = 1
    assert (
        launch.describe_batch(config, accelerator, 64, 1000) == "64 images a step on 1 process (cpu); 15 steps an epoch"
    )
    assert "a stream tells at its end" in launch.describe_batch(config, accelerator, 64, None)


@pytest.mark.slow
def test_thirty_launches_all_end_with_0(command, parquet, tmp_path):
    """A process that held gloo's connections to its end was aborted in a third of the launches."""
    codes = []
    for number in range(30):
        result = command(
            "train.py", "--config", "recipes/demo_finetune.yaml", "--data.source", str(parquet), "--data.workers", "0",
            "--model.name", "test_resnet", "--phases.head.epochs", "1", "--phases.finetune.epochs", "1",
            "--output_dir", str(tmp_path), "--run_name", str(number), launcher=TORCHRUN, env=TWO_PROCESSES,
        )  # fmt: skip
        codes.append(result.returncode)
    assert codes == [0] * 30
