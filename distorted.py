"""Distorted images as data sets: the course's and CIFAR-100-C's files, and corruptions made here.

Each lists the distortions of the same images one after the other, so that one pass of the model judges all of them and
row `i` belongs to distortion `i // images`.
"""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

import corruptions
from errors import USAGE, UserError, first_line

LEVELS = len(corruptions.SEVERITIES)
CELLS = len(corruptions.NAMES) * LEVELS
SEVERITY_ROWS = 10_000  # images of each severity in one of the published files
SHAPE = (LEVELS * SEVERITY_ROWS, 32, 32, 3)
# CIFAR-100's classes in the order of their labels: the files hold only the labels.
CIFAR100 = tuple(
    """
    apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can
    castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin
    elephant flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster
    man maple_tree motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck
    pine_tree plain plate poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk
    skyscraper snail snake spider squirrel streetcar sunflower sweet_pepper table tank telephone television tiger
    tractor train trout tulip turtle wardrobe whale willow_tree wolf woman worm
    """.split()  # noqa: SIM905  # a hundred quoted names are no easier to read
)
COURSE = tuple(f"distortion{number:02d}" for number in range(19))


class Files(Dataset):
    """Images from .npy files, one file after the other, memory-mapped only while a batch is read.

    Args:
        paths: files of `SHAPE`, uint8.
        rows: the rows to take from each file, in this order.
        labels: of all rows of a file; None: every label is 0.
    """

    def __init__(self, paths: Sequence[Path], rows: np.ndarray, labels: np.ndarray | None = None):
        self.paths, self.rows = paths, rows
        self.labels = np.zeros(len(rows), dtype=np.int64) if labels is None else labels[rows].astype(np.int64)

    def __len__(self) -> int:
        return len(self.paths) * len(self.rows)

    def __getitems__(self, indices: list[int]) -> dict[str, torch.Tensor]:
        """Batches of `image` uint8 (B, 3, H, W) and `label` int64 (B,)."""
        numbers, places = np.divmod(indices, len(self.rows))
        images = np.empty((len(indices), *SHAPE[1:]), dtype=np.uint8)
        for number in np.unique(numbers):
            array, inside = _mapped(self.paths[number]), numbers == number
            if isinstance(array, str):
                raise UserError(f"{self.paths[number]} {array}")
            images[inside] = array[self.rows[places[inside]]]
        return {"image": _channels_first(images), "label": torch.from_numpy(self.labels[places])}


class Corrupted(Dataset):
    """The same images under each corruption at each severity, made on demand in the loader's workers.

    The result depends only on the image, the seed, the corruption, the severity and the row.

    Args:
        images: uint8 (N, H, W, 3); a tensor, which workers that are not forked share instead of copying it.
        labels: (N,).
    """

    def __init__(self, images: torch.Tensor, labels: np.ndarray, seed: int):
        self.images, self.labels, self.seed = images, labels, seed

    def __len__(self) -> int:
        return CELLS * len(self.labels)

    def __getitems__(self, indices: list[int]) -> dict[str, torch.Tensor]:
        """Batches of `image` uint8 (B, 3, H, W) and `label` int64 (B,)."""
        images = []
        for index in indices:
            cell, row = divmod(index, len(self.labels))
            number, level = divmod(cell, LEVELS)
            rng = np.random.default_rng([self.seed, number, level, row])
            name, severity = corruptions.NAMES[number], corruptions.SEVERITIES[level]
            images.append(corruptions.corrupt(self.images[row].numpy(), name, severity, rng))
        rows = np.array(indices) % len(self.labels)
        return {"image": _channels_first(np.stack(images)), "label": torch.from_numpy(self.labels[rows])}


def known_classes(class_names: list[str], option: str) -> list[str]:
    """CIFAR-100's class names in label order, as the run has them: the originals, the hub's, or numbers.

    Raises:
        UserError: the run was trained on something else.
    """
    on_the_hub = ["cra" if name == "crab" else name for name in CIFAR100]
    numbers = [str(number) for number in range(len(CIFAR100))]
    for names in (list(CIFAR100), on_the_hub, numbers):
        if sorted(names) == sorted(class_names):
            return names
    raise UserError(f"{option}: its images show CIFAR-100's classes, which the run was not trained on", USAGE)


def course(folder: Path) -> Files:
    """The course's 19 files, all rows; UserError if one is missing or of the wrong kind."""
    return Files(_checked(folder, COURSE, "--ood"), np.arange(SHAPE[0]))


def course_id(place: int) -> str:
    """A submission row's id, distortionNN_S_I: file, severity from 1, image from 0 within the severity."""
    number, row = divmod(place, SHAPE[0])
    severity, image = divmod(row, SEVERITY_ROWS)
    return f"{COURSE[number]}_{severity + 1}_{image}"


def cifar100c(folder: Path, limit: int | None = None) -> Files:
    """The official CIFAR-100-C folder, in the order of `corruptions.NAMES`.

    Args:
        limit: take only this many images of each severity.

    Raises:
        UserError: a file is missing or of the wrong kind.
    """
    paths, path = _checked(folder, corruptions.NAMES, "--cifar100c"), folder / "labels.npy"
    labels = _mapped(path)
    if isinstance(labels, str) or labels.shape != SHAPE[:1] or labels.dtype.kind not in "iu":
        found = labels if isinstance(labels, str) else f"has {labels.dtype} of shape {labels.shape}"
        raise UserError(f"--cifar100c: {path} {found}; it must be {SHAPE[0]} whole numbers", USAGE)
    if labels.min() < 0 or labels.max() >= len(CIFAR100):
        raise UserError(
            f"--cifar100c: {path} has labels from {labels.min()} to {labels.max()}; they must be 0 to 99", USAGE
        )
    if labels.max() < 10:  # its files have the same names and shapes
        raise UserError(f"--cifar100c: {path} has no label above {labels.max()}: this is CIFAR-10-C", USAGE)
    wanted = SEVERITY_ROWS if limit is None else min(limit, SEVERITY_ROWS)
    rows = (np.arange(LEVELS)[:, None] * SEVERITY_ROWS + np.arange(wanted)).ravel()
    return Files(paths, rows, labels)


def table(hits: np.ndarray) -> dict:
    """Accuracies by corruption and severity, and their means over RobustBench's 15 and over all 19.

    Args:
        hits: bool, one for each image, in the order corruption, severity, row.
    """
    top1 = hits.reshape(len(corruptions.NAMES), LEVELS, -1).mean(axis=2)
    each = [
        {"name": name, "in_mean15": name in corruptions.MEAN_15, "top1": row.tolist(), "mean": float(row.mean())}
        for name, row in zip(corruptions.NAMES, top1, strict=True)
    ]
    mean15 = float(np.mean([one["mean"] for one in each if one["in_mean15"]]))
    return {"corruptions": each, "mean15": mean15, "mean19": float(top1.mean())}


def _checked(folder: Path, names: Sequence[str], option: str) -> list[Path]:
    """The files' paths; UserError lists those missing, unreadable, or of the wrong shape or type."""
    if not os.path.isdir(folder):  # pathlib's raises if a name is too long
        raise UserError(f"{option}: there is no folder {folder}", USAGE)
    paths, problems = [folder / f"{name}.npy" for name in names], []
    for path in paths:
        array = _mapped(path)
        if isinstance(array, str):
            problems.append(f"{path.name} {array}")
        elif array.shape != SHAPE or array.dtype != np.uint8:
            problems.append(f"{path.name} has {array.dtype} of shape {array.shape}")
    if problems:
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise UserError(
            f"{option}: {folder} must hold {names[0]}.npy to {names[-1]}.npy, {len(names)} files, each uint8 of shape "
            f"{SHAPE}: {'; '.join(problems[:5])}{more}",
            USAGE,
        )
    return paths


def _mapped(path: Path) -> np.ndarray | str:
    """An .npy file mapped into memory, or what is wrong with it. Never unpickles."""
    if not os.path.isfile(path):
        return "is missing"
    try:
        return np.lib.format.open_memmap(path, mode="r")
    except Exception as error:  # numpy raises half a dozen types on broken headers
        return f"can't be read ({first_line(error)})"


def _channels_first(images: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
