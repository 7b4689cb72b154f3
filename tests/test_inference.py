import torch

from inference import views


def test_views():
    images = torch.arange(2 * 3 * 32 * 32, dtype=torch.float32).view(2, 3, 32, 32)
    assert [view is images for view in views(images, None)] == [True]
    flips = views(images, "flips")
    assert len(flips) == 2
    assert torch.equal(flips[1], images.flip(3))
    shifts = views(images, "shifts")
    assert len(shifts) == 6
    assert all(view.shape == images.shape for view in shifts)
    lower_right, upper_left = shifts[2], shifts[3]
    assert torch.equal(lower_right[:, :, 2:, 2:], images[:, :, :-2, :-2])
    assert torch.equal(upper_left[:, :, :-2, :-2], images[:, :, 2:, 2:])
