"""What befalls a run that is set up rightly: a full disk, too little memory, a worker or a process that is gone."""

import errno
import json
import os
import re
import socket
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
import yaml
from accelerate import Accelerator
from conftest import error_of, kill_a_child, phase, wait_until
from numpy._core._exceptions import _ArrayMemoryError
from test_launch import TORCHRUN, TWO_PROCESSES
from torch._utils import ExceptionWrapper

import checkpoint
import faults
import files
import runs
import train
from errors import Interrupted, UserError

linux = pytest.mark.skipif(sys.platform != "linux", reason="uses what only Linux has")


@pytest.mark.parametrize(
    ("raised", "said"),
    [
        (MemoryError(), r"a loader's worker died \(MemoryError\)\. If it was short of memory"),
        (_ArrayMemoryError((9,), np.dtype("u1")), r"died \(.*Unable to allocate 9 bytes for .*fewer --data.workers"),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory"),
            r"died \(RuntimeError: DefaultCPUA.*-data.workers",
        ),
        (RuntimeError("unable to write </torch_1>: No space left on device (28)"), "died .*No space left.*/dev/shm"),
    ],
    ids=["memory", "NumPy's", "torch's", "shared memory"],
)
def test_a_worker_without_memory_is_told(raised, said):
    with pytest.raises(UserError, match=said), faults.explained("go on", Accelerator(cpu=True), 64):
        in_a_worker(raised)


def test_another_error_in_a_worker_stays_what_it_is():
    with (
        pytest.raises(ValueError, match=r"in DataLoader worker process 0(.|\n)*ValueError: odd"),
        faults.explained("go on", Accelerator(cpu=True), 64),
    ):
        in_a_worker(ValueError("odd"))


def in_a_worker(error):
    """Raise what torch makes of an error in a loader's worker."""
    try:
        raise error
    except Exception:
        ExceptionWrapper(where="in DataLoader worker process 0").reraise()


# ---- a full disk ------------------------------------------------------------------------------------------------


@linux
@pytest.mark.parametrize(
    "size",
    [  # in each place something else is being written; a checkpoint has 6 MB, best/ 1.5
        "15m",  # the optimizer
        *(pytest.param(other, marks=pytest.mark.slow) for other in ("9m", "13m", "14m", "16m", "19m")),
    ],
)
def test_a_full_disk_is_told_and_costs_nothing_that_was_written(command, forked_command, tmp_path, size):
    """On a tmpfs of this size, in a mount namespace of the test's own; the folder is looked at in a copy."""
    disk, copy = tmp_path / "disk", tmp_path / "runs"
    disk.mkdir()
    mount = f"mount -t tmpfs -o size={size} tmpfs {disk}"
    if subprocess.run(["unshare", "-rm", "sh", "-c", mount], capture_output=True).returncode:
        pytest.skip("this machine lets nobody mount a tmpfs of his own")
    args = ["train.py", "--config", "recipes/demo_scratch.yaml", "--data.embedded_rows", "400", "--data.workers", "0"]
    args += ["--phases.train.epochs", "4", "--run_name", "run", "--output_dir"]
    result = command(
        f'{mount} && "$@"; code=$?; cp -r {disk} {copy}; exit $code', "sh", sys.executable, *args, str(disk),
        launcher=("unshare", "-rm", "sh", "-c"),
    )  # fmt: skip
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    told = result.stderr.strip().splitlines()[-1]
    assert told.startswith("error: the disk is full: ")
    assert told.endswith(f"make room, and go on with: accelerate launch train.py --resume {disk}/run")

    run = copy / "run"
    assert not (run / "checkpoints" / "unfinished").exists(), "it would be of no use, and takes room"
    checkpoints = checkpoint._folders(run)
    assert checkpoints and not any(map(checkpoint._fault, checkpoints))
    rows = (run / "history.jsonl").read_text().splitlines()
    assert [json.loads(row)["epoch"] for row in rows] == list(range(1, len(rows) + 1))
    assert len(rows) >= int(checkpoints[-1].name.split("-")[0])

    resumed = forked_command("train.py", "--resume", str(run))
    assert resumed.returncode == 0, resumed.stderr
    assert [json.loads(row)["epoch"] for row in (run / "history.jsonl").read_text().splitlines()] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("config.yaml", "config.yaml can't be written: No space left on device"),
        ("history.jsonl", "the disk is full: .*make room, and go on with: accelerate launch train.py --resume .*/run"),
    ],
)
def test_a_disk_that_is_full_when_a_run_is_resumed_is_told(make_config, monkeypatch, name, said):
    real = files.to_disk

    def full(path):
        if path.name == f".{name}.unfinished":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(path)

    accelerator = Accelerator(cpu=True)
    with pytest.raises(Interrupted), runs.opened(accelerator, runs.settled(accelerator, make_config()), None) as run:
        raise Interrupted("stopped before its first step", 15)
    monkeypatch.setattr(files, "to_disk", full)
    before = (run / "config.yaml").read_text()
    with pytest.raises(UserError, match=said):
        train.train(make_config(), resume=run)
    assert (run / "config.yaml").read_text() == before
    assert not list(run.glob(".*unfinished"))


# ---- memory -----------------------------------------------------------------------------------------------------

# The command on a machine with so many MiB left when its libraries have been loaded.
NARROW = """
import ctypes, psutil, resource, runpy, sys
ctypes.CDLL(None).mallopt(-8, 1)  # one arena: each thread's own may reserve 64 MiB of addresses, which count
import train, torch, timm
torch.set_num_threads(1)
left = int(sys.argv.pop(1)) * 2**20
resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + left, resource.RLIM_INFINITY))
runpy.run_path("train.py", run_name="__main__")
"""


def train_narrowly(command, folder, name, left, *more):
    return command(
        "-c", NARROW, str(left), "--config", "recipes/demo_scratch.yaml", "--data.embedded_rows", "600",
        "--data.batch_size", "256", "--data.image_size", "128", "--data.workers", "0", "--phases.train.epochs", "1",
        "--output_dir", str(folder), "--run_name", name, *more,
    )  # fmt: skip


@linux
def test_memory_that_runs_out_is_told_with_the_ways_on(forked_command, tmp_path):
    result = train_narrowly(forked_command, tmp_path, "run", 900)
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    told = result.stderr.strip().splitlines()[-1]
    assert told.startswith("error: out of memory with 256 images per forward pass on each process (cpu)")
    for resume_hint in ("--data.micro_batch_size", "auto", "--mixed_precision bf16"):
        assert resume_hint in told
    assert not (tmp_path / "run").exists(), "nothing was trained, so nothing is left behind"


@pytest.mark.parametrize(
    ("begun", "said", "not_said"),
    [(True, "smaller --data.micro_batch_size.*; go on", "bf16|auto"), (False, "auto.*bf16.*; start again$", "go on")],
)
def test_ways_on_from_memory_that_ran_out_are_such_as_lead_on(tmp_path, begun, said, not_said):
    """A run that has begun can't change its precision, and `auto` is settled; one that has not is gone."""
    if begun:
        (tmp_path / "checkpoints" / "00001-000000009").mkdir(parents=True)
    with pytest.raises(UserError, match=said) as caught, faults.explained("go on", Accelerator(cpu=True), 64, tmp_path):
        raise torch.OutOfMemoryError("CUDA out of memory.")
    assert not re.search(not_said, str(caught.value))


@pytest.mark.parametrize(
    ("of", "said"),
    [
        ({"run": True}, "bf16; --cuda_graphs false, --data.keep_mb 0; start again"),
        ({"run": True, "resumed": True}, r"stays\); --cuda_graphs false, --data.keep_mb 0; go on"),
        ({}, r"the batch size stays\); go on"),
    ],
)
def test_only_a_training_is_advised_to_do_without_what_takes_a_gpus_memory(tmp_path, of, said):
    """predict.py has no CUDA graphs and keeps no images on the GPU."""
    gpu = SimpleNamespace(device=torch.device("cuda"), num_processes=1)
    of = of and of | {"run": tmp_path}
    with pytest.raises(UserError, match=f"{said}$"), faults.explained("go on", gpu, 64, **of):
        raise torch.OutOfMemoryError("CUDA out of memory.")


@pytest.mark.parametrize(
    "said",
    [
        "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "could not create a primitive",
        "NCCL error in: /x.cpp:94, unhandled cuda error\nLast error:\nCuda failure 2 'out of memory'",
        "NCCL error in: /x.cpp:94, unhandled cuda error\nLast error:\nFailed to CUDA calloc 8388608 bytes",
        "DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes.",
    ],
)
def test_memory_that_a_library_lacks_is_told_too(said):
    with (
        pytest.raises(UserError, match=r"^out of memory with 64"),
        faults.explained("go on", Accelerator(cpu=True), 64),
    ):
        raise RuntimeError(said)


def test_batch_norm_of_one_value_is_told(tmp_path):
    said = "--data.micro_batch_size 2 or more, or larger images; start again"
    with pytest.raises(UserError, match=said), faults.explained("go on", Accelerator(cpu=True), 1, tmp_path):
        torch.nn.BatchNorm2d(3)(torch.zeros(1, 3, 1, 1))


@linux
@pytest.mark.slow
def test_the_micro_batch_is_halved_until_it_fits_and_recorded(command, tmp_path):
    result = train_narrowly(command, tmp_path, "run", 900, "--data.micro_batch_size", "auto")
    assert result.returncode == 0, result.stderr
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    settled = config["data"]
    assert (config["environment"]["processes"], settled["streaming"]) == (1, False)
    assert settled["batch_size"] == 256, "the global batch is kept"
    assert settled["micro_batch_size"] in (8, 16, 32, 64, 128)
    assert json.loads((tmp_path / "run" / "history.jsonl").read_text())["step"] == 1, "of 256 images"


class Small(torch.nn.Module):
    """Has memory for so many images."""

    def __init__(self, images: int, told: str = "CUDA out of memory. Tried to allocate 2.00 GiB."):
        super().__init__()
        self.images, self.told, self.seen = images, told, []
        self.head = torch.nn.Sequential(torch.nn.Dropout(), torch.nn.Linear(3, 2))

    def forward(self, images):
        self.seen.append(len(images))
        if len(images) > self.images:
            raise RuntimeError(self.told)
        return self.head(images.mean((2, 3)))


def fitting(make_config, model, share, **sections):
    config = make_config({"only": phase()}, **sections)
    accelerator = train.launch.make_accelerator(config)
    to_float = torch.nn.Module()
    to_float.forward = lambda images: images / 255
    return faults.fitting_micro_batch(accelerator, config, model, to_float, (8, 8), share)


@pytest.mark.parametrize(("share", "fits"), [(64, 16), (48, 12), (36, 9), (30, 15), (16, 16), (17, 1)])
def test_sizes_that_divide_the_share_are_tried_downwards(make_config, share, fits):
    assert fitting(make_config, Small(18), share) == fits


@pytest.mark.parametrize(("images", "fits"), [(17, 8), (18, 16), (4, 2), (5, 4), (2, 1), (1, 1)])
def test_about_an_eighth_more_must_fit(make_config, images, fits):
    assert fitting(make_config, Small(images), 64) == fits


def test_onednn_has_its_own_words_for_memory_that_is_short(make_config):
    assert fitting(make_config, Small(18, "could not create a primitive"), 64) == 16
    with pytest.raises(RuntimeError, match="of another kind"):
        fitting(make_config, Small(16, "of another kind"), 64)


def test_trying_leaves_the_model_and_the_random_state_as_they_were(make_config):
    model = Small(16)
    weight = model.head[1].weight
    before, state = weight.detach().clone(), torch.get_rng_state()
    fitting(make_config, model, 64)
    assert torch.equal(weight, before) and weight.grad is None
    assert torch.equal(torch.get_rng_state(), state)


def test_not_even_one_image_fits(make_config):
    with pytest.raises(UserError, match="not even one image fits"):
        fitting(make_config, Small(0), 64)


def test_a_share_that_has_no_smaller_part_is_told(make_config):
    """7 images, of which two at least have to be mixed."""
    with pytest.raises(UserError, match=r"not even 7 images fit .*, and the 7 images of each process have no smaller"):
        fitting(make_config, Small(4), 7, augment={"mix": "mixup"})


def test_an_output_that_nobody_reads_is_no_dead_process():
    several = SimpleNamespace(num_processes=2, device=torch.device("cpu"))
    with pytest.raises(BrokenPipeError), faults.explained("go on", several, 64):
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")
    with pytest.raises(UserError, match="another process of this run has died"), faults.explained("go on", several, 64):
        raise RuntimeError("[../gloo/transport/tcp/pair.cc] writev: Broken pipe")


@pytest.mark.parametrize(
    "reason, said",
    [
        (
            "Error while creating shared memory segment /dev/shm/nccl-x (size 9): No space left on device",
            "short of /dev/shm",
        ),
        (
            "socketProgress: Connection closed by remote peer",
            "another process of this run has died .socketProgress: Conn",
        ),
        ("", "another process of this run has died .NCCL error in"),
    ],
)
def test_what_nccl_says_last_is_the_reason(reason, said):
    several = SimpleNamespace(num_processes=2, device=torch.device("cuda"))
    with pytest.raises(UserError, match=said), faults.explained("go on", several, 64):
        raise RuntimeError(
            f"NCCL error in: /x.cpp:94, unhandled system error, NCCL version 2.27\nLast error:\n{reason}"
        )


def test_another_error_is_not_taken_for_memory(make_config):
    class Broken(Small):
        def forward(self, images):
            raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        fitting(make_config, Broken(0), 64)


# ---- somebody is gone -------------------------------------------------------------------------------------------


@linux
def test_a_killed_loader_worker_is_told_and_does_not_hang_the_run(long_run):
    process, run = long_run()
    wait_until(lambda: checkpoint._folders(run))
    kill_a_child(process, lambda child: child.ppid() == process.pid and "train.py" in " ".join(child.cmdline()))
    told = error_of(process)
    assert process.returncode == 1
    assert "Traceback" not in told
    last = told.strip().splitlines()[-1]
    assert last.startswith("error: a loader's worker died (") and "--data.workers" in last
    assert last.endswith(f"go on with: accelerate launch train.py --resume {run}")
    assert checkpoint._folders(run)


@pytest.mark.slow
def test_one_of_two_processes_is_killed_and_torchrun_ends_the_other(long_run):
    process, run = long_run(TORCHRUN, TWO_PROCESSES)
    wait_until(lambda: checkpoint._folders(run))
    kill_a_child(process, lambda child: child.environ().get("RANK") == "1" and child.ppid() == process.pid)
    error_of(process)
    assert process.returncode != 0
    assert not psutil.pid_exists(process.pid)
    assert checkpoint._folders(run)


BOTH = ("sh", "-c", 'RANK=1 LOCAL_RANK=1 "$@" 2>/dev/null & RANK=0 LOCAL_RANK=0 exec "$@"', "sh", sys.executable)


@pytest.mark.slow
def test_one_of_two_processes_is_killed_and_the_other_ends_by_itself(long_run):
    """Without a launcher that would see to it: on another machine, say."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    process, run = long_run(BOTH, TWO_PROCESSES | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port})
    kill_a_child(process, lambda child: child.environ()["RANK"] == "1" and child.ppid() == process.pid)
    told = error_of(process)
    assert process.returncode == 1
    assert "Traceback" not in told
    last = told.strip().splitlines()[-1]
    assert last.startswith("error: another process of this run has died (")
    again = "ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2"
    assert re.search(rf"go on with: {again} .*train.py --resume {run}$", last)
