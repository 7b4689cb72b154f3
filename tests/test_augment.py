import pytest
import torch

import augment
from config import check

CFG = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4)}


def pair(size=(32, 32), **sections):
    tree = {"phases": {"a": {"modules": "all", "epochs": 1, "lr": 1}}} | sections
    return augment.build(check(tree, "test"), CFG, size, torch.device("cpu"))


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


def padding(training, height, width):
    """How many rows and columns of padding the crop shows at the most, over many draws."""
    cropped = training.policy[0](torch.ones(512, 3, height, width))[:, 0]
    empty_rows, empty_columns = (cropped.amax(2) == 0).sum(1), (cropped.amax(1) == 0).sum(1)
    return empty_rows.max().item(), empty_columns.max().item()


@pytest.mark.parametrize("size", [(32, 32), (24, 40)])
def test_image_size_resizes_on_the_device_and_padding_follows(images, size):
    training, evaluation = pair(size, data={"image_size": 64})
    batch = torch.zeros(2, 3, *size, dtype=torch.uint8)
    assert training(batch).shape == evaluation(batch).shape == (2, 3, 64, 64)
    assert padding(training, 64, 64) == (8, 8)


def test_other_sizes_and_shapes_are_cropped_to_themselves():
    training, _ = pair((48, 64))
    assert padding(training, 48, 64) == (6, 8)
    assert training(torch.zeros(2, 3, 48, 64, dtype=torch.uint8)).shape == (2, 3, 48, 64)


def test_the_random_generator_decides(images):
    training, _ = pair()
    torch.manual_seed(5)
    first = training(images)
    torch.manual_seed(5)
    torch.testing.assert_close(training(images), first, rtol=0, atol=0)
