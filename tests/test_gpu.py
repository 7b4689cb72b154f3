"""What needs a GPU: `python -m pytest -m gpu`. Skipped elsewhere; see docs/scaling-out.md for where it has been run."""

import json
import math

import pytest
import torch
from conftest import TWO_PHASES, forget_accelerate
from test_engine import accelerator_of, make_model, train_one_phase
from test_launch import TORCHRUN

import train
from engine import unwrap

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
