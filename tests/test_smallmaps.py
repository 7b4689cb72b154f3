import copy
import weakref

import pytest
import timm
import torch
from torch import nn

import folding
import models
import smallmaps
from engine import train_mode

GEOMETRIES = [  # kernel, stride, padding, size of the maps, whether that is a product
    (1, 1, 0, (4, 4), True),
    (1, 2, 0, (3, 4), True),
    (1, (2, 1), 0, (4, 3), True),
    (1, 1, 0, (4, 5), False),  # more than 16 pixels
    (1, 1, 1, (2, 2), False),
    (3, 1, 1, (1, 1), True),
    (3, 2, 1, (2, 2), True),
    (3, 2, 1, (1, 2), True),
    (3, 1, 0, (3, 3), True),
    (3, 2, 0, (4, 4), True),  # the last row and column are not seen
    (5, 4, 2, (4, 3), True),
    (7, 1, 3, (1, 1), True),
    ((3, 1), 1, (1, 0), (1, 1), True),
    (3, 1, 1, (2, 2), False),
    (3, 1, 1, (1, 2), False),
]


@pytest.fixture
def products(monkeypatch):
    """How many matrix products there were."""
    counted, linear = [], smallmaps.F.linear
    monkeypatch.setattr(smallmaps.F, "linear", lambda *given: counted.append(given) or linear(*given))
    return counted


@pytest.mark.parametrize("kernel, stride, padding, size, as_product", GEOMETRIES)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("bias", [True, False])
def test_outputs_and_gradients_are_the_convolutions(kernel, stride, padding, size, as_product, layout, bias, products):
    torch.manual_seed(0)
    conv = nn.Conv2d(6, 5, kernel, stride, padding, bias=bias).double()
    other = smallmaps.as_products(copy.deepcopy(conv))
    images = torch.randn(3, 6, *size, dtype=torch.double).contiguous(memory_format=layout)
    given, given_other = images.clone().requires_grad_(), images.clone().requires_grad_()
    out, out_other = conv(given), other(given_other)
    assert bool(products) == as_product
    torch.testing.assert_close(out_other, out)
    weights = torch.randn_like(out)
    (out * weights).sum().backward()
    (out_other * weights).sum().backward()
    torch.testing.assert_close(given_other.grad, given.grad)
    for parameter, parameter_other in zip(conv.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(parameter_other.grad, parameter.grad)


@pytest.mark.parametrize("kernel, stride, padding, size", [case[:4] for case in GEOMETRIES if case[4]])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("bias", [True, False])
def test_packed_kernels_compute_the_convolution(kernel, stride, padding, size, dtype, tolerance, bias):
    torch.manual_seed(0)
    conv = smallmaps.as_products(nn.Conv2d(6, 5, kernel, stride, padding, bias=bias)).requires_grad_(False)
    weight = smallmaps.constant(conv.weight.to(dtype, memory_format=torch.channels_last))
    if not hasattr(weight, "packed"):
        pytest.skip(f"no packed kernels of {dtype} on this machine")
    for batch in (8, 3):  # the last batch is smaller
        images = torch.randn(batch, 6, *size).contiguous(memory_format=torch.channels_last)
        expected = nn.functional.conv2d(images, conv.weight, conv.bias, stride, padding)
        got = conv._conv_forward(images, weight, None if conv.bias is None else conv.bias.to(dtype))
        assert list(weight.packed) == [size] and got.dtype == dtype
        torch.testing.assert_close(got.float(), expected, atol=tolerance, rtol=tolerance)


def test_maps_of_each_size_have_kernels_of_their_own():
    conv = smallmaps.as_products(nn.Conv2d(6, 5, 3, 2, 1)).requires_grad_(False)
    weight = smallmaps.constant(conv.weight.clone())
    for size in ((2, 2), (1, 2), (2, 1), (2, 2)):
        images = torch.randn(4, 6, *size)
        torch.testing.assert_close(conv._conv_forward(images, weight, conv.bias), conv(images))


@pytest.fixture
def folded():
    """A ResNet with folded convolutions of small maps, and the packed kernels of one of them, still empty."""
    torch.manual_seed(0)
    model = smallmaps.as_products(timm.create_model("resnet26", num_classes=10, zero_init_last=False))
    models.freeze_all_but(model, ("head",))
    assert folding.fold(model, (32, 32), "no")
    packed = getattr(model.layer4[0].conv1.forward.weight, "packed", None)
    if packed is None:
        pytest.skip("oneDNN is not in this build of torch")
    return model, packed


def test_kernels_packed_in_validation_serve_in_training(folded):
    model, packed = folded
    images = torch.randn(4, 3, 32, 32)
    with torch.inference_mode():
        before = model(images)
    assert packed
    logits = model(images)
    torch.testing.assert_close(logits, before)
    nn.functional.cross_entropy(logits, torch.arange(4)).backward()
    assert model.fc.weight.grad.norm() > 0


def test_a_copy_of_a_model_with_packed_kernels_computes_the_same(folded):
    model, packed = folded
    images = torch.randn(4, 3, 32, 32)
    before = model(images)
    assert packed
    torch.testing.assert_close(copy.deepcopy(model)(images), before)


def test_gradients_pass_through_constant_weights():
    torch.manual_seed(0)
    gradients = []
    for small_maps in (lambda model: model, smallmaps.as_products):
        torch.manual_seed(0)
        model = small_maps(timm.create_model("resnet26", num_classes=10, zero_init_last=False))
        models.freeze_all_but(model, ("layer1", "head"))
        assert folding.fold(model, (32, 32), "no")
        model(torch.randn(4, 3, 32, 32)).square().sum().backward()
        gradients.append(model.layer1[0].conv1.weight.grad)
    assert gradients[0].norm() > 0
    torch.testing.assert_close(gradients[1], gradients[0], atol=1e-4, rtol=1e-3)


def test_torch_compile_meets_no_packed_kernels(folded):
    """Its default backend takes them from no one but itself."""
    model, packed = folded
    images = torch.randn(4, 3, 32, 32)
    model(images)
    assert packed
    codes = []
    torch._dynamo.reset()
    torch.compile(model, backend=lambda graph, _: codes.append(graph.code) or graph)(images)
    assert "linear" in "".join(codes) and "mkldnn" not in "".join(codes)


def test_a_model_that_is_dropped_is_gone():
    """A best epoch's weights are written from a copy, and memory is tried out with models that are thrown away."""
    conv = smallmaps.as_products(nn.Conv2d(2, 2, 1))
    copied = copy.deepcopy(conv)
    gone = weakref.ref(copied)
    del copied
    assert gone() is None and conv(torch.ones(1, 2, 1, 1)).shape == (1, 2, 1, 1)


@pytest.mark.parametrize(
    "odd", [{"groups": 2}, {"dilation": 2}, {"padding_mode": "reflect", "padding": 1}, {"padding": "same"}]
)
def test_what_is_no_plain_convolution_stays_one(odd, products):
    conv = nn.Conv2d(4, 4, 3 if "padding" in odd else 1, **odd)
    images = torch.randn(2, 4, 3, 3)
    before = conv(images)
    assert torch.equal(smallmaps.as_products(conv)(images), before) and not products


@pytest.mark.parametrize("precision, tolerance", [("no", 1e-4), ("bf16", 3e-3)])
def test_a_resnets_folded_and_trained_convolutions_learn_the_same(precision, tolerance, products):
    torch.manual_seed(0)
    model = timm.create_model("resnet26", num_classes=10)
    images, labels = torch.randn(8, 3, 32, 32), torch.arange(8)
    gradients = []
    for each in (model, smallmaps.as_products(copy.deepcopy(model))):
        models.freeze_all_but(each, ("layer4", "head"))
        assert folding.fold(each, (32, 32), precision)
        train_mode(each)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            logits = each(images)
        nn.functional.cross_entropy(logits.float(), labels).backward()
        gradients.append(torch.cat([part.grad.flatten() for part in each.parameters() if part.requires_grad]))
    assert len(products) > 10
    assert (gradients[1] - gradients[0]).norm() < tolerance * gradients[0].norm()
    assert list(each.state_dict()) == list(model.state_dict())
