"""Which columns hold the images and the labels, and whether the labels are valid classes."""

import numpy as np
import pyarrow as pa
from datasets import ClassLabel, Dataset, Features, Image, IterableDataset, Value

from config import DataConfig
from errors import USAGE, UserError, first_line

DO_WITHOUT = "; --data.test_split null does without test figures"
MANY = 100_000  # most classes that integer labels may imply, if nothing is trained


def find(features: Features, config: DataConfig) -> tuple[str, str]:
    """The image and the label column: as named, otherwise found by their types.

    Raises:
        UserError: a named column is missing, or its type does not single one out.
    """
    for option, name in (("data.image", config.image), ("data.label", config.label)):
        if name and name not in features:
            raise UserError(
                f"{option}: there is no column '{name}'; {config.source} has {', '.join(features)}: name one of them",
                USAGE,
            )
    images = [name for name, feature in features.items() if isinstance(feature, Image)]
    labels = [name for name, feature in features.items() if isinstance(feature, ClassLabel)]
    if not config.image and len(images) != 1:
        found = f"{len(images)} image columns ({', '.join(images)})" if images else "no image column"
        raise UserError(f"{config.source} has {found}: name it with data.image (columns: {', '.join(features)})", USAGE)
    if not config.label and not labels:
        raise UserError(
            f"{config.source} has no class-label column: name it with data.label (columns: {', '.join(features)})",
            USAGE,
        )
    # With several labels (CIFAR-100: fine and coarse), classifiers are judged by the one with the most classes.
    label = config.label or max(labels, key=lambda name: features[name].num_classes)
    if config.image and not isinstance(features[config.image], Image) and label == config.image:
        raise UserError(f"data.image: column '{label}' of {config.source} holds classes, not images", USAGE)
    if label == (config.image or images[0]):
        raise UserError(f"data.label: column '{label}' of {config.source} holds images, not classes", USAGE)
    return config.image or images[0], label


def encoded(rows, image: str, label: str, split: str, remedy: str = ""):
    """Only these two columns, the image undecoded: encoded bytes or a file's path."""
    try:
        return rows.select_columns([image, label]).cast_column(image, Image(decode=False))
    except (ValueError, KeyError, TypeError, pa.ArrowException) as error:
        raise UserError(
            f"split '{split}' has no images and classes in its columns {image}, {label}: {first_line(error)}{remedy}",
            USAGE,
        ) from error


def with_classes(split, label: str, config: DataConfig, only_test: bool):
    """The split with its label as a ClassLabel, and the class names; integer labels get the names 0, 1, ..."""
    feature = split.features[label]
    if isinstance(feature, ClassLabel):
        return split, feature.names
    if not isinstance(feature, Value) or not feature.dtype.startswith(("int", "uint")):
        raise UserError(
            f"data.label: column '{label}' of {config.source} holds {getattr(feature, 'dtype', feature)}, not classes; "
            "turn it into one with datasets' class_encode_column",
            USAGE,
        )
    if isinstance(split, IterableDataset):
        raise UserError(
            f"data.label: the classes of column '{label}' can't be counted in a stream: --data.streaming false",
            USAGE,
        )
    most = max((value for value in split.unique(label) if value is not None), default=0)
    if most >= (MANY if only_test else len(split)):  # a lone test split may have fewer rows than classes
        than = f"{MANY:,}" if only_test else "it has rows"
        raise UserError(
            f"data.label: column '{label}' of {config.source} holds {most}, more than {than}; classes count from 0"
        )
    names = [str(value) for value in range(most + 1)]
    classes_with_rows(split, config.train_split, label, names, config)
    return as_classes(split, label, names), names


def as_classes(split: Dataset, label: str, names: list[str]) -> Dataset:
    """The split with its whole-number labels as a ClassLabel; `cast_column` would write all images to disk again."""
    labels = split.data.column(label).cast(pa.int64()).to_numpy()
    return split.remove_columns(label).add_column(label, labels, feature=ClassLabel(names=names))


def check_classes(train: Dataset, test: Dataset | None, label: str, names: list[str], config: DataConfig) -> None:
    """Raise UserError unless every label is a class, training has two or more, and test has none beyond them."""
    trained = classes_with_rows(train, config.train_split, label, names, config)
    if len(trained) < 2:
        raise UserError(
            f"data.label: all rows of split '{config.train_split}' are of {len(trained)} class "
            f"({', '.join(names[value] for value in trained)}); two are needed"
        )
    if test is not None:
        tested = classes_with_rows(test, config.test_split, label, names, config)
        new = [names[value] for value in np.setdiff1d(tested, trained)]
        if new:
            more = f" and {len(new) - 5} more" if len(new) > 5 else ""
            raise UserError(
                f"data.test_split: '{config.test_split}' has rows of {', '.join(new[:5])}{more}, of which "
                f"'{config.train_split}' has none; add some, or --data.test_split null"
            )


def check_labelled(test: IterableDataset, label: str, names: list[str], config: DataConfig) -> None:
    """UserError if a test stream's first row has no class, as in contests' test splits: before training, not after."""
    try:
        first = next(iter(test.select_columns([label])), {label: 0})
    except UserError:
        raise
    except Exception as error:  # a stream's first bytes arrive here, so anything can go wrong
        raise UserError(f"data.source: {config.source} can't be read: {first_line(error)}") from error
    if first[label] is None or not 0 <= first[label] < len(names):
        raise UserError(
            f"data.label: column '{label}' of {config.source} holds {first[label]} in the first row of split "
            f"'{config.test_split}', which is none of the {len(names)} classes{DO_WITHOUT}"
        )


def classes_with_rows(rows: Dataset, split: str, label: str, names: list[str], config: DataConfig) -> np.ndarray:
    """The labels that occur; UserError names the first row whose label is missing or not a class."""
    column, remedy = rows.data.column(label), DO_WITHOUT if split == config.test_split else ""
    if not pa.types.is_integer(column.type):
        raise UserError(f"data.label: column '{label}' of split '{split}' holds {column.type}, not classes{remedy}")
    values = column.cast(pa.int64(), safe=False).fill_null(-1).to_numpy()
    wrong = np.flatnonzero((values < 0) | (values >= len(names)))
    if len(wrong):
        raise UserError(
            f"data.label: column '{label}' of {config.source} holds {column[wrong[0]].as_py()} in row {wrong[0]} of "
            f"split '{split}', which is none of the {len(names)} classes (they count from 0){remedy}"
        )
    return np.unique(values)
