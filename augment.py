"""From uint8 batches to what the model sees: resizing, augmentation, normalisation, mixing. Batched, on the device.

Training and evaluation have separate modules and share nothing that can be switched: the report's scripts set the
validation transform on a dataset object that both splits shared, and so trained without augmentation.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config import Config
from errors import USAGE, UserError
from metrics import IGNORED


def layout(device: torch.device) -> torch.memory_format:
    """The memory layout of images for a device's convolutions: channels_last, the faster one, but for Apple's GPUs.

    There torch has computed wrong numbers from it again and again (pytorch issues 175189, 180984).
    """
    return torch.contiguous_format if device.type == "mps" else torch.channels_last


class Normalize(nn.Module):
    """uint8 images (B, 3, H, W) to normalised float32, resized to `image_size` pixels a side if that is given.

    With `distorts` they go through `distort` after augmentation.
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
        return images.contiguous(memory_format=layout(images.device))

    def prepare(self, images: Tensor) -> Tensor:
        """Resize, augment and distort images in [0, 1]; enlarging comes last, so they are augmented while small."""
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
    (4 pixels of 32), a horizontal flip and a rotation of up to 15 degrees. Successive steps are composed first, so that
    each image is recoloured once and resampled once; pixels from outside it are black.
    """

    JITTER = 0.2  # most that brightness, saturation and contrast factors differ from 1
    SHIFT = 1 / 8  # of height and width, rounded to whole pixels
    ROTATION = math.radians(15)

    @torch.no_grad()
    def augment(self, images: Tensor) -> Tensor:
        # Draw all at once on the images' device, so that nothing waits for a copy.
        brightness, saturation, contrast, angle, flip, *shift = torch.rand(7, len(images), device=images.device)
        factors = (1 + self.JITTER * (2 * factor - 1) for factor in (brightness, saturation, contrast))
        images = jitter(images, *factors)
        angle = self.ROTATION * (2 * angle - 1)
        down, right = crop_offsets(images, self.SHIFT, *shift)
        return warp(images, angle=angle, flip=flip < 0.5, down=down, right=right)


class AugMix(Normalize):
    """A padded crop and a flip as in the report, then AugMix (Hendrycks et al., 2020), then `Normalize`.

    Each image is blended with a mixture of three chains, each of one to three operations on it: shapes and colours
    vary, and the image stays recognisable. Operations and strengths are the authors' for CIFAR, but translations round
    to whole pixels where theirs truncate; their consistency loss, which takes each image three times, is left out.
    Resampling is to the nearest pixel; shears are about the centre.

    No operation is among the corruptions that robustness is judged by (corruptions.py); brightness and contrast, which
    the report's jitter changes, are.
    """

    CHAINS = 3
    DEPTH = 3  # most operations in a chain
    STRENGTH = 0.01, 0.3  # range, as a share of the maximum

    @torch.no_grad()
    def augment(self, images: Tensor) -> Tensor:
        count, device = len(images), images.device
        flip, *shift, share = torch.rand(4, count, device=device)
        down, right = crop_offsets(images, ReportAugment.SHIFT, *shift)
        images = warp(images, flip=flip < 0.5, down=down, right=right)
        # Shuffling stands for drawing: a third of the chains ends after each step, and every operation gets a ninth of
        # those that go on, instead of computing all operations for all. Each chain's distribution is AugMix's, though
        # chains of one batch depend slightly on each other. Extra chains make their number divisible.
        multiple = len(OPERATIONS) * self.DEPTH
        total = math.ceil(self.CHAINS * count / multiple) * multiple
        chosen = torch.arange(total, device=device)
        chains = images[chosen % count]
        least, most = self.STRENGTH
        for going_on in range(self.DEPTH, 0, -1):
            chosen = chosen[torch.rand(len(chosen), device=device).argsort()][: total * going_on // self.DEPTH]
            strength = least + (most - least) * torch.rand(len(chosen), device=device)
            chains[chosen] = operate(chains[chosen], strength)
        chains = chains[: self.CHAINS * count].unflatten(0, (self.CHAINS, count))
        weights = torch.empty(count, self.CHAINS, device=device).exponential_()  # once normalised, Dirichlet(1, 1, 1)
        weights = weights / weights.sum(1, keepdim=True)
        return images.lerp(torch.einsum("bk,kbchw->bchw", weights, chains), share.view(-1, 1, 1, 1))


MOVES = ("rotate", "shear_x", "shear_y", "translate_x", "translate_y")
OPERATIONS = (*MOVES, "autocontrast", "equalize", "posterize", "solarize")


def operate(images: Tensor, strength: Tensor) -> Tensor:
    """AugMix's operations, each on its share of the images: the first ninth is rotated, and so on as in OPERATIONS.

    Args:
        images: (B, 3, H, W) in [0, 1]; B is a multiple of 9.
        strength: (B,) in [0, 1]. At 1: rotate by 30 degrees, shear by 0.3, translate by a third of the side (all three
            either way), posterize to no bits, solarize (invert) everything.
    """
    share = len(images) // len(OPERATIONS)
    moved, others = images[: len(MOVES) * share], images[len(MOVES) * share :]
    height, width = images.shape[-2:]
    signed = strength[: len(moved)] * (2.0 * torch.randint(2, (len(moved),), device=images.device) - 1)
    # Each move's strengths, 0 for the images of the other moves.
    own = torch.eye(len(MOVES), device=images.device).repeat_interleave(share, dim=1) * signed
    rotate, shear_x, shear_y, translate_x, translate_y = own
    moved = warp(
        moved,
        angle=math.radians(30) * rotate,
        shear_x=0.3 * shear_x,
        shear_y=0.3 * shear_y,
        right=(width / 3 * translate_x).round(),
        down=(height / 3 * translate_y).round(),
    )
    contrasted, equalised, posterised, solarised = (255 * others).round().chunk(4)
    *_, posterising, solarising = strength.view(-1, 1, 1, 1).chunk(len(OPERATIONS))
    step = 2 ** (4 + (4 * posterising).floor())
    recoloured = (
        autocontrast(contrasted),
        equalize(equalised),
        (posterised / step).floor() * step,
        torch.where(solarised >= 256 * (1 - solarising), 255 - solarised, solarised),
    )
    return torch.cat([moved, *(levels / 255 for levels in recoloured)])


def autocontrast(levels: Tensor) -> Tensor:
    """Spread each channel's `levels` (B, 3, H, W), whole numbers, from 0 to 255, unless it has only one."""
    lowest, highest = levels.amin((2, 3), keepdim=True), levels.amax((2, 3), keepdim=True)
    spread = ((levels - lowest) * 255 / (highest - lowest).clamp(min=1)).floor()
    return torch.where(highest > lowest, spread, levels)


def equalize(levels: Tensor) -> Tensor:
    """Make the histogram of each channel's `levels` (B, 3, H, W), whole numbers from 0 to 255, as even as can be."""
    shape, levels = levels.shape, levels.long().flatten(2)
    counts = torch.zeros(*shape[:2], 256, device=levels.device)
    counts.scatter_add_(2, levels, torch.ones((), device=levels.device).expand_as(levels))
    step = ((counts.sum(2, keepdim=True) - counts.gather(2, levels.amax(2, keepdim=True))) / 255).floor()
    below = counts.cumsum(2) - counts
    even = ((below + (step / 2).floor()) / step.clamp(min=1)).floor().clamp(0, 255)
    table = torch.where(step > 0, even, torch.arange(256.0, device=levels.device))
    return table.gather(2, levels).view(shape)


def jitter(images: Tensor, brightness: Tensor, saturation: Tensor, contrast: Tensor) -> Tensor:
    """Scale each image's brightness, then saturation (distance from grey), then contrast (from the mean grey).

    All three are linear, so they combine into one linear map, clamped to [0, 1] once at the end.

    Args:
        images: (B, 3, H, W) in [0, 1].
        brightness, saturation, contrast: factors (B,); 1 leaves an image as it is.
    """
    brightness, saturation, contrast = (factor.view(-1, 1, 1, 1) for factor in (brightness, saturation, contrast))
    red, green, blue = images.split(1, dim=1)
    grey = 0.299 * red + 0.587 * green + 0.114 * blue  # ITU-R BT.601
    offset = (1 - saturation) * grey + (1 / contrast - 1) * grey.mean((2, 3), keepdim=True)
    return (images * saturation).add_(offset).mul_(contrast * brightness).clamp_(0, 1)


def crop_offsets(images: Tensor, most: float, *draws: Tensor) -> list[Tensor]:
    """Offsets down and right (B,) in whole pixels of a crop after padding by the share `most` of each side.

    Args:
        draws: two, uniform in [0, 1), each (B,).
    """
    pads = [round(most * side) for side in images.shape[-2:]]
    return [((2 * pad + 1) * draw).floor() - pad for pad, draw in zip(pads, draws, strict=True)]


def warp(images: Tensor, angle=0.0, flip=False, down=0.0, right=0.0, shear_x=0.0, shear_y=0.0) -> Tensor:
    """Crop, flip, rotate, shear (B, 3, H, W) in one nearest-pixel resampling; pixels from outside the image are 0.

    Args, each (B,) or one for all:
        angle: radians, counter-clockwise.
        flip: whether to mirror horizontally.
        down, right: pixels by which the crop window is shifted.
        shear_x, shear_y: pixels that a column (or row) shifts sideways per pixel along it.
    """
    count, (height, width), device = len(images), images.shape[-2:], images.device
    given = (angle, flip, down, right, shear_x, shear_y)
    # Fill numbers in on the device: a copy to it would wait for everything it is still computing.
    angle, flip, down, right, shear_x, shear_y = (
        (value if isinstance(value, Tensor) else torch.full((count,), value, device=device)).view(-1, 1, 1)
        for value in given
    )
    sign, cos, sin = torch.where(flip, -1.0, 1.0), angle.cos(), angle.sin()
    # An output pixel's place, in coordinates that run from -1 to 1 along each side, and where it comes from (B, H, W).
    x = (2 * torch.arange(width, device=device) + 1) / width - 1
    y = ((2 * torch.arange(height, device=device) + 1) / height - 1)[:, None]
    from_x = sign * cos * x + 2 * right / width + (shear_x - sign * sin) * height / width * y
    from_y = (shear_y + sin) * width / height * x + 2 * down / height + cos * y
    grid = torch.stack([from_x, from_y], dim=-1)
    # Nearest, as in torchvision's RandomRotation: interpolation blurs 32x32 images so much that batch statistics differ
    # between training and evaluation, which costs three points of top-1 (docs/performance.md).
    return F.grid_sample(images, grid, mode="nearest", padding_mode="zeros", align_corners=False)


# ---- distorting -----------------------------------------------------------------------------------------------------

SPECKLE = 0.3  # standard deviation of the strongest noise, relative to each value
BLUR = 1 / 32  # sigma of the strongest blur, relative to the shorter side: 1 pixel of 32


@torch.no_grad()
def distort(images: Tensor) -> Tensor:
    """Add speckle noise to a quarter of the images and blur another quarter (Gaussian), each at a random strength.

    Neither is among the 15 corruptions that robustness averages over: they are two of the four meant for tuning
    (`corruptions.MEAN_15`). They are relatives of the noises and blurs among the 15, though.

    Args:
        images: (B, 3, H, W) in [0, 1], like the result.
    """
    which, strength = torch.rand(2, len(images), 1, 1, 1, device=images.device)
    noisy = (images + images * SPECKLE * strength * torch.randn_like(images)).clamp(0, 1)
    blurred = blur(images, BLUR * min(images.shape[-2:]) * strength)
    return torch.where(which < 0.25, noisy, torch.where(which < 0.5, blurred, images))


def blur(images: Tensor, sigma: Tensor) -> Tensor:
    """Gaussian blur of (B, 3, H, W), each image with its own sigma (B, 1, 1, 1) in pixels; nothing outside counts.

    Two matrix products, for rows and for columns: a convolution would need a kernel per image, and a width to truncate
    it at.
    """
    sigma = sigma.clamp(min=0.1)  # too small to blur anything

    def weights(side: int) -> Tensor:  # (B, 1, side, side): weights of a line's pixels in each; rows sum to 1
        places = torch.arange(side, device=images.device)
        return (-0.5 * ((places[:, None] - places) / sigma) ** 2).softmax(-1)

    height, width = images.shape[-2:]
    return weights(height) @ images @ weights(width).mT


# ---- mixing ---------------------------------------------------------------------------------------------------------


def mixup(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Blend each image with its partner; takes and returns what `mixed` does. Zhang et al. (2018), alpha 0.2."""
    alpha = torch.full((len(images), 1, 1, 1), 0.2, device=images.device)
    # Unvalidated, because checking values waits for the device.
    return mixed(images, labels, torch.distributions.Beta(alpha, alpha, validate_args=False).sample())


def cutmix(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Paste a box of its partner into half of the images; returns what `mixed` does. Yun et al. (2019), alpha 1.

    The box has the image's aspect ratio, a uniform area and a uniform centre, and is clipped at the border.
    """
    count, _, height, width = images.shape
    area, centre_y, centre_x, used = torch.rand(4, count, 1, device=images.device)
    half = torch.where(used < 0.5, area.sqrt(), 0) / 2  # half the box's side, as a share of the image's
    rows = (torch.arange(height, device=images.device) + 0.5) / height
    columns = (torch.arange(width, device=images.device) + 0.5) / width
    box = ((rows - centre_y).abs() < half)[:, None, :, None] & ((columns - centre_x).abs() < half)[:, None, None, :]
    return mixed(images, labels, 1 - box.float())


MIX = {"none": None, "mixup": mixup, "cutmix": cutmix}  # by augment.mix


def mixing(name: str, micro_batch_size: int) -> Callable | None:
    """The function that `augment.mix` names; UserError if there is no other image to mix with."""
    if name != "none" and micro_batch_size == 1:
        raise UserError(
            f"augment.mix {name}: with 1 image per forward pass (data.batch_size, data.micro_batch_size, processes) "
            "there is no other to mix it with",
            USAGE,
        )
    return MIX[name]


def mixed(images: Tensor, labels: Tensor, own: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mix each image with its partner: the one in its place if the batch is reversed (a middle one is its own).

    Nothing is mixed if either could not be decoded: the black image that stands for it counts for no loss.

    Args:
        images: (B, 3, H, W), normalised or not: mixing is linear.
        labels: (B,); IGNORED where an image could not be decoded.
        own: share of each pixel that is the image's own, in [0, 1]; (B, 1, H, W), or (B, 1, 1, 1) for all pixels alike.

    Returns:
        The mixed images; the partners' labels (B,), IGNORED where either was not decoded; and lambda (B,), the share of
        each image that is its own.
    """
    others = labels.flip(0).masked_fill(labels == IGNORED, IGNORED)
    own = own.masked_fill((others == IGNORED).view(-1, 1, 1, 1), 1)
    return own * images + (1 - own) * images.flip(0), others, own.mean((1, 2, 3))


def build(config: Config, cfg: dict, device: torch.device) -> tuple[Normalize, Normalize]:
    """The pair of modules (for training, for evaluation).

    Args:
        cfg: the model's `pretrained_cfg`, with the mean and std that its weights were trained with.
    """
    mean, std, image_size = cfg["mean"], cfg["std"], config.data.image_size
    training = {"none": Normalize, "report": ReportAugment, "augmix": AugMix}[config.augment.policy]
    training = training(mean, std, image_size, config.augment.distort)
    return training.to(device), Normalize(mean, std, image_size).to(device)
