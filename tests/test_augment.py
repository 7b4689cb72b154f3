import math

import pytest
import torch
from PIL import ImageOps
from torchvision.transforms.v2 import functional as TF

import augment
import corruptions
from errors import UserError
from metrics import IGNORED
from recipe import check

CFG = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4)}


def pair(**sections):
    tree = {"phases": {"a": {"modules": "all", "epochs": 1, "lr": 1}}} | sections
    return augment.build(check(tree, "test"), CFG, torch.device("cpu"))


@pytest.fixture
def images():
    return torch.randint(0, 256, (16, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def normalised(images):
    mean, std = (torch.tensor(CFG[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    return (images / 255 - mean) / std


def test_evaluation_normalises_and_changes_nothing_else(images):
    _, evaluation = pair()
    torch.testing.assert_close(evaluation(images), normalised(images))


def test_training_augments_while_evaluation_does_not_whatever_the_mode(images):
    """The report's fault: one shared transform, switched to validation's for training too."""
    training, evaluation = pair()
    for mode in (True, False):
        training.train(mode), evaluation.train(mode)
        assert not torch.allclose(training(images), normalised(images), atol=0.1)
        torch.testing.assert_close(evaluation(images), normalised(images))


def test_policy_none_is_evaluations(images):
    training, _ = pair(augment={"policy": "none"})
    torch.testing.assert_close(training(images), normalised(images))


def test_each_image_has_its_own_random_draw(images):
    training, _ = pair()
    same = images[:1].repeat(64, 1, 1, 1)
    out = training(same).flatten(1)
    assert len(torch.unique(out, dim=0)) == 64


def test_augmented_pixels_stay_within_the_images_range(images):
    training, _ = pair()
    low, high = normalised(torch.zeros_like(images)), normalised(torch.full_like(images, 255))
    out = training(images)
    assert out.dtype == torch.float32
    assert out.shape == images.shape
    assert (out >= low - 1e-4).all()
    assert (out <= high + 1e-4).all()


def test_the_augmentation_is_as_strong_as_the_report_says():
    """A white square on black: how far its centre moves, and how its brightness varies, is what the report allows."""
    torch.manual_seed(0)
    image = torch.zeros(512, 3, 32, 32, dtype=torch.uint8)
    image[:, :, 12:20, 12:20] = 200
    training, _ = pair()
    out = training(image) * torch.tensor(CFG["std"]).view(1, 3, 1, 1) + torch.tensor(CFG["mean"]).view(1, 3, 1, 1)
    weight = out.mean(1)
    rows = torch.arange(32.0)
    centre = (weight.sum(2) * rows).sum(1) / weight.sum((1, 2))
    assert 3 < (centre - 15.5).abs().max() < 6, "a crop with 4 pixels of padding, and a rotation"
    brightest = out.amax((1, 2, 3))
    assert brightest.min() < 0.72 < 0.85 < brightest.max() <= 1.0


def padding(monkeypatch, size, **sections):
    """How many rows and columns of padding the crop shows at the most, over many draws."""
    monkeypatch.setattr(augment.ReportAugment, "ROTATION", 0.0)
    training, _ = pair(**sections)
    white = torch.full((512, 3, *size), 255, dtype=torch.uint8)
    shown = training(white)[:, 0] > (0.5 - CFG["mean"][0]) / CFG["std"][0]  # half of it: resizing blends the border
    lost_rows, lost_columns = ((~shown.any(dim)).sum(1) for dim in (2, 1))
    return lost_rows.max().item(), lost_columns.max().item()


@pytest.mark.parametrize("size", [(32, 32), (24, 40)])
def test_image_size_resizes_on_the_device_and_padding_follows(monkeypatch, size):
    training, evaluation = pair(data={"image_size": 64})
    batch = torch.zeros(2, 3, *size, dtype=torch.uint8)
    assert training(batch).shape == evaluation(batch).shape == (2, 3, 64, 64)
    assert padding(monkeypatch, size, data={"image_size": 64}) == (8, 8)


def test_other_sizes_and_shapes_are_cropped_to_themselves(monkeypatch):
    training, _ = pair()
    assert padding(monkeypatch, (48, 64)) == (6, 8)
    assert training(torch.zeros(2, 3, 48, 64, dtype=torch.uint8)).shape == (2, 3, 48, 64)


def test_the_random_generator_decides(images):
    training, _ = pair()
    torch.manual_seed(5)
    first = training(images)
    torch.manual_seed(5)
    torch.testing.assert_close(training(images), first, rtol=0, atol=0)


@pytest.mark.parametrize("what", ["brightness", "saturation", "contrast"])
def test_jitter_is_torchvisions(images, what):
    reference = {name: getattr(TF, f"adjust_{name}") for name in ("brightness", "saturation", "contrast")}[what]
    factors = torch.linspace(0.8, 1.2, len(images))
    ones = torch.ones(len(images))
    given = {"brightness": ones, "saturation": ones, "contrast": ones} | {what: factors}
    expected = torch.stack(
        [reference(image, factor.item()) for image, factor in zip(images / 255, factors, strict=True)]
    )
    torch.testing.assert_close(augment.jitter(images / 255, **given), expected, atol=2e-3, rtol=0)


def test_jitter_composes_the_three():
    images = 0.3 + 0.4 * torch.rand(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))  # where nothing clamps
    brightness, saturation, contrast = (torch.linspace(low, 2 - low, 8) for low in (0.9, 0.8, 1.2))
    one_by_one = torch.stack(
        [
            TF.adjust_contrast(TF.adjust_saturation(TF.adjust_brightness(image, b.item()), s.item()), c.item())
            for image, b, s, c in zip(images, brightness, saturation, contrast, strict=True)
        ]
    )
    torch.testing.assert_close(augment.jitter(images, brightness, saturation, contrast), one_by_one, atol=2e-3, rtol=0)


def test_warp_is_a_crop_then_a_flip_then_a_rotation():
    """Against torchvision's with its default, the nearest pixel: the same pixels, but for ties and the border."""
    image = torch.rand(3, 24, 32, generator=torch.Generator().manual_seed(0))
    for degrees, flipped, down, right in (
        (12.0, False, 2, -3),
        (-7.0, True, -3, 4),
        (0.0, True, 0, 0),
        (15.0, True, 1, 1),
    ):
        out = augment.warp(
            image[None],
            torch.tensor([math.radians(degrees)]),
            torch.tensor([flipped]),
            torch.tensor([float(down)]),
            torch.tensor([float(right)]),
        )[0]
        expected = TF.crop(TF.pad(image, [4, 3]), 3 + down, 4 + right, 24, 32)
        expected = TF.rotate(TF.hflip(expected) if flipped else expected, degrees)
        inner = (slice(None), slice(8, 16), slice(10, 22))
        assert (out[inner] == expected[inner]).float().mean() > 0.98


def test_warp_blurs_nothing(images):
    """Interpolated training images would be smoother than those that are evaluated: it cost three points of top-1."""
    draws = torch.rand(4, len(images), generator=torch.Generator().manual_seed(0))
    angle, flip, down, right = draws - 0.5, draws[1] < 0.5, (8 * draws[2]).floor() - 4, (8 * draws[3]).floor() - 4
    out = augment.warp(images / 255, angle[0], flip, down, right)
    for image, warped in zip(images / 255, out, strict=True):
        assert torch.isin(warped, torch.cat([image.flatten(), torch.zeros(1)])).all()


def test_a_warp_that_does_nothing_changes_nothing(images):
    zeros = torch.zeros(len(images))
    out = augment.warp(images / 255, zeros, zeros.bool(), zeros, zeros)
    torch.testing.assert_close(out, images / 255, atol=1e-5, rtol=0)


def operated(images, name, strength=0.3):
    each = (images / 255).repeat(len(augment.OPERATIONS), 1, 1, 1)
    changed = augment.operate(each, torch.full((len(each),), strength))
    return changed.chunk(len(augment.OPERATIONS))[augment.OPERATIONS.index(name)]


@pytest.mark.parametrize(
    ("name", "reference"),
    [
        ("autocontrast", ImageOps.autocontrast),
        ("equalize", ImageOps.equalize),
        ("posterize", lambda image: ImageOps.posterize(image, 3)),
        ("solarize", lambda image: ImageOps.solarize(image, 180)),
    ],
)
def test_augmixs_colours_are_pils(images, name, reference):
    dull = (40 + images.float().pow(2) / 65025 * 150).to(torch.uint8)  # neither the whole range, nor evenly
    dull[0] = 7  # of one level alone
    dull[1, :, :20] = images[1, :, :20]  # from 0 to 255
    expected = torch.stack([TF.pil_to_tensor(reference(TF.to_pil_image(image))) for image in dull])
    changed = (255 * operated(dull, name)).round()
    assert (changed - expected).abs().max() <= 1, "PIL computes in other precision"
    assert (changed == expected).float().mean() > 0.98


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("translate_x", lambda image: TF.affine(image, 0, [3, 0], 1.0, [0.0, 0.0])),
        ("translate_y", lambda image: TF.affine(image, 0, [0, 3], 1.0, [0.0, 0.0])),
        ("rotate", lambda image: TF.rotate(image, 9)),
        ("shear_x", lambda image: TF.affine(image, 0, [0, 0], 1.0, [math.degrees(math.atan(0.09)), 0.0])),
        ("shear_y", lambda image: TF.affine(image, 0, [0, 0], 1.0, [0.0, math.degrees(math.atan(0.09))])),
    ],
)
def test_augmixs_shapes_are_torchvisions_either_way(name, expected):
    image = torch.zeros(1, 1, 32, 32)
    image[:, :, 8:20, 10:14] = 255  # nothing that looks alike the other way
    image[:, :, 18:20, 10:24] = 255
    mirror = {"translate_y": TF.vflip}.get(name, TF.hflip)
    out = operated(image.expand(64, 3, -1, -1), name)[:, :1]
    forth, back = expected(image[0]) / 255, mirror(expected(mirror(image[0]))) / 255
    near = torch.stack([(out - way).abs().mean((1, 2, 3)) for way in (forth, back)])
    assert (near.amin(0) < 0.01).all(), "but for ties"
    assert set(near.argmin(0).tolist()) == {0, 1}


def test_augmix_blends_and_stays_within_the_images_range(images):
    training, evaluation = pair(augment={"policy": "augmix"})
    out = training(images) * torch.tensor(CFG["std"]).view(1, 3, 1, 1) + torch.tensor(CFG["mean"]).view(1, 3, 1, 1)
    assert out.shape == images.shape
    assert out.min() > -1e-4
    assert out.max() < 1 + 1e-4
    torch.testing.assert_close(evaluation(images), normalised(images))
    same = training(images[:1].repeat(64, 1, 1, 1)).flatten(1)
    assert len(torch.unique(same, dim=0)) == 64
    assert pair(augment={"policy": "augmix"}, data={"image_size": 64})[0](images).shape == (16, 3, 64, 64)


@pytest.mark.parametrize("policy", ["report", "augmix"])
@pytest.mark.parametrize("side", [16, 32, 64])
def test_what_is_enlarged_is_augmented_before(monkeypatch, policy, side):
    training, _ = pair(augment={"policy": policy}, data={"image_size": 32})
    seen, real = [], training.augment
    monkeypatch.setattr(training, "augment", lambda images: (seen.append(images.shape[-1]), real(images))[1])
    training(torch.zeros(2, 3, side, side, dtype=torch.uint8))
    assert seen == [min(side, 32)]


@pytest.mark.parametrize("count", [1, 9, 3000])
def test_augmix_draws_as_its_authors_do(monkeypatch, count):
    """One to three operations in a chain, equally often; strengths from a hundredth to three tenths."""
    torch.manual_seed(0)
    strengths = []

    def brighter(images, strength):
        assert len(images) % 9 == 0
        strengths.append(strength)
        return images + 1.0

    monkeypatch.setattr(augment, "operate", brighter)
    mix = augment.AugMix((0, 0, 0), (1, 1, 1))
    draws = 3000 // count
    mixed = torch.cat([mix.augment(torch.zeros(count, 3, 4, 4))[:, 0, 0, 0] for _ in range(draws)])
    strengths = torch.cat(strengths)
    assert len(strengths) == 2 * math.ceil(3 * count / 27) * 27 * draws
    assert 0.01 <= strengths.min() < 0.011 < 0.299 < strengths.max() <= 0.3
    # A blend of chains of depth 1, 2 or 3 has depth 2 on average, and half of it is the image itself.
    assert mixed.mean() == pytest.approx(1.0, abs=0.05)
    assert mixed.var() == pytest.approx(4 / 12 + 2 / 3 / 2 / 3, rel=0.15)  # of the share, and of depths and weights


def test_any_operation_falls_to_any_image_and_step(monkeypatch):
    """Whatever its place in the batch, each equally often."""
    torch.manual_seed(0)
    seen = torch.zeros(3, 9, 9)  # by step, operation and image

    def look(images, strength):
        step = {27: 0, 18: 1, 9: 2}[len(images)]
        for operation, share in enumerate(images[:, 0, 0, 0].round().long().chunk(9)):
            seen[step, operation] += share.bincount(minlength=9)
        return images

    monkeypatch.setattr(augment, "operate", look)
    monkeypatch.setattr(augment, "warp", lambda images, **_: images)
    images = torch.arange(9.0).view(9, 1, 1, 1).expand(9, 3, 4, 4)
    for _ in range(600):
        augment.AugMix((0, 0, 0), (1, 1, 1)).augment(images)
    for step, expected in zip(seen, (200, 400 / 3, 200 / 3), strict=True):
        assert (step - expected).abs().max() < 5 * expected**0.5


# ---- distorting -----------------------------------------------------------------------------------------------------


def test_what_training_images_are_distorted_by_is_not_what_robustness_is_judged_by():
    assert {"speckle_noise", "gaussian_blur"} <= set(corruptions.NAMES) - set(corruptions.MEAN_15)


def test_a_quarter_is_noisy_and_a_quarter_blurred():
    torch.manual_seed(0)
    columns = 0.25 + 0.5 * (torch.arange(32) // 4 % 2).expand(2000, 3, 32, 32)  # all rows of an image are alike
    out = augment.distort(columns)
    noisy = (out.std(2).amax((1, 2)) > 1e-4).float()
    changed = ((out - columns).abs().amax((1, 2, 3)) > 1e-4).float()
    assert noisy.mean() == pytest.approx(0.25, abs=0.03)
    assert (changed - noisy).mean() == pytest.approx(0.25 * 0.75, abs=0.03), "by less than a quarter pixel is none"
    assert out[changed == 0].allclose(columns[0], atol=1e-4)
    strengths = out[noisy == 1][:, :, :, :4].std((1, 2, 3)) / 0.25  # where nothing is cut off
    assert 0 < strengths.min() < 0.01 < 0.29 < strengths.max() < 0.33
    assert strengths.mean() == pytest.approx(0.15, abs=0.015)
    assert out.min() >= 0 and out.max() <= 1


def test_blurs_are_the_corruptions_each_of_its_own_sigma(images):
    sigmas = torch.tensor([0.0, 0.4, 0.7, 1.0])
    out = augment.blur(images[:4] / 255, sigmas.view(-1, 1, 1, 1))
    inner = (..., slice(6, -6), slice(6, -6))  # at the border there the outermost pixels are repeated
    for image, sigma, blurred in zip(images[:4] / 255, sigmas, out, strict=True):
        image = image.permute(1, 2, 0).numpy()
        expected = corruptions.gaussian_blur(image, None, sigma.item()) if sigma else image
        torch.testing.assert_close(
            blurred[inner], torch.from_numpy(expected).permute(2, 0, 1)[inner], atol=1e-3, rtol=0
        )
    flat = torch.full((1, 3, 24, 40), 0.3)
    torch.testing.assert_close(augment.blur(flat, torch.ones(1, 1, 1, 1)), flat)


@pytest.mark.parametrize("policy", ["report", "augmix", "none"])
def test_each_policys_training_images_are_distorted_and_no_others(monkeypatch, images, policy):
    seen = []
    monkeypatch.setattr(augment, "distort", lambda images: (seen.append(images.shape[-1]), images * 0)[1])
    training, evaluation = pair(augment={"policy": policy, "distort": True}, data={"image_size": 64})
    black = normalised(torch.zeros(16, 3, 64, 64))
    torch.testing.assert_close(training(images), black)
    assert seen == [32], "before they are enlarged"
    assert not evaluation(images).allclose(black)
    pair(augment={"policy": policy})[0](images)
    assert len(seen) == 1


# ---- mixing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mixup", "cutmix"])
def test_an_images_share_is_what_is_seen_of_it(name):
    torch.manual_seed(0)
    images = torch.ones(1000, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    images[:500] = 0  # each image's partner is one of the other half
    labels = torch.arange(1000)
    out, others, own = augment.MIX[name](images, labels)
    seen = out.mean((1, 2, 3))
    torch.testing.assert_close(seen, torch.where(labels < 500, 1 - own, own), atol=1e-5, rtol=0)
    assert others.equal(labels.flip(0))
    assert out.is_contiguous(memory_format=torch.channels_last)
    if name == "mixup":
        assert own.mean() == pytest.approx(0.5, abs=0.05)
        assert own.var() == pytest.approx(0.25 / 1.4, abs=0.02)  # of Beta(0.2, 0.2)
        assert out.flatten(1).std(1).max() < 1e-5
        assert len(own.unique()) > 700, "each draws for itself; at the ends numbers are few"
    else:
        assert out.unique().tolist() == [0, 1]
        assert (own == 1).float().mean() == pytest.approx(0.5, abs=0.05)
        assert own.min() < 0.25
        assert len(own.unique()) > 100


@pytest.mark.parametrize("name", ["mixup", "cutmix"])
def test_what_can_not_be_decoded_is_mixed_with_nothing(name, images):
    torch.manual_seed(0)
    labels = torch.arange(16)
    labels[[2, 5, 10]] = IGNORED  # 5 and 10 are each other's partners
    out, others, own = augment.MIX[name](images.float(), labels)
    alone = torch.tensor([2, 13, 5, 10])
    assert out[alone].equal(images[alone].float())
    assert (own[alone] == 1).all()
    assert (others[alone] == IGNORED).all()
    assert (out != images).flatten(1).any(1).sum() > 3


def test_one_image_has_no_partner_but_itself(images):
    out, others, _ = augment.cutmix(images[:1].float(), torch.tensor([7]))
    assert out.equal(images[:1].float()) and others.tolist() == [7]


@pytest.mark.parametrize("name", ["mixup", "cutmix"])
def test_one_image_has_no_other_to_be_mixed_with(name):
    assert augment.mixing("none", 1) is None
    assert augment.mixing(name, 2) is augment.MIX[name]
    with pytest.raises(UserError, match=f"augment.mix {name}: with 1 image per forward pass"):
        augment.mixing(name, 1)
