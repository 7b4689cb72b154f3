"""From uint8 batches to what the model sees: resizing, augmentation, normalisation, mixing. Batched, on the device.

Two separate modules, one for training and one for evaluation, share nothing that can be switched: the report's scripts
set the validation transform on a dataset object that both splits shared, and so trained without augmentation.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config import Config
from errors import USAGE, UserError
from metrics import IGNORED


class Normalize(nn.Module):
    """uint8 images (B, 3, H, W) to normalised float32, brought to `image_size` pixels a side if that is given.

    With `distorts` they go through `distort` once they are augmented.
    """

    def __init__(
        self, mean: tuple[float, ...], std: tuple[float, ...], image_size: int | None = None, distorts: bool = False
    ):
        super().__init__()
        self.image_size, self.distorts = image_size, distorts
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        images = (self.prepare(images.float() / 255) - self.mean) / self.std
        return images.contiguous(memory_format=torch.channels_last)  # the faster layout for convolutions

    def prepare(self, images: Tensor) -> Tensor:
        """Images in [0, 1] to such of the size that the model sees, augmented and distorted while they are small."""
        if self.image_size and self.image_size > max(images.shape[-2:]):
            return self._resize(self._changed(images))
        return self._changed(self._resize(images))

    def augment(self, images: Tensor) -> Tensor:
        """Images in [0, 1] to images in [0, 1]; here, unchanged."""
        return images

    def _changed(self, images: Tensor) -> Tensor:
        images = self.augment(images)
        return distort(images) if self.distorts else images

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
        return warp(images, angle=angle, flip=flip < 0.5, **crop(images, self.SHIFT, *shift))


class AugMix(Normalize):
    """A padded crop and a flip as in the report, then AugMix (Hendrycks et al., 2020), then `Normalize`.

    Each image is blended with a blend of three chains, of one to three operations each, of itself: shapes and colours
    vary, and the image stays recognisable. Operations and strengths are the authors' for CIFAR; their consistency loss,
    which takes each image three times, is left out. Pixels are the nearest ones, and shears are about the centre.

    No operation is one of the corruptions that robustness is judged by (corruptions.py); brightness and contrast, which
    the report's jitter changes, are.
    """

    CHAINS = 3
    DEPTH = 3  # operations in a chain, at the most
    STRENGTH = 0.01, 0.3  # of an operation's largest

    @torch.no_grad()
    def augment(self, images: Tensor) -> Tensor:
        count, device = len(images), images.device
        flip, down, right, share = torch.rand(4, count, device=device)
        images = warp(images, flip=flip < 0.5, **crop(images, ReportAugment.SHIFT, down, right))
        chains = images.repeat(self.CHAINS, 1, 1, 1)
        depth = torch.randint(1, self.DEPTH + 1, (len(chains), 1, 1, 1), device=device)
        least, most = self.STRENGTH
        for done in range(self.DEPTH):
            operation = torch.randint(len(OPERATIONS), (len(chains),), device=device)
            strength = least + (most - least) * torch.rand(len(chains), device=device)
            chains = torch.where(done < depth, operate(chains, operation, strength), chains)
        weights = torch.empty(count, self.CHAINS, device=device).exponential_()  # normalised: Dirichlet(1, 1, 1)
        weights = weights / weights.sum(1, keepdim=True)
        blend = torch.einsum("bk,kbchw->bchw", weights, chains.unflatten(0, (self.CHAINS, count)))
        return images.lerp(blend, share.view(-1, 1, 1, 1))


OPERATIONS = (
    "autocontrast",
    "equalize",
    "posterize",
    "solarize",
    "rotate",
    "shear_x",
    "shear_y",
    "translate_x",
    "translate_y",
)


def operate(images: Tensor, operation: Tensor, strength: Tensor) -> Tensor:
    """One of AugMix's operations on each image, batched: first one resampling for all, then one table of colours each.

    Args:
        images: (B, 3, H, W) in [0, 1].
        operation: (B,) indices into OPERATIONS.
        strength: (B,) in [0, 1]. At 1 it rotates by 30 degrees, shears by 0.3, moves by a third of the side (either
            way), leaves no bits, and inverts all.
    """
    is_ = {name: operation == index for index, name in enumerate(OPERATIONS)}
    height, width = images.shape[-2:]
    signed = strength * (2.0 * torch.randint(2, strength.shape, device=images.device) - 1)
    images = warp(
        images,
        angle=math.radians(30) * signed * is_["rotate"],
        shear_x=0.3 * signed * is_["shear_x"],
        shear_y=0.3 * signed * is_["shear_y"],
        right=(width / 3 * signed).round() * is_["translate_x"],
        down=(height / 3 * signed).round() * is_["translate_y"],
    )
    levels = (255 * images).round().long().flatten(2)  # (B, 3, H * W)
    counts = torch.zeros(*levels.shape[:2], 256, device=images.device)
    counts.scatter_add_(2, levels, torch.ones((), device=images.device).expand_as(levels))
    strength, is_ = strength.view(-1, 1, 1), {name: chosen.view(-1, 1, 1) for name, chosen in is_.items()}
    table = torch.arange(256.0, device=images.device).expand_as(counts)  # from old levels to new ones
    table = torch.where(is_["autocontrast"], stretched(counts), table)
    table = torch.where(is_["equalize"], equalised(counts), table)
    step = 2 ** (4 + (4 * strength).floor())
    table = torch.where(is_["posterize"], (table / step).floor() * step, table)
    table = torch.where(is_["solarize"] & (table >= 256 * (1 - strength)), 255 - table, table)
    return table.gather(2, levels).view_as(images) / 255


def stretched(counts: Tensor) -> Tensor:
    """Autocontrast: the table (B, 3, 256) that spreads each channel's levels from 0 to 255, given its histogram."""
    levels, there = torch.arange(256.0, device=counts.device), counts > 0
    lowest = torch.where(there, levels, 255).amin(2, keepdim=True)
    highest = torch.where(there, levels, 0).amax(2, keepdim=True)
    spread = ((levels - lowest) * 255 / (highest - lowest).clamp(min=1)).floor().clamp(0, 255)
    return torch.where(highest > lowest, spread, levels)


def equalised(counts: Tensor) -> Tensor:
    """Equalization: the table (B, 3, 256) that makes each channel's histogram even, as far as whole levels can be."""
    levels, there = torch.arange(256.0, device=counts.device), counts > 0
    highest = torch.where(there, levels, 0).amax(2, keepdim=True)
    step = ((counts.sum(2, keepdim=True) - counts.gather(2, highest.long())) / 255).floor()
    below = counts.cumsum(2) - counts
    even = ((below + (step / 2).floor()) / step.clamp(min=1)).floor().clamp(0, 255)
    return torch.where(step > 0, even, levels)


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


def crop(images: Tensor, most: float, down: Tensor, right: Tensor) -> dict[str, Tensor]:
    """Whole pixels by which a crop, after padding by `most` of each side, is moved, from uniform draws (B,)."""
    pixels = {"down": round(most * images.shape[-2]), "right": round(most * images.shape[-1])}
    draws = {"down": down, "right": right}
    return {name: ((2 * pixels[name] + 1) * draws[name]).floor() - pixels[name] for name in pixels}


def warp(images: Tensor, angle=0.0, flip=False, down=0.0, right=0.0, shear_x=0.0, shear_y=0.0) -> Tensor:
    """Crop, flip, rotate, shear (B, 3, H, W) in one resampling that takes the nearest pixel; outside the image it is 0.

    Args, each (B,) or one for all:
        angle: radians, counter-clockwise.
        flip: whether to mirror horizontally.
        down, right: pixels by which the cropped window is moved from the image's place.
        shear_x, shear_y: pixels by which a column, or row, is moved for each pixel along it.
    """
    height, width = images.shape[-2:]
    given = (angle, flip, down, right, shear_x, shear_y)
    # Numbers are filled in on the device: copied to it, they would have to wait for all that it is still computing.
    angle, flip, down, right, shear_x, shear_y = (
        value if isinstance(value, Tensor) else torch.full((len(images),), value, device=images.device)
        for value in given
    )
    sign = torch.where(flip, -1.0, 1.0)
    cos, sin = angle.cos(), angle.sin()
    # From an output pixel to where it comes from, in units in which each side goes from -1 to 1.
    column = torch.stack([sign * cos, (shear_x - sign * sin) * height / width, 2 * right / width], dim=1)
    row = torch.stack([(shear_y + sin) * width / height, cos, 2 * down / height], dim=1)
    grid = F.affine_grid(torch.stack([column, row], dim=1), images.shape, align_corners=False)
    # Nearest, as torchvision's RandomRotation: interpolation blurs 32x32 pixels so much that a model trained on them
    # sees other batch statistics than in evaluation, and loses three points of top-1 (docs/performance.md).
    return F.grid_sample(images, grid, mode="nearest", padding_mode="zeros", align_corners=False)


# ---- distorting -----------------------------------------------------------------------------------------------------

SPECKLE = 0.3  # the strongest noise's standard deviation, of each value
BLUR = 1 / 32  # the strongest blur's sigma, of the shorter side: a pixel of 32


@torch.no_grad()
def distort(images: Tensor) -> Tensor:
    """Speckle noise on a quarter of the images and a Gaussian blur on another, of a strength drawn for each.

    Neither is one of the 15 corruptions that robustness is the mean over: they are two of the four that were meant for
    tuning (`corruptions.MEAN_15`). They are relatives of the noises and blurs among the 15, though.

    Args:
        images: (B, 3, H, W) in [0, 1], and so is what is returned.
    """
    which, strength = torch.rand(2, len(images), 1, 1, 1, device=images.device)
    noisy = (images + images * SPECKLE * strength * torch.randn_like(images)).clamp(0, 1)
    blurred = blur(images, BLUR * min(images.shape[-2:]) * strength)
    return torch.where(which < 0.25, noisy, torch.where(which < 0.5, blurred, images))


def blur(images: Tensor, sigma: Tensor) -> Tensor:
    """A Gaussian blur of (B, 3, H, W) by its own sigma (B, 1, 1, 1), in pixels, for each; outside the image is nothing.

    As one matrix for the rows and one for the columns: with a sigma of its own for each image a convolution would be
    one for each, too, and would need a width to be cut off at.
    """
    sigma = sigma.clamp(min=0.1)  # which blurs nothing

    def weights(side: int) -> Tensor:  # of each pixel of a line, (side, side) for each image; each row's sum is 1
        places = torch.arange(side, device=images.device)
        return (-0.5 * ((places[:, None] - places) / sigma) ** 2).softmax(-1)

    height, width = images.shape[-2:]
    return weights(height) @ images @ weights(width).mT


# ---- mixing ---------------------------------------------------------------------------------------------------------


def mixup(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Blend each image with its partner, as `mixed` takes and returns them. Zhang et al. (2018), alpha 0.2."""
    alpha = torch.full((len(images), 1, 1, 1), 0.2, device=images.device)
    # Unchecked, because to check values is to wait for the device.
    return mixed(images, labels, torch.distributions.Beta(alpha, alpha, validate_args=False).sample())


def cutmix(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Paste a box of its partner into half of the images; as `mixed` takes and returns it. Yun et al. (2019), alpha 1.

    The box has the image's shape, a uniform area and a uniform centre, and is cut off at the border.
    """
    count, _, height, width = images.shape
    area, centre_y, centre_x, used = torch.rand(4, count, 1, device=images.device)
    half = torch.where(used < 0.5, area.sqrt(), 0) / 2  # of the box's side, which is a share of the image's
    rows = (torch.arange(height, device=images.device) + 0.5) / height
    columns = (torch.arange(width, device=images.device) + 0.5) / width
    box = ((rows - centre_y).abs() < half)[:, None, :, None] & ((columns - centre_x).abs() < half)[:, None, None, :]
    return mixed(images, labels, 1 - box.float())


MIX = {"none": None, "mixup": mixup, "cutmix": cutmix}  # by augment.mix


def mixing(name: str, micro_batch_size: int) -> Callable | None:
    """What `augment.mix` names; UserError if there is no other image to mix one with."""
    if name != "none" and micro_batch_size == 1:
        raise UserError(
            f"augment.mix {name}: with 1 image per forward pass (data.batch_size, data.micro_batch_size, processes) "
            "there is no other to mix it with",
            USAGE,
        )
    return MIX[name]


def mixed(images: Tensor, labels: Tensor, own: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mix each image with its partner, the one at its place when their order is reversed: one in the middle is its own.

    Where either could not be decoded nothing is mixed, as what is black counts for no loss.

    Args:
        images: (B, 3, H, W), normalised or not: mixing is linear.
        labels: (B,); IGNORED where an image could not be decoded.
        own: which share of each pixel is the image's own, in [0, 1]; (B, 1, H, W), or (B, 1, 1, 1) for all alike.

    Returns:
        The images; the labels (B,) that they are of besides, IGNORED where nothing was mixed; and which share (B,) of
        each is its own.
    """
    others = labels.flip(0).masked_fill(labels == IGNORED, IGNORED)
    own = own.masked_fill((others == IGNORED).view(-1, 1, 1, 1), 1)
    return own * images + (1 - own) * images.flip(0), others, own.mean((1, 2, 3))


def build(config: Config, cfg: dict, device: torch.device) -> tuple[Normalize, Normalize]:
    """The pair (for training, for evaluation).

    Args:
        cfg: the model's `pretrained_cfg`; its mean and std are those that its weights were trained with.
    """
    mean, std, image_size = cfg["mean"], cfg["std"], config.data.image_size
    training = {"none": Normalize, "report": ReportAugment, "augmix": AugMix}[config.augment.policy]
    training = training(mean, std, image_size, config.augment.distort)
    return training.to(device), Normalize(mean, std, image_size).to(device)
