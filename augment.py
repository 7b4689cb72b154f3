"""From uint8 batches to what the model sees: resizing, augmentation, normalisation. Batched, on the device.

Two separate modules, one for training and one for evaluation, share nothing that can be switched: the report's scripts
set the validation transform on a dataset object that both splits shared, and so trained without augmentation.
"""

import kornia.augmentation as K
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
        return (self.augment(self._resize(images.float() / 255)) - self.mean) / self.std

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

    A random crop after padding by an eighth of the size (4 pixels of 32), a horizontal flip, colour jitter of 0.2 in
    brightness, contrast and saturation, a rotation of up to 15 degrees. Only the order of the three colour changes is
    drawn once per batch.

    Args:
        size: height and width in pixels of the images after resizing.
    """

    def __init__(self, mean, std, image_size: int | None, size: tuple[int, int]):
        super().__init__(mean, std, image_size)
        self.policy = nn.Sequential(
            K.RandomCrop(size, padding=(size[1] // 8, size[0] // 8)),  # columns, then rows
            K.RandomHorizontalFlip(p=0.5),
            K.ColorJitter(brightness=0.2, contrast=0.2, saturation=0.2, p=1.0),
            K.RandomRotation(degrees=15.0, p=1.0),
        )

    @torch.no_grad()
    def augment(self, images: Tensor) -> Tensor:
        return self.policy(images)


def build(config: Config, cfg: dict, size: tuple[int, int], device: torch.device) -> tuple[Normalize, Normalize]:
    """The pair (for training, for evaluation).

    Args:
        cfg: the model's `pretrained_cfg`; its mean and std are those that its weights were trained with.
        size: height and width in pixels of the stored images.
    """
    mean, std, image_size = cfg["mean"], cfg["std"], config.data.image_size
    evaluation = Normalize(mean, std, image_size).to(device)
    if config.augment.policy == "none":
        return evaluation, evaluation
    size = (image_size, image_size) if image_size else size
    return ReportAugment(mean, std, image_size, size).to(device), evaluation
