import copy

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

import augment
import models
from config import ModelConfig, PhaseConfig
from engine import forward, train_epoch, train_mode, unwrap, validate
from metrics import IGNORED, Classification
from phases import make_optimizer

IMAGES = torch.rand(96, 3, 32, 32, generator=torch.Generator().manual_seed(1))
ROWS = [{"image": image, "label": torch.tensor(i % 4)} for i, image in enumerate(IMAGES)]


def make_model(name="test_resnet"):
    torch.manual_seed(0)
    return models.create(ModelConfig(name=name), list("abcd"), (32, 32))[0]


def accelerator_of(steps=1, cpu=True, **kwargs):
    plugin = GradientAccumulationPlugin(num_steps=steps, sync_with_dataloader=False)
    return Accelerator(cpu=cpu, gradient_accumulation_plugin=plugin, **kwargs)


def train_one_phase(model, accelerator, modules, micro=32, batch=32, clip=None, lr=0.05, optimizer="sgd"):
    """One epoch as train.py does it; returns the bare model, the prepared one's optimizer and the metrics."""
    models.freeze_all_but(model, modules)
    phase = PhaseConfig(modules=modules, epochs=1, lr=lr, optimizer=optimizer)
    prepared, optimizer, loader = accelerator.prepare(
        model, make_optimizer(phase, model), DataLoader(ROWS, batch_size=batch, drop_last=True)
    )
    metrics = Classification()
    steps = list(train_epoch(accelerator, prepared, loader, nn.Identity(), optimizer, metrics, micro, clip))
    return prepared, optimizer, metrics, steps


def state_bytes(model, prefix):
    return {k: v.clone() for k, v in model.state_dict().items() if k.startswith(prefix)}


def changed(before, model):
    after = model.state_dict()
    return {key for key, value in before.items() if not torch.equal(value, after[key])}


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_convnext", "deep_cnn"])
def test_frozen_is_frozen_byte_for_byte_batch_norm_statistics_included(name):
    model = make_model(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    train_one_phase(model, accelerator_of(), ("head",))
    head = tuple(models.head_names(model))
    assert changed(before, model) == {key for key in before if key.startswith(head)}


@pytest.mark.parametrize(
    ("name", "modules"),
    [("test_resnet", ("layer3", "layer4", "head")), ("test_vit", ("blocks.5", "norm", "head")),
     ("test_convnext", ("stages.3", "head"))],
)  # fmt: skip
def test_a_phase_change_trains_exactly_the_named_modules(name, modules):
    accelerator, model = accelerator_of(), make_model(name)
    prepared, *_ = train_one_phase(model, accelerator, ("head",))
    model = unwrap(accelerator, prepared)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    _, optimizer, _, _ = train_one_phase(model, accelerator, modules)
    prefixes = [p for m in modules for p in (models.head_names(model) if m == "head" else [m])]
    expected = {key for key in before if any(key == p or key.startswith(f"{p}.") for p in prefixes)}
    moved = changed(before, model)
    assert moved <= expected
    assert all(any(key.startswith(prefix) for key in moved) for prefix in prefixes)
    trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    assert {name for name, parameter in model.named_parameters() if id(parameter) in trained} == expected & set(
        dict(model.named_parameters())
    )


def test_the_batch_norms_of_frozen_layers_would_drift_without_train_mode():
    """The fault that the test above guards against is real: plain model.train() changes frozen statistics."""
    model = make_model()
    models.freeze_all_but(model, ("head",))
    before = state_bytes(model, "layer1")
    model.train()
    model(IMAGES[:8])
    assert any("running_mean" in key for key in changed(before, model))


def test_train_mode_leaves_what_trains_in_training_mode():
    model = make_model()
    models.freeze_all_but(model, ("layer4", "head"))
    train_mode(model)
    assert model.training
    assert all(module.training for module in model.layer4.modules())
    assert not any(module.training for module in model.layer3.modules())


def test_frozen_dropout_is_off_and_trained_dropout_on():
    model = make_model("simple_cnn")
    train_mode(model)
    assert model.hidden[3].training
    models.freeze_all_but(model, ("head",))
    train_mode(model)
    assert not model.hidden[3].training


@pytest.mark.parametrize("micro", [8, 16])
def test_accumulation_gives_the_same_step(micro):
    """Batch norm looks at the piece, not the batch, so the trained part here has none."""
    results = []
    for pieces in (32, micro):
        model = make_model("simple_cnn").double()
        model.hidden[3].p = 0.0
        accelerator = accelerator_of(steps=32 // pieces)
        models.freeze_all_but(model, ("all",))
        phase = PhaseConfig(modules="all", epochs=1, lr=0.05, optimizer="sgd")
        prepared, optimizer, loader = accelerator.prepare(
            model, make_optimizer(phase, model), DataLoader(ROWS, batch_size=32)
        )
        metrics = Classification()
        steps = list(train_epoch(accelerator, prepared, loader, lambda x: x.double(), optimizer, metrics, pieces, 1.0))
        assert len(steps) == 3
        assert [step.images for step in steps] == [32, 32, 32]
        results.append(([step.loss.item() for step in steps], model.fc.weight.detach().clone(), metrics.compute()))
        accelerator.free_memory()
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-9)
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-9, atol=1e-12)
    assert results[0][2] == pytest.approx(results[1][2])


def test_clipping_limits_the_gradient():
    moves = []
    for clip in (None, 1e-3):
        model = make_model()
        start = model.fc.weight.detach().clone()
        train_one_phase(model, accelerator_of(), ("head",), batch=96, micro=96, clip=clip, lr=1.0)
        moves.append((model.fc.weight - start).norm().item())
    assert moves[1] <= 1.001e-3 < moves[0]


def test_it_learns():
    model, accelerator = make_model("simple_cnn"), accelerator_of()
    models.freeze_all_but(model, ("all",))
    phase = PhaseConfig(modules="all", epochs=1, lr=1e-3)
    prepared, optimizer, loader = accelerator.prepare(
        model, make_optimizer(phase, model), DataLoader(ROWS, batch_size=32)
    )
    top1 = []
    for _ in range(25):
        metrics = Classification()
        list(train_epoch(accelerator, prepared, loader, nn.Identity(), optimizer, metrics, 32))
        top1.append(metrics.compute()["top1"])
    assert top1[-1] > 0.9 > top1[0]


def test_training_figures_cover_every_row_trained_on():
    _, _, metrics, steps = train_one_phase(make_model(), accelerator_of(), ("head",))
    assert metrics.waiting == sum(step.images for step in steps) == 96
    result = metrics.compute()
    assert set(result) == {"loss", "top1", "top5"}
    assert result["loss"] == pytest.approx(sum(step.loss.item() for step in steps) / 3, rel=1e-5)


@pytest.mark.parametrize("batch", [10, 32, 96])
def test_validation_counts_every_row_once_and_changes_nothing(batch):
    model, accelerator = make_model(), accelerator_of()
    before = copy.deepcopy(model.state_dict())
    prepared, loader = accelerator.prepare(model, DataLoader(ROWS[:53], batch_size=batch))
    result = validate(accelerator, prepared, loader, nn.Identity(), micro_batch_size=20)
    with torch.no_grad():
        logits = model.eval()(IMAGES[:53])
    labels = torch.arange(53) % 4
    assert result["top1"] == pytest.approx((logits.argmax(1) == labels).float().mean().item())
    assert result["loss"] == pytest.approx(nn.functional.cross_entropy(logits, labels).item(), rel=1e-5)
    assert not changed(before, model)


def test_mixed_precision_holds_in_the_second_phase_too():
    """unwrap_model(keep_fp32_wrapper=False) and prepare again would silently train phase 2 in fp32."""
    accelerator, model = accelerator_of(mixed_precision="bf16"), make_model()
    seen = []
    for modules in (("head",), ("layer4", "head")):
        seen.clear()
        hook = model.layer4.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
        prepared, *_ = train_one_phase(model, accelerator, modules)
        assert set(seen) == {torch.bfloat16}
        hook.remove()
        model = unwrap(accelerator, prepared)
        assert "forward" not in vars(model), "wrapped once per phase, not once more in each"
    assert model(IMAGES[:2]).dtype == torch.float32


# ---- mixed images ------------------------------------------------------------------------------------------------


def test_a_mixed_images_loss_is_that_of_both_labels_by_share():
    def mix(images, labels):
        return 2 * images, torch.tensor([3, IGNORED, 1, IGNORED]), torch.tensor([0.25, 1.0, 0.0, 1.0])

    labels, inputs = torch.tensor([0, 1, 2, IGNORED]), torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    logits, losses = forward(nn.Identity(), inputs, labels, mix)
    of = -logits.log_softmax(1)
    assert logits.equal(2 * inputs)
    torch.testing.assert_close(
        losses, torch.stack([0.25 * of[0, 0] + 0.75 * of[0, 3], of[1, 1], of[2, 1], of[0, 0] * 0])
    )


@pytest.mark.parametrize("micro", [32, 8])
def test_mixing_is_within_a_piece_and_figures_are_of_the_own_label(micro):
    """A mix that gives all to the partner trains on the labels reversed, piece by piece, and judges by the own ones."""

    def partners(images, labels):
        return images, labels.flip(0), torch.zeros(len(labels))

    results = []
    for mix in (None, partners):
        model, accelerator = make_model("simple_cnn"), accelerator_of(steps=32 // micro)
        model.hidden[3].p = 0.0
        labels = torch.arange(96) % 4
        given = labels.view(-1, micro).flip(1).flatten() if mix is None else labels
        rows = [{"image": image, "label": label} for image, label in zip(IMAGES, given, strict=True)]
        phase = PhaseConfig(modules="all", epochs=1, lr=0.05, optimizer="sgd")
        prepared, optimizer, loader = accelerator.prepare(
            model, make_optimizer(phase, model), DataLoader(rows, batch_size=32)
        )
        metrics = Classification()
        steps = list(train_epoch(accelerator, prepared, loader, nn.Identity(), optimizer, metrics, micro, None, mix))
        state = metrics.state_dict()
        assert state["labels"].equal(given)
        results.append(([step.loss.item() for step in steps], model.fc.weight.detach().clone(), state["classes"]))
        accelerator.free_memory()
    assert results[0][0] == results[1][0]
    assert results[0][1].equal(results[1][1])
    assert results[0][2].equal(results[1][2])


# ---- a loss that is not finite ----------------------------------------------------------------------------------


def poisoned(bad, rows=ROWS):
    """The rows, those of some batches of 16 full of infinity."""
    return [
        {"image": row["image"] * (torch.inf if number // 16 in bad else 1), "label": row["label"]}
        for number, row in enumerate(rows)
    ]


def run_steps(accelerator, bad, optimizer="adam", micro=16):
    """Six steps; returns the model's parameters after each, and how many updates had been left out."""
    model = make_model("simple_cnn")
    phase = PhaseConfig(modules="all", epochs=1, lr=0.01, optimizer=optimizer)
    prepared, optimizer, loader = accelerator.prepare(
        model, make_optimizer(phase, model), DataLoader(poisoned(bad), batch_size=16)
    )
    steps = train_epoch(accelerator, prepared, loader, nn.Identity(), optimizer, Classification(), micro)
    weights, unapplied = [], []
    for step in steps:
        weights.append(torch.cat([p.detach().flatten().clone() for p in model.parameters()]))
        unapplied.append(int(step.unapplied))
    return weights, unapplied


@pytest.mark.parametrize("micro", [16, 8])
@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd"])
def test_neither_a_bad_step_nor_any_after_it_is_applied(optimizer, micro):
    weights, unapplied = run_steps(accelerator_of(16 // micro), {2}, optimizer, micro)
    assert unapplied == [0, 0, 1, 2, 3, 4], "noted once and for good: the first bad step is the third"
    assert not torch.equal(weights[0], weights[1])
    assert all(torch.equal(later, weights[1]) for later in weights[2:])
    assert weights[-1].isfinite().all()


def scaled_accelerator(init_scale):
    accelerator = accelerator_of()
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=init_scale)
    accelerator.native_amp = True
    return accelerator


def test_what_the_gradient_scaler_leaves_out_is_not_taken_for_it():
    accelerator = scaled_accelerator(2.0**127)  # overflows, and is halved, at first
    _, unapplied = run_steps(accelerator, set())
    assert accelerator.scaler.get_scale() < 2.0**127, "it did leave steps out"
    assert unapplied == [0] * 6


def test_under_a_gradient_scaler_nothing_is_applied_after_a_bad_step():
    weights, unapplied = run_steps(scaled_accelerator(2.0), {2})
    assert unapplied == [0, 0, 1, 2, 3, 4]
    assert all(torch.equal(later, weights[1]) for later in weights[2:])
    assert not torch.equal(weights[0], weights[1])


@pytest.mark.parametrize("how", ["none", "mixup", "cutmix"])
def test_no_step_waits_for_the_device(how):
    """Reading a value of the device from Python is what waits; the whole epoch must do without."""

    class Reads(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.count += "_local_scalar_dense" in str(function)
            return function(*args, **(kwargs or {}))

    accelerator, model = accelerator_of(), make_model("simple_cnn")
    phase = PhaseConfig(modules="all", epochs=1, lr=0.01)
    prepared, optimizer = accelerator.prepare(model, make_optimizer(phase, model))
    batches = [{"image": (255 * IMAGES[:16]).byte(), "label": torch.arange(16) % 4}] * 6
    transform, mix = augment.AugMix((0, 0, 0), (1, 1, 1), distorts=True), augment.MIX[how]
    with Reads() as reads:
        list(train_epoch(accelerator, prepared, batches, transform, optimizer, Classification(), 8, None, mix))
        assert reads.count == 0
        torch.ones(1).item()
        assert reads.count == 1, "it does see one"
