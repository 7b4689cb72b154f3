import copy
import pickle
import platform
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


PACKS = platform.machine() in ("x86_64", "AMD64") and torch.backends.mkldnn.is_available()
PACKS = PACKS and all(hasattr(torch.ops.mkldnn, name) for name in smallmaps.OPERATIONS)
packing = pytest.mark.skipif(
    not (PACKS and torch.ops.mkldnn._is_mkldnn_bf16_supported()), reason="kernels are packed for bf16 on x86 alone"
)


@packing
@pytest.mark.parametrize("kernel, stride, padding, size", [case[:4] for case in GEOMETRIES if case[4]])
@pytest.mark.parametrize("bias", [True, False])
def test_packed_kernels_compute_the_convolution(kernel, stride, padding, size, bias):
    torch.manual_seed(0)
    conv = smallmaps.as_products(nn.Conv2d(6, 5, kernel, stride, padding, bias=bias)).requires_grad_(False)
    conv.to(torch.bfloat16)
    weight = smallmaps.mark_constant(conv.weight.to(memory_format=torch.channels_last))
    parameters = [parameter.float() for parameter in conv.parameters()]
    for batch in (8, 3):  # the last batch is smaller
        images = torch.randn(batch, 6, *size).contiguous(memory_format=torch.channels_last)
        exact = nn.functional.conv2d(images, *parameters, stride=stride, padding=padding)
        got = conv._conv_forward(images, weight, conv.bias)
        assert len(weight.packed) == 1 and got.dtype == torch.bfloat16
        torch.testing.assert_close(got.float(), exact, atol=0.02, rtol=0.02)


@packing
@pytest.mark.parametrize("machine, dtype", [("aarch64", torch.bfloat16), ("x86_64", torch.float32)])
def test_kernels_are_packed_only_where_that_was_measured(monkeypatch, machine, dtype):
    monkeypatch.setattr(platform, "machine", lambda: machine)
    assert not hasattr(smallmaps.mark_constant(torch.ones(1, 1, 1, 1, dtype=dtype)), "packed")


@packing
def test_maps_of_each_size_have_kernels_of_their_own():
    conv = smallmaps.as_products(nn.Conv2d(6, 5, 3, 2, 1)).requires_grad_(False).to(torch.bfloat16)
    weight = smallmaps.mark_constant(conv.weight.clone())
    for size in ((2, 2), (1, 2), (2, 1), (2, 2)):
        images = torch.randn(4, 6, *size, dtype=torch.bfloat16)
        torch.testing.assert_close(conv._conv_forward(images, weight, conv.bias), conv(images))
    assert set(weight.packed) == {(2, 2), (1, 2), (2, 1)}


@pytest.fixture
def folded():
    """A folded bf16 ResNet before a head that trains, four images, and packed kernels of its, which are none yet."""
    torch.manual_seed(0)
    model = smallmaps.as_products(timm.create_model("resnet26", num_classes=10, zero_init_last=False))
    models.freeze_all_but(model, ("head",))
    assert folding.fold(model, (32, 32), "bf16")
    with torch.autocast("cpu", torch.bfloat16):
        yield model, torch.randn(4, 3, 32, 32), model.layer4[0].conv1.forward.weight.packed


@packing
def test_kernels_packed_in_validation_serve_in_training(folded):
    model, images, packed = folded
    with torch.inference_mode():
        before = model(images)
    assert packed
    logits = model(images)
    torch.testing.assert_close(logits, before)
    nn.functional.cross_entropy(logits.float(), torch.arange(4)).backward()
    assert model.fc.weight.grad.norm() > 0


@packing
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_of_a_model_with_packed_kernels_computes_the_same(folded, copied):
    model, images, packed = folded
    before = model(images)
    assert packed
    torch.testing.assert_close(copied(model)(images), before)


@packing
def test_gradients_pass_through_constant_weights():
    gradients = []
    for small_maps in (lambda model: model, smallmaps.as_products):
        torch.manual_seed(0)
        model = small_maps(timm.create_model("resnet26", num_classes=10, zero_init_last=False))
        models.freeze_all_but(model, ("layer1", "head"))
        assert folding.fold(model, (32, 32), "bf16")
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(torch.randn(4, 3, 32, 32))
        logits.float().square().sum().backward()
        gradients.append(model.layer1[0].conv1.weight.grad)
    assert (gradients[1] - gradients[0]).norm() < 0.05 * gradients[0].norm()


@packing
def test_torch_compile_meets_no_packed_kernels(folded):
    """Its default backend fails on kernels that it did not pack itself."""
    model, images, packed = folded
    before, codes = model(images), []
    assert packed
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=lambda graph, _: codes.append(graph.code) or graph, fullgraph=True)
    torch.testing.assert_close(compiled(images), before, atol=0.05, rtol=0.05)
    (code,) = codes
    assert code.count("_nn.linear(") > 10 and "mkldnn" not in code


def test_a_model_that_is_dropped_is_gone():
    """Memory is tried out with models that are thrown away."""
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
        products.clear()
        forwards = [vars(module).get("forward") for module in each.modules()]
        constants = [forward.weight for forward in forwards if isinstance(forward, folding._FoldedConv)]
        train_mode(each)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            logits = each(images)
        nn.functional.cross_entropy(logits.float(), labels).backward()
        gradients.append(torch.cat([part.grad.flatten() for part in each.parameters() if part.requires_grad]))
    packed = sum(len(getattr(weight, "packed", ())) for weight in constants)
    assert len(products) + packed == 16, "eight frozen ones, layer4's seven, and the head"
    assert (gradients[1] - gradients[0]).norm() < tolerance * gradients[0].norm()
    assert list(each.state_dict()) == list(model.state_dict())
