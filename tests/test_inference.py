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
    for shown, lower_right, upper_left in ((images, *shifts[2:4]), (images.flip(3), *shifts[4:])):
        assert torch.equal(lower_right[:, :, 2:, 2:], shown[:, :, :-2, :-2])
        assert torch.equal(upper_left[:, :, :-2, :-2], shown[:, :, 2:, 2:])
