import pytest
import timm
import torch
from timm.layers import BatchNormAct2d
from torch import nn

import folding
import models
from engine import train_mode

SIZE = (32, 32)


def create(name: str) -> nn.Module:
    """A model whose batch norms have statistics of their own."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.2)
    return model


@pytest.fixture
def model():
    return create("resnet18")


@pytest.fixture
def images():
    return torch.randn(8, 3, *SIZE, generator=torch.Generator().manual_seed(1))


def test_the_folded_trunks_output_is_the_unfolded_ones(model, images):
    models.freeze_all_but(model, ("head",))
    before = model.eval()(images)
    assert folding.fold(model, SIZE, "no") == 20
    torch.testing.assert_close(model(images), before, atol=1e-4, rtol=1e-4)
    assert not any(torch.equal(model.conv1.forward.weight, parameter) for parameter in model.parameters())


def test_synchronised_batch_norms_are_folded_too(model, images):
    model = models.synchronised(model)
    models.freeze_all_but(model, ("head",))
    before = model.eval()(images)
    assert folding.fold(model, SIZE, "no") == 20
    torch.testing.assert_close(model(images), before, atol=1e-4, rtol=1e-4)


def test_folded_bf16_is_as_near_to_fp32_as_unfolded_bf16(model, images):
    models.freeze_all_but(model, ("head",))
    exact = model.eval()(images)
    with torch.autocast("cpu", torch.bfloat16):
        unfolded = (model(images) - exact).norm()
        folding.fold(model, SIZE, "bf16")
        folded = (model(images) - exact).norm()
    assert model.conv1.forward.weight.dtype == torch.bfloat16
    assert folded < 1.5 * unfolded


def test_only_what_is_frozen_is_folded_and_gradients_stay(model, images):
    models.freeze_all_but(model, ("layer2", "head"))
    train_mode(model)

    def gradients():
        model.zero_grad()
        model(images).square().mean().backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.requires_grad}

    statistics = model.layer2[0].bn1.running_mean.clone()
    before = gradients()
    assert not torch.equal(model.layer2[0].bn1.running_mean, statistics), "what trains keeps its batch norms"
    folded = folding.fold(model, SIZE, "no")
    assert folded == 20 - 5  # layer2 has five
    assert "forward" not in vars(model.layer2[0].conv1)
    train_mode(model)
    after = gradients()
    assert before.keys() == after.keys()
    for name, gradient in before.items():
        torch.testing.assert_close(after[name], gradient, atol=1e-4, rtol=1e-3)


def test_state_names_and_values_stay_and_unfold_undoes_it(model, images):
    models.freeze_all_but(model, ("head",))
    before, output = {key: value.clone() for key, value in model.state_dict().items()}, model.eval()(images)
    folding.fold(model, SIZE, "bf16")
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    folding.unfold(model)
    assert not any("forward" in vars(module) for module in model.modules())
    assert torch.equal(model(images), output)


def test_nothing_is_folded_where_all_trains_and_no_random_numbers_are_drawn(model):
    models.freeze_all_but(model, ("all",))
    state = torch.get_rng_state()
    assert folding.fold(model, SIZE, "no") == 0
    models.freeze_all_but(model, ("head",))
    assert folding.fold(model, SIZE, "no") == 20
    assert torch.equal(torch.get_rng_state(), state)


def test_timms_norms_keep_their_activation(images):
    model = timm.create_model("mobilenetv3_small_050", num_classes=10)
    models.freeze_all_but(model, ("head",))
    norms = [module for module in model.modules() if type(module) is BatchNormAct2d]
    before = model.eval()(images)
    assert folding.fold(model, SIZE, "no") == len(norms) > 20
    torch.testing.assert_close(model(images), before, atol=1e-4, rtol=1e-3)


def test_batch_norms_of_the_head_are_folded_too(images):
    model = create("mobilenetv4_conv_small").requires_grad_(False)
    norms = [module for module in model.modules() if type(module) in folding.NORMS]
    before = model.eval()(images)
    assert folding.fold(model, SIZE, "no") == len(norms)
    assert "forward" in vars(model.norm_head)
    torch.testing.assert_close(model(images), before, atol=1e-4, rtol=1e-3)


def test_features_may_be_a_list():
    model, images = create("efficientvim_m1").requires_grad_(False), torch.randn(2, 3, 64, 64)
    before = model.eval()(images)
    assert folding.fold(model, (64, 64), "no") > 20
    torch.testing.assert_close(model(images), before, atol=1e-4, rtol=1e-3)


class Small(nn.Module):
    """A convolution with a bias, and its batch norm."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3)
        nn.init.constant_(self.norm.weight, 3)
        nn.init.constant_(self.norm.bias, 1)

    def forward_features(self, images):
        return self.norm(self.conv(images))

    def forward_head(self, features, pre_logits):
        assert pre_logits
        return features


class Again(Small):
    """Both used a second time."""

    def forward_features(self, images):
        return super().forward_features(super().forward_features(images))


@pytest.mark.parametrize("kind", [Small, Again])
def test_a_bias_is_folded_too_and_a_convolution_may_be_used_again(kind, images):
    torch.manual_seed(0)
    model = kind().requires_grad_(False).eval()
    before = model.forward_features(images)
    assert folding.fold(model, SIZE, "no") == 1
    torch.testing.assert_close(model.forward_features(images), before, atol=1e-4, rtol=1e-4)


class Branching(Small):
    """The convolution's output goes past its batch norm, too."""

    def forward_features(self, images):
        out = self.conv(images)
        return out + self.norm(out)


class Twice(Small):
    """Another batch norm after another use of the same convolution."""

    def __init__(self):
        super().__init__()
        self.other = nn.BatchNorm2d(3)
        nn.init.constant_(self.other.weight, 2)

    def forward_features(self, images):
        return self.norm(self.conv(images)) + self.other(self.conv(images))


@pytest.mark.parametrize("kind", [Branching, Twice])
def test_a_model_that_folding_would_change_stays_as_it_is(kind, images):
    model = kind().requires_grad_(False).eval()
    before = model.forward_features(images)
    assert folding.fold(model, SIZE, "no") == 0
    assert torch.equal(model.forward_features(images), before)
