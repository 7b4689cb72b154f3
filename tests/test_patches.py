"""Patches of train.py for experiments: each does what it says, and no more."""

import sys
import types

import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import ROOT

sys.path.append(str(ROOT / "benchmarks"))

import patches
import patching

import augment
import checkpoint
import commandline
import engine
import folding
import models
import train
from config import PhaseConfig
from errors import UserError
from recipe import check, read_yaml


@pytest.fixture
def patched(monkeypatch):
    """Apply a patch for as long as the test lasts."""

    def patch(module, name, make):
        monkeypatch.setattr(module, name, make(getattr(module, name)))

    monkeypatch.setattr(patching, "patch", patch)
    return lambda name: patches.PATCHES[name]()


@pytest.fixture
def still(monkeypatch):
    """The report's augmentation leaves images as they are."""
    for name in ("jitter", "warp"):
        monkeypatch.setattr(augment, name, lambda images, *_, **__: images)


def augmented(images):
    return augment.ReportAugment((0, 0, 0), (1, 1, 1)).augment(images)


def test_label_smoothing_is_of_training_alone(patched):
    patched("label_smoothing")
    logits, labels = torch.randn(4, 100, requires_grad=True), torch.tensor([1, 2, 3, 4])
    smooth = F.cross_entropy(logits, labels, reduction="none", label_smoothing=0.1)
    assert engine.F.cross_entropy(logits, labels, reduction="none").equal(smooth)
    with torch.no_grad():
        plain = F.cross_entropy(logits, labels, reduction="none")
        assert engine.F.cross_entropy(logits, labels, reduction="none").equal(plain)


@pytest.mark.parametrize(
    ("name", "pixels", "of_images"),
    [
        ("erasing", (0.12, 0.26), (1, 1)),
        ("noise_and_blur", (0.3, 0.7), (0.3, 0.7)),
        ("trivial_augment", (0.5, 1), (0.8, 1)),
        ("unaugmented", (0, 0), (0, 0)),
    ],
)
def test_how_much_of_the_images_is_changed(patched, still, name, pixels, of_images):
    torch.manual_seed(0)
    patched(name)
    images = torch.rand(64, 3, 32, 32)
    out = augmented(images)
    assert out.shape == images.shape and out.min() >= 0 and out.max() <= 1
    changed = (out != images).any(1).float()
    assert pixels[0] <= changed.mean() <= pixels[1]
    assert of_images[0] <= changed.flatten(1).any(1).float().mean() <= of_images[1]


def test_unaugmented_leaves_nothing_of_the_reports_augmentation(patched):
    patched("unaugmented")
    images = torch.rand(8, 3, 32, 32)
    assert augmented(images).equal(images)


def test_frozen_batch_norms_drift_again(patched):
    patched("drifting_batch_norm")
    model = timm.create_model("test_resnet")
    models.freeze_all_but(model, ("fc",))
    assert folding.fold(model, (32, 32), "no") == 0
    engine.train_mode(model)
    before = model.bn1.running_mean.clone()
    model(torch.randn(8, 3, 32, 32))
    assert not model.bn1.running_mean.equal(before)


def test_another_normalisation_alone(patched):
    patched("other_normalisation")
    config = check({"phases": {"train": {"modules": "all", "epochs": 1, "lr": 1}}}, "test")
    cpu = torch.device("cpu")
    training, evaluation = augment.build(config, {"mean": (0.5,) * 3, "std": (0.5,) * 3}, cpu)
    assert training.mean.flatten()[0] == 0.5
    assert evaluation.mean.flatten().tolist() == pytest.approx(models.CIFAR100_MEAN)
    _, evaluation = augment.build(config, {"mean": models.CIFAR100_MEAN, "std": models.CIFAR100_STD}, cpu)
    assert evaluation.mean.flatten().tolist() == pytest.approx([0.485, 0.456, 0.406]), "if those are its own"


def groups_of(model):
    phase = PhaseConfig(modules="all", epochs=1, lr=1.0, weight_decay=0.1, optimizer="adamw")
    optimizer = train.make_optimizer(phase, model)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))
    return optimizer.param_groups


def test_no_decay_on_norms(patched):
    patched("no_decay_on_norms")
    wide, narrow = groups_of(timm.create_model("test_resnet"))
    assert (wide["weight_decay"], narrow["weight_decay"]) == (0.1, 0.0)
    assert all(it.ndim > 1 for it in wide["params"]) and all(it.ndim == 1 for it in narrow["params"])


def test_layer_decay(patched):
    patched("layer_decay")
    model = timm.create_model("test_resnet")
    rates = {parameter: group["lr"] for group in groups_of(model) for parameter in group["params"]}
    assert rates[model.fc.weight] == 1.0
    assert rates[model.layer4[0].conv1.weight] == pytest.approx(0.7)
    assert rates[model.conv1[0].weight] == pytest.approx(0.7**5)
    with pytest.raises(UserError, match="this model has a features"):
        groups_of(timm.create_model("simple_cnn"))


def test_averaged_weights_are_judged_and_kept_and_the_models_own_train_on(patched, monkeypatch):
    def train_epoch(accelerator, model):
        for value in (1.0, 2.0):
            model.weight.data.fill_(value)
            yield value

    def validate(accelerator, model, interrupted=False):
        if interrupted:
            raise KeyboardInterrupt
        return model.weight.item()

    kept = []
    monkeypatch.setattr(train, "train_epoch", train_epoch)
    monkeypatch.setattr(train, "validate", validate)
    monkeypatch.setattr(checkpoint, "save_best", lambda model, run: kept.append(model.weight.item()))
    patched("ema")
    model = torch.nn.Linear(1, 1, bias=False)
    accelerator = types.SimpleNamespace(unwrap_model=lambda model: model)
    list(train.train_epoch(accelerator, model))
    average = pytest.approx(1 + 1 / 500)
    assert train.validate(accelerator, model) == average
    checkpoint.save_best(model, None)
    assert kept == [average]
    with pytest.raises(KeyboardInterrupt):
        train.validate(accelerator, model, True)
    assert model.weight.item() == 2.0


def test_flips_are_averaged_in_validation_alone(monkeypatch, patched):
    monkeypatch.setattr(train, "validate", lambda accelerator, model, images: model.eval()(images))
    patched("flips_averaged")
    model, images = timm.create_model("test_resnet", num_classes=10), torch.randn(2, 3, 32, 32)
    judged = train.validate(None, model, images)
    assert not model.training  # as validation wants it
    each = torch.stack([model(view).softmax(1) for view in (images, images.flip(3))])
    torch.testing.assert_close(judged.exp(), each.mean(0))


# ---- the command ----------------------------------------------------------------------------------------------------


def test_the_list_says_what_each_does(command):
    result = command("benchmarks/patches.py", "--list")
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert len(lines) == len(patches.PATCHES) and all(len(line.split()) > 2 for line in lines)


@pytest.mark.parametrize(
    "line, said",
    [
        ("magic -- --config recipes/demo_scratch.yaml", "there is no patch magic"),
        ("-- --config recipes/demo_scratch.yaml", "name a patch"),
        ("no_decay_on_norms layer_decay --", "no_decay_on_norms and layer_decay don't go together"),
        ("ema flips_averaged --", "ema and flips_averaged don't go together"),
        ("erasing -- --augment.policy none", "erasing changes augment.policy report, not none"),
        ("noise_and_blur -- --augment.policy augmix", "noise_and_blur changes augment.policy report, not augmix"),
    ],
)
def test_mistakes_are_told_in_a_line(command, line, said):
    result = command("benchmarks/patches.py", *line.split())
    assert result.returncode == 2
    assert said in result.stderr.splitlines()[-1]


@pytest.mark.slow
@pytest.mark.parametrize(
    "names",
    [
        "drifting_batch_norm label_smoothing no_decay_on_norms ema",
        "trivial_augment layer_decay",
        "unaugmented erasing noise_and_blur flips_averaged",
    ],
)
def test_patched_runs_train_and_are_gone_on_with_only_so(command, parquet, tmp_path, names):
    result = command(
        "benchmarks/patches.py", *names.split(), "--", "--config", "recipes/demo_finetune.yaml",
        "--data.source", str(parquet), "--phases.head.epochs", "1", "--phases.finetune.epochs", "2",
        "--output_dir", str(tmp_path), "--run_name", "run",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-2000:]
    assert (tmp_path / "run" / "summary.json").is_file()
    assert f"recipe: demo_finetune..{names.replace(' ', '.')}" in (tmp_path / "run" / "config.yaml").read_text()
    for others in ("compiled", names.split()[-1]):
        result = command("benchmarks/patches.py", others, "--", "--resume", str(tmp_path / "run"))
        assert result.returncode == 2 and "not with these patches alone" in result.stderr


@pytest.mark.parametrize("option", ["--resume", "--config"])
def test_train_does_not_go_on_with_a_patched_run(tmp_path, option):
    run = tmp_path / "run"
    run.mkdir()
    config = check(read_yaml(ROOT / "recipes" / "demo_scratch.yaml") | {"recipe": "demo_scratch..ema.erasing"}, "test")
    (run / "config.yaml").write_text(config.to_yaml())
    argv = [option, str(run if option == "--resume" else run / "config.yaml")]
    with pytest.raises(
        UserError, match=r"patched training: continue it with benchmarks/patches.py ema erasing -- instead"
    ):
        commandline.parse(argv)
    assert commandline.parse(argv, patched=True)[0].recipe == "demo_scratch..ema.erasing"
