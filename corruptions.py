"""Common image corruptions: 19 kinds in 5 severities, made from an image on the fly.

After Hendrycks and Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions and Perturbations" (ICLR
2019, arXiv:1903.12261), with the settings for images of CIFAR's size. Written from the definitions (glass blur
from what the authors' code does, which differs), and with different random draws: scores on these images are NOT
comparable with figures on the published files (CIFAR-10-C, CIFAR-100-C). Each docstring says where its corruption
departs from the published recipe; all of them round to 8 bits where that truncates, and draw only from the generator
they are given.

Inside, images are float32 (H, W, 3) in [0, 1]; `corrupt` clips the results. Lengths are in pixels and do not grow with
the image, unless a docstring says so. Blurs pad the image by repeating its edge pixels.
"""

import io
from collections.abc import Callable
from functools import cache

import numpy as np
from PIL import Image
from scipy import ndimage

SEVERITIES = (1, 2, 3, 4, 5)
GREY = np.array([0.299, 0.587, 0.114], dtype=np.float32)  # ITU-R BT.601
TURQUOISE = np.array([175, 238, 238], dtype=np.float32) / 255
BROWN = np.array([63, 42, 20], dtype=np.float32) / 255
ICE = np.array([0.82, 0.91, 1.0], dtype=np.float32)
RED = np.array([0, 1, 1], dtype=np.float32)  # its distance from white, by channel

# Raised whenever a corruption's distribution changes: figures of different versions are not comparable.
# 2: glass_blur is what the authors' code does, and elastic_transform's anchors are whole pixels.
VERSION = 2

_CORRUPTIONS: dict[str, tuple[Callable, tuple[tuple, ...]]] = {}


def corrupt(image: np.ndarray, name: str, severity: int, rng: np.random.Generator) -> np.ndarray:
    """A corrupted copy of an image, uint8 (H, W, 3), 8 pixels a side or more.

    All randomness is drawn from `rng`: the same state gives the same bytes (with the same NumPy, SciPy and Pillow).

    Args:
        name: one of `NAMES`.
        severity: 1 (mild) to 5.

    Raises:
        KeyError: no corruption has this name.
        ValueError: no such severity.
    """
    function, settings = _CORRUPTIONS[name]
    if severity not in SEVERITIES:
        raise ValueError(f"severity {severity} is none of {SEVERITIES}")
    return _to_bytes(function(image.astype(np.float32) / 255, rng, *settings[severity - 1]))


def _to_bytes(image: np.ndarray) -> np.ndarray:
    return np.rint(image.clip(0, 1) * 255).astype(np.uint8)


def _settings(*by_severity):
    """Register a corruption under its function's name with the arguments that follow (image, rng) at each severity."""

    def register(function):
        rows = tuple(row if isinstance(row, tuple) else (row,) for row in by_severity)
        _CORRUPTIONS[function.__name__] = function, rows
        return function

    return register


# ---- shared building blocks --------------------------------------------------------------------------------------


def _gaussian(image: np.ndarray, sigma: float) -> np.ndarray:
    """Blur (H, W) or (H, W, 3), each channel by itself; kernels end at 4 sigma."""
    return ndimage.gaussian_filter(image, sigma, mode="nearest", axes=(0, 1))


def _trail(image: np.ndarray, radius: int, sigma: float, degrees: float) -> np.ndarray:
    """Blur along a line to one side of each pixel: 2 * radius + 1 pixels weighted by the falling half of a Gaussian.

    This is ImageMagick's motion blur as documented; the published files were made with it.
    """
    height, width = image.shape[:2]
    reach = 2 * radius
    steps = np.arange(reach + 1)
    weights = np.exp(-0.5 * (steps / sigma) ** 2)
    weights = (weights / weights.sum()).astype(np.float32)
    angle = np.radians(degrees)
    rows, columns = reach + np.rint(np.outer([np.sin(angle), np.cos(angle)], steps)).astype(int)
    padded = np.pad(image, [(reach, reach), (reach, reach), (0, 0)][: image.ndim], mode="edge")
    # A kernel would be mostly zeros: adding shifted images is several times faster.
    return sum(
        weight * padded[row : row + height, column : column + width]
        for weight, row, column in zip(weights, rows, columns, strict=True)
    )


def _zoom(picture: Image.Image, factor: float) -> Image.Image:
    """The picture's centre, enlarged to the picture's size (bilinear)."""
    width, height = picture.size
    left, top = width * (1 - 1 / factor) / 2, height * (1 - 1 / factor) / 2
    box = (left, top, width - left, height - top)
    return picture.resize(picture.size, Image.Resampling.BILINEAR, box=box)


def _plasma(height: int, width: int, decay: float, rng: np.random.Generator) -> np.ndarray:
    """A fractal (H, W) from 0 to 1 by the diamond-square algorithm, on a torus.

    The grid is refined until it covers the image: each new point is the mean of its four neighbours (first those in
    the squares' centres, then those between) plus a uniform draw. The draw's range is divided by `decay` squared at
    each refinement: the larger the decay, the smoother the fractal.
    """
    grid, amplitude = np.zeros((1, 1), dtype=np.float32), 1.0
    while len(grid) < max(height, width):
        noise = amplitude * (2 * rng.random((3, *grid.shape), dtype=np.float32) - 1)
        below, right = np.roll(grid, -1, 0), np.roll(grid, -1, 1)
        centre = (grid + right + below + np.roll(below, -1, 1)) / 4 + noise[0]
        finer = np.empty((2 * len(grid), 2 * len(grid)), dtype=np.float32)
        finer[::2, ::2] = grid
        finer[1::2, 1::2] = centre
        finer[::2, 1::2] = (grid + right + centre + np.roll(centre, 1, 0)) / 4 + noise[1]
        finer[1::2, ::2] = (grid + below + centre + np.roll(centre, 1, 1)) / 4 + noise[2]
        grid, amplitude = finer, amplitude / decay**2
    return _stretch(grid[:height, :width])


def _stretch(layer: np.ndarray) -> np.ndarray:
    """Scale and shift to the range from 0 to 1."""
    return (layer - layer.min()) / np.ptp(layer)


# ---- noise -------------------------------------------------------------------------------------------------------


@_settings(0.04, 0.06, 0.08, 0.09, 0.10)
def gaussian_noise(image, rng, std):
    """Sensor noise in poor light: adds normal noise of standard deviation `std` to each value. As published."""
    return image + std * rng.standard_normal(image.shape, dtype=np.float32)


@_settings(500, 250, 100, 75, 50)
def shot_noise(image, rng, photons):
    """Photon noise: each value becomes a Poisson count, with mean `photons` for a value of 1. As published."""
    return rng.poisson(image * photons) / photons


@_settings(0.01, 0.02, 0.03, 0.05, 0.07)
def impulse_noise(image, rng, amount):
    """Salt and pepper, from bit errors: a fraction `amount` of the values (not pixels) becomes 0 or 1, half each.

    As published.
    """
    draw = rng.random(image.shape, dtype=np.float32)
    return np.where(draw < amount / 2, 0, np.where(draw < amount, 1, image))


# ---- blur --------------------------------------------------------------------------------------------------------


@cache
def _disc(radius: float, alias: float) -> np.ndarray:
    """A disc of the pixels centred within `radius`, smoothed by a Gaussian of sigma `alias`; it sums to 1."""
    reach = int(np.ceil(radius)) + 2
    y, x = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    disc = (np.hypot(x, y) <= radius).astype(np.float32)
    return ndimage.gaussian_filter(disc / disc.sum(), alias, mode="constant")


@_settings((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1))
def defocus_blur(image, rng, radius, alias):
    """Out of focus: each point becomes a disc of `radius` pixels, anti-aliased by a Gaussian of sigma `alias`.

    The published recipe cuts the Gaussian off at its 3x3 middle and mirrors the image at its border.
    """
    return ndimage.correlate(image, _disc(radius, alias)[..., None], mode="nearest")


@_settings((0.05, 1), (0.25, 1), (0.4, 1), (0.25, 2), (0.4, 2))
def glass_blur(image, rng, sigma, iterations):
    """Frosted glass: a Gaussian blur, then each pixel is replaced by one nearby, then the blur again.

    `iterations` times over, each pixel takes the value of itself, the one above, the one to the left, or the one above
    that, all equally likely; the first two rows and columns stay. As published: the authors mean to swap pixels up to
    one away, but their code assigns a view to itself, which copies, and draws from -1 and 0 alone.
    """
    image = _gaussian(image, sigma)
    rows, columns = np.indices(image.shape[:2])
    moves = (rows >= 2) & (columns >= 2)
    for _ in range(iterations):
        up, left = rng.integers(0, 2, (2, *moves.shape)) * moves
        image = image[rows - up, columns - left]
    return _gaussian(image, sigma)


@_settings((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5))
def motion_blur(image, rng, radius, sigma):
    """A moving camera: a blur along a line at an angle drawn from -45 to 45 degrees to the horizontal (`_trail`).

    The line is 2 * `radius` + 1 pixels long; its weights fall like a Gaussian of `sigma` pixels. The published files
    were made with ImageMagick, whose angles and rounding may differ.
    """
    return _trail(image, radius, sigma, rng.uniform(-45, 45))


@_settings(7, 12, 16, 21, 26)
def zoom_blur(image, rng, zooms):
    """A camera moving towards its object: the mean of the image and its centre enlarged 1.00, 1.01, 1.02... times.

    `zooms` counts the enlargements: the published ranges stop before 1.06, 1.11, 1.16, 1.21 and 1.26, but rounding
    includes the first two. The published recipe crops the centre to whole pixels.
    """
    picture = Image.fromarray(_to_bytes(image))
    total = np.asarray(picture, dtype=np.float32)
    for percent in range(100, 100 + zooms):
        total = total + np.asarray(_zoom(picture, percent / 100))
    return total / (255 * (zooms + 1))


# ---- weather -----------------------------------------------------------------------------------------------------


@_settings(
    (0.1, 0.2, 1, 0.6, 8, 3, 0.95),
    (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
    (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
    (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
    (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
)
def snow(image, rng, mean, std, zoom, threshold, radius, sigma, keep):
    """Falling snow: bright streaks over a whitened image.

    Flakes are normal noise (`mean`, `std`) enlarged `zoom` times, keeping only what exceeds `threshold`. They fall
    (`_trail` with `radius` and `sigma`) at an angle drawn from -135 to -45 degrees. A share `keep` of the image is
    kept, the rest is replaced by its grey version (times 1.5, plus 0.5) where that is brighter; the flakes and the
    flakes turned by 180 degrees are added. As published, except for details of the motion blur and for the
    enlargement, which is not cropped to whole pixels.
    """
    flakes = mean + std * rng.standard_normal(image.shape[:2], dtype=np.float32)
    flakes = np.asarray(_zoom(Image.fromarray(flakes), zoom))
    flakes = np.where(flakes < threshold, 0, flakes).clip(0, 1)
    flakes = _trail(flakes, radius, sigma, rng.uniform(-135, -45))[..., None]
    whitened = np.maximum(image, (image @ GREY)[..., None] * 1.5 + 0.5)
    return keep * image + (1 - keep) * whitened + flakes + flakes[::-1, ::-1]


@_settings((1, 0.2), (1, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45))
def frost(image, rng, keep, cover):
    """A frozen window: `keep` times the image plus `cover` times a picture of frost.

    The published recipe crops a photograph of frost at random; here the frost is generated. Needles of ice are sparse
    noise stretched in three directions, 60 degrees apart as in a crystal and randomly rotated; they stand on patches
    of ice that are thick where a fractal is high, with clearings where it is low.
    """
    height, width = image.shape[:2]
    radius, turn = 6, rng.uniform(0, 180)
    margin = 2 * radius  # needles grow into the image from outside, too
    seeds = rng.random((3, height + 2 * margin, width + 2 * margin), dtype=np.float32) ** 8
    needles = np.max([_trail(layer, radius, 4, turn + 60 * i) for i, layer in enumerate(seeds)], axis=0)
    patches = _plasma(height, width, 2, rng)
    ice = (_stretch(needles[margin:-margin, margin:-margin]) + 1.6 * patches - 0.6).clip(0, 1)
    return keep * image + cover * ice[..., None] * ICE


@_settings((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75))
def fog(image, rng, strength, decay):
    """Fog: `strength` times a fractal from 0 to 1 (`_plasma` with `decay`) is added, and the sum scaled back.

    The scale, brightest / (brightest + strength), keeps the image's brightest value as the upper limit. As published.
    """
    brightest = image.max()
    haze = strength * _plasma(*image.shape[:2], decay, rng)[..., None]
    return (image + haze) * brightest / (brightest + strength)


# ---- digital -----------------------------------------------------------------------------------------------------


@_settings(0.05, 0.1, 0.15, 0.2, 0.3)
def brightness(image, rng, shift):
    """Daylight: `shift` is added to the value (V of HSV, the largest of the three channels). As published.

    With hue and saturation kept, that scales each pixel's channels alike; black becomes grey.
    """
    value = image.max(-1, keepdims=True)
    brighter = np.minimum(value + shift, 1)
    return np.where(value > 0, image * brighter / np.maximum(value, 1e-6), brighter)


@_settings(0.75, 0.5, 0.4, 0.3, 0.15)
def contrast(image, rng, factor):
    """Contrast: each channel's distance from its mean over the image is multiplied by `factor`. As published."""
    mean = image.mean((0, 1))
    return (image - mean) * factor + mean


@_settings((0, 0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05), (0.1, 0.03, 0.03))
def elastic_transform(image, rng, alpha, sigma, affine):
    """Rubber: a random affine map, then a smooth random displacement of each pixel; bilinear, mirrored at the border.

    All settings are fractions of the image's shorter side. The affine map moves three points around the centre by up
    to `affine` in each direction. The displacement is uniform noise from -1 to 1, smoothed by a Gaussian of `sigma`,
    times `alpha`. The published recipe resamples twice; here both maps are composed, so that the image is blurred once.
    """
    height, width, channels = image.shape
    side = min(height, width)
    anchors = np.array([height, width]) // 2 + side // 3 * np.array([[1, 1], [1, -1], [-1, -1]])
    moved = anchors + rng.uniform(-affine * side, affine * side, anchors.shape)
    backward = np.linalg.solve(np.column_stack([moved, np.ones(3)]), anchors)  # factors of row, column, and 1
    field = rng.uniform(-1, 1, (2, height, width))
    shift = alpha * side * ndimage.gaussian_filter(field, sigma * side, mode="reflect", axes=(1, 2))
    where = np.tensordot(backward[:2].T, np.indices((height, width)) + shift, 1) + backward[2][:, None, None]
    return np.stack(
        [ndimage.map_coordinates(image[..., c], where, order=1, mode="reflect") for c in range(channels)], -1
    )


@_settings(0.95, 0.9, 0.85, 0.75, 0.65)
def pixelate(image, rng, scale):
    """Too few pixels: shrinks each side to `scale` with a box filter and enlarges it again. As published."""
    picture = Image.fromarray(_to_bytes(image))
    small = (int(picture.width * scale), int(picture.height * scale))
    back = picture.resize(small, Image.Resampling.BOX).resize(picture.size, Image.Resampling.BOX)
    return np.asarray(back, dtype=np.float32) / 255


@_settings(80, 65, 58, 50, 40)
def jpeg_compression(image, rng, quality):
    """Lossy compression: JPEG at `quality` (Pillow's scale and chroma subsampling). As published.

    The exact bytes depend on the JPEG library that Pillow was built with.
    """
    file = io.BytesIO()
    Image.fromarray(_to_bytes(image)).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file), dtype=np.float32) / 255


# ---- the other four ----------------------------------------------------------------------------------------------


@_settings(0.06, 0.1, 0.12, 0.16, 0.2)
def speckle_noise(image, rng, std):
    """Multiplicative noise: adds to each value itself times normal noise of `std`. As published."""
    return image + image * std * rng.standard_normal(image.shape, dtype=np.float32)


@_settings(0.4, 0.6, 0.7, 0.8, 1)
def gaussian_blur(image, rng, sigma):
    """A Gaussian blur of `sigma` pixels, each channel by itself. As published."""
    return _gaussian(image, sigma)


@_settings(
    (0.62, 0.1, 0.7, 0.7, 0.5, False),
    (0.65, 0.1, 0.8, 0.7, 0.5, False),
    (0.65, 0.3, 1, 0.69, 0.5, False),
    (0.65, 0.1, 0.7, 0.69, 0.6, True),
    (0.65, 0.1, 0.5, 0.68, 0.6, True),
)
def spatter(image, rng, mean, std, sigma, threshold, intensity, mud):
    """Splashes on the lens: of water (severities 1 to 3) or mud (4 and 5).

    Liquid is normal noise (`mean`, `std`) smoothed by a Gaussian of `sigma`; it lies where that exceeds `threshold`,
    with edges softened by the same Gaussian. Water adds pale turquoise times `intensity`; mud mixes the image with
    that share of brown. The published recipe shades water by the distance from the drops' edges, and has opaque mud
    but only where it is thick; this one is simpler, and so differs in strength.
    """
    liquid = mean + std * rng.standard_normal(image.shape[:2], dtype=np.float32)
    lies = (_gaussian(liquid, sigma) > threshold).astype(np.float32)
    cover = intensity * _gaussian(lies, sigma)[..., None]
    return image * (1 - cover) + BROWN * cover if mud else image + TURQUOISE * cover


@_settings((0.3, 0), (0.1, 0), (1.5, 0), (2, 0.1), (2.5, 0.2))
def saturate(image, rng, scale, shift):
    """Colours too pale or too strong: the saturation (S of HSV) times `scale` plus `shift`. As published.

    Grey has no hue of its own; as usual in HSV it counts as red.
    """
    value = image.max(-1, keepdims=True)
    depth = value - image
    chroma = depth.max(-1, keepdims=True)
    hue = np.where(chroma > 0, depth / np.maximum(chroma, 1e-6), RED)
    saturation = chroma / np.maximum(value, 1e-6)
    return value * (1 - (saturation * scale + shift).clip(0, 1) * hue)


NAMES = tuple(_CORRUPTIONS)
MEAN_15 = NAMES[:15]  # the ones in RobustBench's mean; the other four were meant for tuning
