"""Distorted images as data sets: the course's and CIFAR-100-C's files, and corruptions made here.

Each is a list of distortions of the same images, one after the other, so that one pass of the model judges all of them
and row `i` belongs to distortion `i // images`.
"""

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
COURSE = tuple(f"distortion{number:02d}" for number in range(19))


class Files(Dataset):
    """Images of .npy files, one file after the other. Mapped into memory for as long as a batch is read.

    Args:
        paths: files of `SHAPE`, uint8.
        rows: of each file, in the order in which they are wanted.
        labels: of all rows of a file; without them the label is 0.
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
            inside = numbers == number
            images[inside] = np.load(self.paths[number], mmap_mode="r", allow_pickle=False)[self.rows[places[inside]]]
        return {"image": _channels_first(images), "label": torch.from_numpy(self.labels[places])}


class Corrupted(Dataset):
    """The same images under each corruption at each severity, made as they are wanted, in the loader's workers.

    What happens to an image depends on the seed, the corruption, the severity and its row, and on nothing else.

    Args:
        images: uint8 (N, H, W, 3).
        labels: (N,).
    """

    def __init__(self, images: np.ndarray, labels: np.ndarray, seed: int):
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
            images.append(corruptions.corrupt(self.images[row], name, severity, rng))
        rows = np.array(indices) % len(self.labels)
        return {"image": _channels_first(np.stack(images)), "label": torch.from_numpy(self.labels[rows])}


def course(folder: Path, classes: int) -> Files:
    """The course's 19 files, all rows.

    Args:
        classes: that the model knows.

    Raises:
        UserError: a file is missing or of another kind, or the classes are not 100.
    """
    if classes != 100:
        raise UserError(f"--ood: its images are of CIFAR-100's 100 classes, the run's of {classes}", USAGE)
    return Files(_checked(folder, COURSE, "--ood"), np.arange(SHAPE[0]))


def course_id(place: int) -> str:
    """The id of a submission's row: distortionNN_S_I, file, severity from 1, and image from 0 within the severity."""
    number, row = divmod(place, SHAPE[0])
    severity, image = divmod(row, SEVERITY_ROWS)
    return f"{COURSE[number]}_{severity + 1}_{image}"


def cifar100c(folder: Path, classes: int, limit: int | None = None) -> Files:
    """The official CIFAR-100-C folder, in the order of `corruptions.NAMES`.

    Args:
        classes: that the model knows.
        limit: take only so many images of each severity.

    Raises:
        UserError: a file is missing, or of another kind.
    """
    paths = _checked(folder, corruptions.NAMES, "--cifar100c")
    path = folder / "labels.npy"
    try:
        labels = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"--cifar100c: {path} can't be read ({first_line(error)})", USAGE) from error
    if labels.shape != SHAPE[:1] or labels.dtype.kind not in "iu":
        raise UserError(
            f"--cifar100c: {path} has {labels.dtype} of shape {labels.shape}, not {SHAPE[0]} whole numbers", USAGE
        )
    if labels.min() < 0 or labels.max() >= classes:
        raise UserError(
            f"--cifar100c: {path} has labels from {labels.min()} to {labels.max()}, but the model knows {classes} "
            "classes",
            USAGE,
        )
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
    """The files' paths; UserError tells of all that are missing, no arrays, or of another shape or type."""
    if not folder.is_dir():
        raise UserError(f"{option}: there is no folder {folder}", USAGE)
    paths, problems = [folder / f"{name}.npy" for name in names], []
    for path in paths:
        if not path.is_file():
            problems.append(f"{path.name} is missing")
            continue
        try:
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            problems.append(f"{path.name} can't be read ({first_line(error)})")
            continue
        if array.shape != SHAPE or array.dtype != np.uint8:
            problems.append(f"{path.name} has {array.dtype} of shape {array.shape}")
    if problems:
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise UserError(
            f"{option}: {folder} must hold {names[0]}.npy to {names[-1]}.npy, {len(names)} files, each uint8 of shape "
            f"{SHAPE}: {'; '.join(problems[:5])}{more}",
            USAGE,
        )
    return paths


def _channels_first(images: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
