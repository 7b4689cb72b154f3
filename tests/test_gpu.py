"""What needs a GPU: `python -m pytest -m gpu`. Skipped elsewhere; see docs/scaling-out.md for where it has been run."""

import json
import math
import weakref

import pytest
import timm
import torch
from conftest import TWO_PHASES, forget_accelerate, phase
from test_engine import accelerator_of, make_model, train_one_phase
from test_launch import TORCHRUN
from test_resume import DRAWING, STEPS, whole_and_resumed

import augment
import graphs
import launch
import loading
import models
import train
from engine import train_mode, unwrap
from errors import UserError

GPUS = torch.cuda.device_count()
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not GPUS, reason="there is no GPU here"),
]
DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@pytest.mark.parametrize("precision", DTYPES)
def test_phase_2_runs_in_the_chosen_precision(precision):
    accelerator, model, seen = accelerator_of(cpu=False, mixed_precision=precision), make_model(), []
    for modules in (("head",), ("layer4", "head")):
        seen.clear()
        hook = model.layer4.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
        prepared, *_ = train_one_phase(model, accelerator, modules)
        assert set(seen) == {DTYPES[precision]}
        hook.remove()
        model = unwrap(accelerator, prepared)


@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("tf32", [False, True])
def test_two_phases_train_in_every_precision(make_config, monkeypatch, precision, tf32):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", precision)
    run = train.train(make_config(TWO_PHASES, tf32=tf32))
    history = [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]
    assert [row["phase"] for row in history] == ["head", "finetune"]
    assert all(math.isfinite(row["train_loss"]) and row["peak_memory_mb"] > 0 for row in history)
    assert torch.backends.cuda.matmul.allow_tf32 == torch.backends.cudnn.allow_tf32 == tf32


def test_what_a_gpu_computes_is_what_a_cpu_does(make_config, monkeypatch):
    """Without augmentation and in exact fp32, one epoch's losses agree."""
    losses = []
    for name, cpu in (("gpu", "false"), ("cpu", "true")):
        monkeypatch.setenv("ACCELERATE_USE_CPU", cpu)
        config = make_config(TWO_PHASES, augment={"policy": "none"}, run_name=name)
        run = train.train(config)
        losses.append([json.loads(line)["val_loss"] for line in (run / "history.jsonl").read_text().splitlines()])
        forget_accelerate()
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def losses_of(run):
    rows = [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]
    return [row[key] for row in rows for key in ("train_loss", "val_loss")]


@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("phases", [TWO_PHASES, {"train": phase(epochs=2, lr=1e-4)}], ids=["two phases", "all"])
def test_what_is_replayed_is_what_was_recorded(make_config, monkeypatch, capsys, phases, precision):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", precision)
    losses = []
    for recorded in (True, False):
        config = make_config(phases, augment={"policy": "none"}, cuda_graphs=recorded, run_name=str(recorded))
        losses.append(losses_of(train.train(config)))
        assert ("recorded as CUDA graphs" in capsys.readouterr().out) == recorded
        forget_accelerate()
    assert losses[0] == pytest.approx(losses[1], rel=1e-3 if precision == "no" else 2e-2)


def test_a_stopped_run_goes_on_as_if_nothing_had_been(make_config, monkeypatch):
    """Recording draws nothing and moves no buffer: what a resumed run draws is what the whole one drew."""
    config = make_config({"all": phase(epochs=3, lr=1e-3)}, augment=DRAWING)
    whole, run = whole_and_resumed(config, monkeypatch, step=STEPS + 5)
    assert losses_of(run) == pytest.approx(losses_of(whole), rel=1e-3)


@pytest.mark.parametrize("policy", [augment.ReportAugment, augment.AugMix])
def test_replayed_augmentation_draws_anew_and_as_the_random_state_says(policy):
    transform = policy((0.5,) * 3, (0.5,) * 3, distorts=True).cuda()
    images = torch.randint(0, 256, (16, 3, 32, 32), dtype=torch.uint8, device="cuda")
    torch.cuda.manual_seed(1)
    expected = [transform(images), transform(images)]
    assert not expected[0].equal(expected[1])
    replayed = graphs.Replayed(transform)
    for _ in range(2):  # recorded at first, replayed from then on
        torch.cuda.manual_seed(1)
        for one in expected:
            torch.testing.assert_close(replayed(images), one, atol=1e-5, rtol=0)
    assert replayed(images[:5]).shape == (5, 3, 32, 32), "another shape is not replayed"
    assert replayed(images // 4).mean() < -0.5, "it is these images"


def test_recording_leaves_buffers_and_random_numbers_as_they_were():
    accelerator = accelerator_of(cpu=False)
    model = accelerator.prepare(make_model())
    model.train()
    before, random_state = {name: it.clone() for name, it in model.state_dict().items()}, torch.cuda.get_rng_state()
    assert graphs.record(accelerator, model, (8, 3, 32, 32))
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())
    assert torch.cuda.get_rng_state().equal(random_state)


def test_what_frozen_modules_keep_for_later_calls_outlives_a_change_of_mode():
    """LeViT's attention drops it then; but replays go on reading it."""
    model = timm.create_model("levit_128s", num_classes=10, img_size=64).requires_grad_(False)
    models.freeze_all_but(model, ("head",))
    accelerator = accelerator_of(cpu=False)
    prepared = accelerator.prepare(model.cuda())
    assert graphs.record(accelerator, prepared, (8, 3, 64, 64))
    caches = [module.attention_bias_cache for module in model.modules() if hasattr(module, "attention_bias_cache")]
    kept = [weakref.ref(tensor) for cache in caches for tensor in cache.values()]
    del caches
    train_mode(prepared)
    assert kept and all(one() is not None for one in kept)


def test_dropout_drops_anew_in_each_replayed_step(make_config):
    """And what is dropped is what would have been: SimpleCNN, whose head drops half."""
    losses = []
    for recorded in (True, False):
        config = make_config(
            {"train": phase(epochs=2)}, model={"name": "simple_cnn"}, cuda_graphs=recorded, run_name=str(recorded)
        )
        losses.append(losses_of(train.train(config)))
        forget_accelerate()
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)


def test_what_looks_at_a_value_can_not_be_recorded_and_says_the_way_out(make_config, monkeypatch):
    real = torch.nn.Linear.forward
    monkeypatch.setattr(torch.nn.Linear, "forward", lambda self, x: real(self, x * (1 if x.sum().item() else 2)))
    with pytest.raises(UserError, match=r"can't be recorded as CUDA graphs .* --cuda_graphs false"):
        train.train(make_config(TWO_PHASES))


def test_accumulated_gradients_are_not_replayed(make_config, capsys):
    losses = []
    for micro in (None, 8):
        data = {"micro_batch_size": micro, "batch_size": 32}
        config = make_config(
            {"head": phase(modules="head")}, augment={"policy": "none"}, data=data, run_name=str(micro)
        )
        losses.append(losses_of(train.train(config)))
        assert ("recorded as CUDA graphs" in capsys.readouterr().out) == (micro is None)
        forget_accelerate()
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_no_step_waits_for_the_gpu(make_config, monkeypatch):
    """What is told about a step is read now and then; but no step itself makes Python wait."""
    real = train.train_epoch

    def spied(*args):
        try:
            for number, step in enumerate(real(*args)):
                torch.cuda.set_sync_debug_mode("default")  # tracking may
                yield step
                torch.cuda.set_sync_debug_mode("error" if number else "default")  # the first one records
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(train, "train_epoch", spied)
    train.train(make_config(TWO_PHASES, augment=DRAWING))


def test_batches_are_copied_without_waiting(make_config):
    accelerator = launch.make_accelerator(make_config())
    assert accelerator.prepare(torch.utils.data.DataLoader([0]))._non_blocking


def test_few_images_are_kept_on_the_gpu(make_config, monkeypatch):
    seen = []
    real = loading.DecodedImages.__getitems__
    monkeypatch.setattr(
        loading.DecodedImages, "__getitems__", lambda self, rows: seen.append(self.images.is_cuda) or real(self, rows)
    )
    train.train(make_config({"head": phase(modules="head")}))
    assert seen and all(seen)


@pytest.mark.skipif(GPUS < 2, reason="there are not two GPUs here")
def test_synchronised_batch_norms_see_the_whole_batch(command, parquet, tmp_path):
    figures = []
    for count in (1, 2):
        launcher = [*TORCHRUN[:-1], str(count)]
        result = command(
            "train.py", "--config", "recipes/demo_scratch.yaml", "--data.source", str(parquet), "--augment.policy",
            "none", "--phases.train.epochs", "1", "--output_dir", str(tmp_path), "--run_name", str(count),
            "--sync_batch_norm", "true", launcher=launcher,
        )  # fmt: skip
        assert result.returncode == 0, result.stderr[-3000:]
        figures.append(json.loads((tmp_path / str(count) / "history.jsonl").read_text().splitlines()[0])["train_loss"])
    assert figures[1] == pytest.approx(figures[0], rel=1e-3)
