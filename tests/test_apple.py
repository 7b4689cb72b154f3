"""Apple's GPUs, as far as a machine without one can tell: by torch's own list of what is implemented for them."""

from importlib.resources import files

import pytest
import torch
import yaml
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import augment
import folding
import inference
import models
from config import ModelConfig, PhaseConfig
from engine import forward
from metrics import Classification
from phases import make_optimizer

APPLE = torch.device("mps")
CFG = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4)}
ELSEWHERE = {"CompositeImplicitAutograd", "CompositeExplicitAutograd", "CompositeExplicitAutogradNonFunctional"}


class Seen(TorchDispatchMode):
    """Notes torch's own operators, and the types of the numbers that they are given or return."""

    def __init__(self):
        super().__init__()
        self.operators, self.dtypes = set(), set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function.namespace == "aten":
            self.operators.add(str(function).removeprefix("aten.").removesuffix(".default"))
        self.dtypes |= {leaf.dtype for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, torch.Tensor)}
        return out


@pytest.fixture(scope="module")
def implemented():
    """Whether torch has an operator on Apple's GPUs, itself or in terms of others."""
    path = files("torchgen") / "packaged/ATen/native/native_functions.yaml"
    entries = {entry["func"].split("(")[0]: entry for entry in yaml.load(path.read_text(), yaml.CSafeLoader)}

    def is_there(name: str) -> bool:
        entry = entries[name]
        keys = {key.strip() for group in entry.get("dispatch", {}) for key in group.split(",")}
        delegate = entry.get("structured_delegate")
        return bool(keys & {"MPS", *ELSEWHERE}) or (is_there(delegate) if delegate else not keys)

    assert is_there("grid_sampler_2d"), "the list is read wrongly"
    assert is_there("add.Tensor"), "the list is read wrongly"
    assert not is_there("linalg_eig"), "the list is read wrongly"
    return is_there


@pytest.fixture
def seen(implemented):
    """Notes what the test does, and looks it up when the test is over."""
    with Seen() as noted:
        yield noted
    assert len(noted.operators) > 10
    assert not {name for name in noted.operators if not implemented(name)}
    assert not noted.dtypes & {torch.float64, torch.complex128}, "they have no double precision"


def images(side=32, count=18):
    return torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8)


@pytest.mark.parametrize("policy", [augment.Normalize, augment.ReportAugment, augment.AugMix])
@pytest.mark.parametrize("size", [None, 24, 48])
def test_images_can_be_augmented(seen, policy, size):
    policy(**CFG, image_size=size, distorts=True)(images())


@pytest.mark.parametrize(
    "name, mix", [("deep_cnn", "mixup"), ("resnet50_small_stem", "cutmix"), ("simple_cnn", "none")]
)
def test_models_can_be_trained(seen, name, mix):
    model = models.create(ModelConfig(name=name), tuple("abcdefghij"), (32, 32))[0].train()
    pixels, labels = augment.Normalize(**CFG)(images(count=4)), torch.randint(10, (4,))
    for optimizer in ("sgd", "adam", "adamw"):
        optimizer = make_optimizer(PhaseConfig(modules=("all",), epochs=1, optimizer=optimizer, lr=0.1), model)
        logits, losses = forward(model, pixels, labels, augment.MIX[mix])
        (losses.mean() * torch.where(losses.isfinite().all(), 1.0, torch.nan)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.found_inf = torch.zeros(())
        optimizer.step()
        optimizer.zero_grad()
    Classification.reduce(logits, labels, losses)


def test_images_can_be_judged(seen):
    model = models.create(ModelConfig(name="test_resnet"), tuple("abc"), (32, 32))[0].eval().requires_grad_(False)
    folding.fold(model, (32, 32), "no")
    inference.log_probabilities(model, augment.Normalize(**CFG)(images()), "shifts").topk(3)


# Torch has computed wrong numbers there from channels_last images and weights.


def test_images_have_the_default_layout_there_and_channels_last_elsewhere(monkeypatch):
    last = torch.channels_last
    assert augment.layout(APPLE) is torch.contiguous_format
    assert augment.layout(torch.device("cpu")) is augment.layout(torch.device("cuda")) is last
    given, normalize = images().contiguous(memory_format=last), augment.Normalize(**CFG)
    assert normalize(given).is_contiguous(memory_format=last)
    monkeypatch.setattr(augment, "layout", lambda device: torch.contiguous_format)
    assert normalize(given).is_contiguous()


def test_so_have_folded_weights(monkeypatch):
    for device in (torch.device("cpu"), APPLE):
        monkeypatch.setattr(folding, "layout", lambda _, device=device: augment.layout(device))
        model = models.create(ModelConfig(name="test_resnet"), tuple("abc"), (32, 32))[0].requires_grad_(False)
        folding.fold(model, (32, 32), "no")
        weight = model.layer1[0].conv2.forward.weight
        assert weight.is_contiguous(memory_format=augment.layout(device)), device
