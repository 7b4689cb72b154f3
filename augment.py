"""From uint8 batches to what the model sees: resizing, augmentation, normalisation. Batched, on the device.

Two separate modules, one for training and one for evaluation, share nothing that can be switched: the report's scripts
set the validation transform on a dataset object that both splits shared, and so trained without augmentation.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config import Config


class Normalize(nn.Module):
    """uint8 images (B, 3, H, W) to normalised float32, brought to `image_size` pixels a side first if that is given."""

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...], image_size: int | None = None):
        super().__init__()
        self.image_size = image_size
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        images = (self.augment(self._resize(images.float() / 255)) - self.mean) / self.std
        return images.contiguous(memory_format=torch.channels_last)  # the faster layout for convolutions

    def augment(self, images: Tensor) -> Tensor:
        """Images in [0, 1] to images in [0, 1]; here, unchanged."""
        return images

    def _resize(self, images: Tensor) -> Tensor:
        size = (self.image_size, self.image_size)
        if self.image_size is None or images.shape[-2:] == size:
            return images
        return F.interpolate(images, size, mode="bilinear", antialias=True)


class ReportAugment(Normalize):
    """The report's training augmentation, with its own random draw for each image, then `Normalize`.

    Colour jitter of up to 20 % in brightness, saturation and contrast; a crop after padding by an eighth of the size
    (4 pixels of 32), a horizontal flip and a rotation of up to 15 degrees. What applies one after the other is composed
    first, so that each image is coloured once and resampled once; what comes from outside it is black.
    """

    JITTER = 0.2  # of brightness, saturation and contrast, each a factor around 1
    SHIFT = 1 / 8  # of the image's height and width, in whole pixels
    ROTATION = math.radians(15)

    @torch.no_grad()
    def augment(self, images: Tensor) -> Tensor:
        # All draws at once and on the images' device, which nobody has to wait for.
        brightness, saturation, contrast, angle, flip, *shift = torch.rand(7, len(images), device=images.device)
        factors = (1 + self.JITTER * (2 * factor - 1) for factor in (brightness, saturation, contrast))
        images = jitter(images, *factors)
        angle = self.ROTATION * (2 * angle - 1)
        most = [round(self.SHIFT * side) for side in images.shape[-2:]]
        down, right = (((2 * pixels + 1) * draw).floor() - pixels for pixels, draw in zip(most, shift, strict=True))
        return warp(images, angle, flip < 0.5, down, right)


def jitter(images: Tensor, brightness: Tensor, saturation: Tensor, contrast: Tensor) -> Tensor:
    """Scale brightness, then saturation (distance from grey), then contrast (distance from the mean grey), by image.

    As each of the three is linear they make one linear map, clamped to [0, 1] at its end.

    Args:
        images: (B, 3, H, W) in [0, 1].
        brightness, saturation, contrast: factors (B,); 1 leaves an image as it is.
    """
    brightness, saturation, contrast = (factor.view(-1, 1, 1, 1) for factor in (brightness, saturation, contrast))
    red, green, blue = images.split(1, dim=1)
    grey = 0.299 * red + 0.587 * green + 0.114 * blue  # ITU-R BT.601
    offset = (1 - saturation) * grey + (1 / contrast - 1) * grey.mean((2, 3), keepdim=True)
    return (images * saturation).add_(offset).mul_(contrast * brightness).clamp_(0, 1)


def warp(images: Tensor, angle: Tensor, flip: Tensor, down: Tensor, right: Tensor) -> Tensor:
    """Crop, flip and rotate in one resampling (B, 3, H, W) that takes the nearest pixel; outside the image it is 0.

    Args:
        angle: (B,) radians, counter-clockwise.
        flip: (B,) bool, horizontally.
        down, right: (B,) pixels by which the cropped window is moved from the image's place.
    """
    height, width = images.shape[-2:]
    sign = torch.where(flip, -1.0, 1.0)
    cos, sin = angle.cos(), angle.sin()
    # From an output pixel to where it comes from, in units in which each side goes from -1 to 1.
    column = torch.stack([sign * cos, -sign * sin * height / width, 2 * right / width], dim=1)
    row = torch.stack([sin * width / height, cos, 2 * down / height], dim=1)
    grid = F.affine_grid(torch.stack([column, row], dim=1), images.shape, align_corners=False)
    # Nearest, as torchvision's RandomRotation: interpolation blurs 32x32 pixels so much that a model trained on them
    # sees other batch statistics than in evaluation, and loses three points of top-1 (docs/performance.md).
    return F.grid_sample(images, grid, mode="nearest", padding_mode="zeros", align_corners=False)


def build(config: Config, cfg: dict, device: torch.device) -> tuple[Normalize, Normalize]:
    """The pair (for training, for evaluation).

    Args:
        cfg: the model's `pretrained_cfg`; its mean and std are those that its weights were trained with.
    """
    mean, std, image_size = cfg["mean"], cfg["std"], config.data.image_size
    evaluation = Normalize(mean, std, image_size).to(device)
    if config.augment.policy == "none":
        return evaluation, evaluation
    return ReportAugment(mean, std, image_size).to(device), evaluation
