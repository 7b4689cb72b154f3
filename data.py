"""Images and labels: an opened source, its rows, classes and validation split.

Each split becomes a `datasets` object with an undecoded image column and a class-label column. From there on the
validation split, decoding and loaders are the same for every source, streamed or memory-mapped.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import chain

import numpy as np
from datasets import ClassLabel, Dataset, IterableDataset
from tqdm import tqdm

import columns
import sources
import streaming
from config import DataConfig
from decoding import ROW, CorruptImage, bytes_of, corrupt, decode
from errors import USAGE, UserError, first_line
from processes import no_bar, on_all, on_main, rank, world_size


@dataclass(frozen=True)
class Data:
    """An opened source. Splits hold encoded images, or `DecodedImages` once `loading.keep_decoded` has run."""

    train: Dataset | streaming.Part | None
    validation: Dataset | streaming.Part | None  # None: all rows are trained on (`data.folds` null)
    test: Dataset | streaming.Stream | None
    image: str  # column
    label: str  # column
    class_labels: Dataset | IterableDataset  # the training split, class-label columns only
    class_names: list[str]
    size: tuple[int, int]  # height and width in pixels of the first image


def load(config: DataConfig, seed: int = 0, only_test: bool = False) -> Data:
    """Open the source, find its columns and hold the validation rows out of the training split.

    Only the main process reads rows of a stream.

    Args:
        seed: seeds the order of a stream.
        only_test: nothing is trained or validated. Training images are neither read nor held out. If there is no
            training split, columns and classes come from the test split.

    Raises:
        UserError: the source, a split or a column is missing, or a column holds no images or no class labels.
    """
    splits = sources.open_splits(config)
    test = None
    if config.test_split:
        remedy = "" if only_test else ", or null to do without test figures"
        test = sources.pick(splits, config.test_split, "data.test_split", config.source, remedy)
        if config.test_split == config.train_split and not only_test:
            raise UserError(
                f"data.test_split: '{config.test_split}' is trained on, so it can't tell how good the model is: name "
                "another split, or null to do without test figures",
                USAGE,
            )
    if only_test and config.train_split not in splits:
        train = test
    else:
        train = sources.pick(splits, config.train_split, "data.train_split", config.source)
    if train.features is None:  # a stream of JSON or CSV, whose columns only its rows tell
        raise UserError(
            f"data.source: {config.source} does not say which columns it has, as a source of images would; "
            "--data.streaming false lists them"
        )
    image, label = columns.find(train.features, config)
    class_labels = train.select_columns([name for name, kind in train.features.items() if isinstance(kind, ClassLabel)])

    train = columns.encoded(train, image, label, config.train_split)
    train, classes = columns.with_classes(train, label, config, only_test)
    if test is not None:
        test = columns.encoded(test, image, label, config.test_split, columns.DO_WITHOUT)
        if isinstance(test, Dataset) and test.features != train.features:  # integer labels
            columns.classes_with_rows(test, config.test_split, label, classes, config)
            test = columns.as_classes(test, label, classes)
    if len(classes) < 2 and not only_test:
        raise UserError(f"data.label: column '{label}' of {config.source} has {len(classes)} class(es); two are needed")
    if isinstance(train, Dataset):
        _check_same_everywhere(train, test, label, classes, config)
        if not only_test:
            columns.check_classes(train, test, label, classes, config)
        train, test = (rows and rows.add_column(ROW, np.arange(len(rows))) for rows in (train, test))
    if isinstance(test, IterableDataset):
        if not only_test:
            on_main(lambda: columns.check_labelled(test, label, classes, config))
        test = streaming.Stream(test, image, config.source)
    if only_test:
        size = _size(test, image, config, config.test_split)
        return Data(None, None, test, image, label, class_labels, classes, size)
    validates = partial(is_validation, folds=config.folds, fold=config.fold)
    if isinstance(train, IterableDataset):
        stream = streaming.TrainingStream(train, image, label, len(classes), validates, config, seed)
        size = _size(stream.shuffled, image, config, config.train_split)
        validation = stream.validation if config.folds else None
        return Data(stream.training, validation, test, image, label, class_labels, classes, size)
    size = first_size(train, image, config, config.train_split)
    if test and not config.image_size and (other := first_size(test, image, config, config.test_split)) != size:
        there, here = (f"{width}x{height}" for height, width in (other, size))
        raise UserError(
            f"images differ in size ({here} pixels in split '{config.train_split}', {there} in '{config.test_split}'): "
            "set a size to resize them all to, for example --data.image_size 224, or do without test figures: "
            "--data.test_split null"
        )
    training, validation = split_off_validation(train, image, validates) if config.folds else (train, None)
    for name, rows in (("training", training), ("validation", validation), ("test", test)):
        if rows is not None and not len(rows):
            folds = f"fold {config.fold} of {config.folds} validates" if config.folds else "none are held out"
            raise UserError(f"{config.source}: no {name} rows (of {len(train)}, {folds})")
    return Data(training, validation, test, image, label, class_labels, classes, size)


def _check_same_everywhere(
    train: Dataset, test: Dataset | None, label: str, classes: list[str], config: DataConfig
) -> None:
    """UserError if processes have other rows, on machines whose folders differ: an epoch would mix all of them."""
    if world_size() == 1:
        return
    labels = [rows.data.column(label).fill_null(-1).to_numpy() for rows in (train, test) if rows is not None]
    digest = hashlib.blake2b(b"".join(column.tobytes() for column in labels)).digest()
    found = on_all(lambda: (f"{' + '.join(str(len(column)) for column in labels)} rows", classes, digest))
    if any(one != found[0] for one in found):
        rows = ", ".join(sorted({rows for rows, *_ in found}))
        raise UserError(
            f"data.source: {config.source} is not the same on all machines ({rows}): each needs the same files",
            shared=True,
        )


def _size(rows: Dataset | streaming.Stream, image: str, config: DataConfig, split: str) -> tuple[int, int]:
    """The first image's size. Only the main process peeks into a stream; the next pass reuses the rows it read."""
    if isinstance(rows, Dataset):
        return first_size(rows, image, config, split)
    return on_main(lambda: first_size(rows.look(), image, config, split))


def first_size(rows, image: str, config: DataConfig, split: str | None) -> tuple[int, int]:
    """Height and width of the first image, or with `on_corrupt` skip of the first that can be decoded.

    Args:
        split: the split's name, for messages.
    """
    row = None
    try:
        for row in rows:
            try:
                width, height = decode(row[image]).size
                return height, width
            except CorruptImage as error:
                if config.on_corrupt == "error":
                    raise corrupt(row, image, split, error) from error
    except UserError:
        raise
    except Exception as error:  # a stream's first bytes arrive here, so anything can go wrong
        raise UserError(f"data.source: {config.source} can't be read: {first_line(error)}") from error
    found = "no rows" if row is None else "no image that can be decoded"
    raise UserError(f"{config.source}: " + (f"the split '{split}' has {found}" if split else f"there is {found}"))


def is_validation(content: bytes, folds: int | None, fold: int) -> bool:
    """Whether a row is for validation, decided by a hash of its image's encoded bytes; without folds none is.

    Nothing else matters: not the row's position, not the number of workers, shards or processes, not streaming.
    Copies of an image therefore fall on the same side.
    """
    if folds is None:
        return False
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big") % folds == fold


def split_off_validation(dataset: Dataset, image: str, validates: Callable[[bytes], bool]) -> tuple[Dataset, Dataset]:
    """Split memory-mapped rows into (training, validation). Each process reads its share of the images."""

    def sides() -> list[bool]:
        share = dataset.select_columns([image]).select(np.array_split(range(len(dataset)), world_size())[rank()])
        with tqdm(total=len(share), desc="holding out", unit=" images", leave=False, delay=2, disable=no_bar()) as bar:
            found = []
            for batch in share.iter(32):  # photos are large
                found += [validates(bytes_of(encoded)) for encoded in batch[image]]
                bar.update(len(batch[image]))
            return found

    side = np.array(list(chain.from_iterable(on_all(sides))), dtype=bool)
    return dataset.select(np.flatnonzero(~side)), dataset.select(np.flatnonzero(side))


def superclasses(data: Data) -> dict[str, str] | None:
    """Each class's superclass, by name, if the data have a second, coarser label, as CIFAR-100 has; None otherwise.

    Of a stream, as many rows are read as have every class in them, and 100 for each class.

    Raises:
        UserError: rows can't be read.
    """
    features = data.class_labels.features
    coarser = {name: kind.num_classes for name, kind in features.items() if kind.num_classes < len(data.class_names)}
    if data.label not in features or not coarser:
        return None
    column, found, seen = max(coarser, key=coarser.get), {}, 0
    try:
        for rows in data.class_labels.iter(1000):
            for label, above in zip(rows[data.label], rows[column], strict=True):
                if found.setdefault(label, above) != above:
                    return None  # not a superclass: it splits a class
            seen += len(rows[column])
            every = len(found) == len(data.class_names) and seen >= 100 * len(found)
            if every and isinstance(data.class_labels, IterableDataset):
                break
    except Exception as error:  # whatever can go wrong with a file, a format or a connection
        raise UserError(f"data.train_split: column '{column}' can't be read: {first_line(error)}") from error
    named = {label: above for label, above in found.items() if None not in (label, above) and min(label, above) >= 0}
    if len(set(named.values())) < 2:
        return None
    return {data.class_names[label]: features[column].names[above] for label, above in named.items()}


def model_size(data: Data, config: DataConfig) -> tuple[int, int]:
    """Height and width in pixels of the images that the model sees."""
    return (config.image_size, config.image_size) if config.image_size else data.size


def is_streamed(data: Data) -> bool:
    """Whether the training rows come from a stream, so that their number is not known in advance."""
    return isinstance(data.train, streaming.Part)


def facts(data: Data) -> dict:
    """What must not have changed when a run is resumed, as far as can be seen without reading the images."""
    splits = {"training rows": data.train, "validation rows": data.validation}
    rows = {name: None if is_streamed(data) or split is None else len(split) for name, split in splits.items()}
    found = rows | {"classes": list(data.class_names), "first image's size": list(data.size)}
    if is_streamed(data):  # decides the order; offline, the hub's cache is read as one file
        found["files of the stream"] = data.train.stream.in_order.rows.num_shards
    return found


def describe(data: Data, config: DataConfig) -> str:
    rows = "streamed"
    if not is_streamed(data):
        parts = {"training": data.train, "validation": data.validation}
        rows = " and ".join(f"{len(part)} {name}" for name, part in parts.items() if part is not None) + " rows"
    validates = f"fold {config.fold} of {config.folds} is validation" if config.folds else "no validation"
    height, width = data.size
    return (
        f"{config.named}, {rows} ({validates}), {width}x{height} pixels, "
        f"{len(data.class_names)} classes of column '{data.label}'"
    )


def check_batch(data: Data, config: DataConfig) -> None:
    """Raise UserError if the training rows, where they can be counted, do not fill one batch."""
    if not is_streamed(data) and len(data.train) < config.batch_size:
        raise UserError(
            f"{config.source}: {len(data.train)} training rows are fewer than data.batch_size {config.batch_size}: "
            "lower it"
        )
