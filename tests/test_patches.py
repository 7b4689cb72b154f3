"""Patches of train.py for experiments: each does what it says, and nothing else."""

import subprocess
import sys

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

import patches

TRAIN = """
import sys; sys.path.insert(0, "benchmarks")
import torch, patches
for name in sys.argv[1].split(","):
    patches.PATCHES[name]()
"""


def run(names: str, code: str) -> str:
    """Print something in a process of its own, whose modules are patched."""
    result = subprocess.run(
        [sys.executable, "-c", TRAIN + code, names], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout


LOSSES = """
import engine
logits, labels = torch.randn(4, 100, requires_grad=True), torch.tensor([1, 2, 3, 4])
training = engine.F.cross_entropy(logits, labels, reduction="none")
smooth = torch.nn.functional.cross_entropy(logits, labels, reduction="none", label_smoothing=0.1)
with torch.no_grad():
    validation = engine.F.cross_entropy(logits, labels, reduction="none")
plain = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
print(training.equal(smooth), validation.equal(plain))
"""


def test_label_smoothing_is_of_training_alone():
    assert run("label_smoothing", LOSSES).split() == ["True", "True"]


MIX = """
import augment, engine
mean = torch.zeros(3), torch.ones(3)
images = (255 * torch.rand(64, 3, 32, 32)).to(torch.uint8)
transform = augment.ReportAugment((0, 0, 0), (1, 1, 1))
logits, labels = torch.zeros(64, 100, requires_grad=True), torch.arange(64)
one_hot = torch.eye(100)[labels].requires_grad_() * 20
torch.manual_seed(0)
mixed = transform(images)
loss = engine.F.cross_entropy(one_hot, labels, reduction="none")
# With logits that name the own label, the loss is 20 times the partner's share.
share = 1 - loss / 20
print(mixed.shape == (64, 3, 32, 32), float(share.min()) >= -1e-3, float(share.max()) <= 1.001, float(share.mean()))
"""


@pytest.mark.parametrize("name", ["mixup", "cutmix"])
def test_mixed_images_count_for_both_labels(name):
    shape, low, high, mean = run(name, MIX).split()
    assert (shape, low, high) == ("True", "True", "True")
    assert 0.3 < float(mean) < 0.95


GROUPS = """
import timm, phases, train
from config import PhaseConfig
model = timm.create_model("test_resnet")
phase = PhaseConfig(modules="all", epochs=1, lr=1.0, weight_decay=0.1, optimizer="adamw")
optimizer = train.make_optimizer(phase, model)
print(sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters())))
for group in optimizer.param_groups:
    print(round(group["lr"], 3), group["weight_decay"], all(p.ndim > 1 for p in group["params"]))
"""


def test_no_decay_on_norms():
    assert run("no_decay_on_norms", GROUPS).splitlines() == ["True", "1.0 0.1 True", "1.0 0.0 False"]


def test_layer_decay():
    whole, *groups = run("layer_decay", GROUPS).splitlines()
    assert whole == "True"
    assert sorted({float(group.split()[0]) for group in groups}, reverse=True)[:3] == [1.0, 0.7, 0.49]


def test_the_list_says_what_each_does(command):
    result = command("benchmarks/patches.py", "--list")
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert len(lines) == len(patches.PATCHES) and all(len(line.split()) > 2 for line in lines)


def test_an_unknown_patch_is_named(command):
    result = command("benchmarks/patches.py", "magic", "--", "--config", "recipes/demo_scratch.yaml")
    assert result.returncode == 2 and "there is no patch magic" in result.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    "names",
    [
        "drifting_batch_norm other_normalisation_in_evaluation label_smoothing no_decay_on_norms ema",
        "mixup trivial_augment layer_decay",
        "cutmix erasing noise_and_blur unaugmented",
    ],
)
def test_patched_runs_train(command, parquet, tmp_path, names):
    result = command(
        "benchmarks/patches.py", *names.split(), "--", "--config", "recipes/demo_finetune.yaml",
        "--data.source", str(parquet), "--phases.head.epochs", "1", "--phases.finetune.epochs", "2",
        "--output_dir", str(tmp_path), "--run_name", "run",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-2000:]
    assert (tmp_path / "run" / "summary.json").is_file()
