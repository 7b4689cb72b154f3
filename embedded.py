"""The embedded data: small images drawn by code, so that the demo and the tests need no download.

They have CIFAR-100's columns and structure: 32x32 RGB, 20 coarse classes of 5 fine ones. A coarse class is a figure
(five outlines, each filled, hollow, slit or cored), and a fine class adds the texture it is painted with. Position,
scale, rotation, colours, background, clutter, lighting and noise are nuisances: a model has to learn figure and
texture, and one that already knows the figures (from the coarse labels) has a head start on the fine ones.
"""

import io
from collections.abc import Iterator

import numpy as np
from PIL import Image

OUTLINES = ("disc", "triangle", "square", "star", "flower")
STRUCTURES = ("filled", "hollow", "slit", "cored")
TEXTURES = ("plain", "striped", "checked", "dotted", "ringed")
COARSE_NAMES = [f"{structure}_{outline}" for outline in OUTLINES for structure in STRUCTURES]
FINE_NAMES = [f"{texture}_{coarse}" for coarse in COARSE_NAMES for texture in TEXTURES]
SIZE = 32
CHUNK = 200  # rows are always drawn in groups of this size, so row i has the same bytes however many are drawn
SEED = 542  # one dataset for everybody, like a published one; a run's own seed does not change it


def rows(split: str, start: int, stop: int) -> Iterator[dict]:
    """Draw rows `start` to `stop` of a split, in chunks of `CHUNK` (both must be multiples of it).

    Yields:
        dict: `img` ({"bytes": PNG, "path": None}), `fine_label` (0-99), `coarse_label` (0-19).
    """
    for first in range(start, stop, CHUNK):
        rng = np.random.default_rng([SEED, {"train": 0, "test": 1}[split], first])
        fine = rng.permutation(np.arange(CHUNK) % len(FINE_NAMES))
        for image, label in zip(_draw(fine, rng), fine.tolist(), strict=True):
            png = io.BytesIO()
            Image.fromarray(image).save(png, "PNG", compress_level=1)
            yield {
                "img": {"bytes": png.getvalue(), "path": None},
                "fine_label": label,
                "coarse_label": label // len(TEXTURES),
            }


def _draw(fine: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Images (N, 32, 32, 3) uint8 of the fine classes (N,)."""
    n = len(fine)
    coarse, texture = np.divmod(fine, len(TEXTURES))
    outline, structure = np.divmod(coarse, len(STRUCTURES))

    def uniform(low, high, *more):
        return rng.uniform(low, high, (n, 1, 1, *more)).astype(np.float32)

    # The figure's own coordinates: moved, turned and scaled; 1 is its outer radius.
    y, x = np.mgrid[:SIZE, :SIZE].astype(np.float32) + 0.5
    dx, dy = x - SIZE / 2 - uniform(-3, 3), y - SIZE / 2 - uniform(-3, 3)
    turn, radius = uniform(-0.4, 0.4), uniform(11, 14)
    u = (dx * np.cos(turn) + dy * np.sin(turn)) / radius
    v = (dy * np.cos(turn) - dx * np.sin(turn)) / radius

    # `inside` is 1 within the figure and 0 outside, with a soft edge of a pixel.
    edge = _boundary(outline, u, v)
    distance = np.hypot(u, v)
    pick = structure[:, None, None]

    def within(limit):
        return np.clip((limit - distance) * radius + 0.5, 0, 1)

    inside = within(edge)
    core = within(0.45 * edge)
    slit = np.clip((0.16 - np.abs(v)) * radius + 0.5, 0, 1)
    inside = inside * np.where(pick == 1, 1 - core, 1) * np.where(pick == 2, 1 - slit, 1)

    # The texture switches between two paints; the cored figures' middle has a third.
    wave = 2 * np.pi / uniform(4.5, 6.0) * radius
    phase = uniform(0, 2 * np.pi)
    along, across = np.sin(wave * u + phase), np.sin(wave * v + phase)
    patterns = np.stack(
        [np.ones_like(along), along, along * across, (along + across) - 0.6, np.sin(wave * distance + phase)]
    )
    chosen = np.take_along_axis(patterns, texture[None, :, None, None], axis=0)[0]
    paint = np.clip(chosen * 2 + 0.5, 0, 1)[..., None]

    background = uniform(0.1, 0.9, 3)
    first = (background + rng.choice([-1, 1], (n, 1, 1, 3)).astype(np.float32) * uniform(0.2, 0.45, 3)) % 1
    second = (first + uniform(0.35, 0.65, 3)) % 1
    third = 1 - background
    figure = paint * first + (1 - paint) * second
    figure = np.where((pick == 3)[..., None], core[..., None] * third + (1 - core[..., None]) * figure, figure)

    # Background: a slow colour gradient and a few blobs of clutter, some of them over the figure.
    slope = 0.012 * rng.standard_normal((2, n, 1, 1, 3), dtype=np.float32)
    image = background + slope[0] * (x - SIZE / 2)[..., None] + slope[1] * (y - SIZE / 2)[..., None]
    image = _blob(image, x, y, rng, n)
    image = _blob(image, x, y, rng, n)
    image = inside[..., None] * figure + (1 - inside[..., None]) * image
    image = _blob(image, x, y, rng, n)

    # Lighting and noise.
    light = uniform(0.75, 1.2, 1)
    shade = 0.01 * rng.standard_normal((2, n, 1, 1), dtype=np.float32)
    light = light + (shade[0] * (x - SIZE / 2) + shade[1] * (y - SIZE / 2))[..., None]
    noise = rng.standard_normal(image.shape, dtype=np.float32) * uniform(0.01, 0.06, 1)
    return (np.clip(image * light + noise, 0, 1) * 255).round().astype(np.uint8)


def _boundary(outline: np.ndarray, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """The outline's distance from its centre in the direction of each pixel, (N, 32, 32)."""
    angle = np.arctan2(v, u)

    def polygon(sides):
        sector = 2 * np.pi / sides
        return np.cos(np.pi / sides) / np.cos((angle + np.pi / 2) % sector - sector / 2)

    corner = np.abs((angle + np.pi / 2) % (2 * np.pi / 5) - np.pi / 5) / (np.pi / 5)
    edges = [np.full_like(angle, 0.85), polygon(3), polygon(4), 0.45 + 0.55 * corner, 0.75 + 0.25 * np.sin(6 * angle)]
    return np.take_along_axis(np.stack(edges), outline[None, :, None, None], axis=0)[0]


def _blob(image, x, y, rng, n):
    """Paint one soft disc of a random colour, place and size on each image."""
    centre = rng.uniform(0, SIZE, (2, n, 1, 1)).astype(np.float32)
    radius = rng.uniform(1, 3.5, (n, 1, 1)).astype(np.float32)
    cover = np.clip(radius - np.hypot(x - centre[0], y - centre[1]) + 0.5, 0, 1)[..., None]
    return cover * rng.uniform(0, 1, (n, 1, 1, 3)).astype(np.float32) + (1 - cover) * image
