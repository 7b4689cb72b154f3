"""Images and labels: from a hub dataset, parquet, a folder of images or the embedded drawings to batches of uint8.

Every source becomes one `datasets` object with an undecoded image column and a class-label column; from there the
validation split, the decoding and the loaders are the same for all, streamed or memory-mapped.
"""

import glob
import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet
from datasets import ClassLabel, Dataset, Features, Image, IterableDataset, Value

import embedded
import hub
import streaming
from config import DataConfig
from decoding import ROW, CorruptImage, bytes_of, corrupt, decode
from errors import USAGE, UserError, first_line
from processes import on_main

MANY = 100_000  # classes that are told by numbers


@dataclass(frozen=True)
class Data:
    """An opened source. The splits hold encoded images; after `loading.keep_decoded` some are its `Pixels`."""

    train: Dataset | streaming.Part | None
    validation: Dataset | streaming.Part | None  # None: all rows are trained on (`data.folds` null)
    test: Dataset | streaming.Stream | None
    image: str  # column
    label: str  # column
    class_labels: Dataset | IterableDataset  # the training split's columns of that type alone
    class_names: list[str]
    size: tuple[int, int]  # height and width in pixels of the first training image


def load(config: DataConfig, seed: int = 0, only_test: bool = False) -> Data:
    """Open the source, find its columns and hold the validation rows out of the training split.

    Of a stream the main process alone reads rows.

    Args:
        seed: of a stream's order.
        only_test: nothing is trained or validated. Training rows are neither looked through nor held out, and need not
            be there: columns and classes are those of the test split then.

    Raises:
        UserError: the source, a split or a column is not there, or has another type than images and class labels.
    """
    splits = _open(config)
    test = _pick(splits, config.test_split, "data.test_split", config.source) if config.test_split else None
    if only_test and config.train_split not in splits:
        train = test
    else:
        train = _pick(splits, config.train_split, "data.train_split", config.source)
    if train.features is None:  # a stream of parquet without metadata: read from its first rows
        train = train._resolve_features()
    image, label = _columns(train.features, config)
    class_labels = train.select_columns([name for name, kind in train.features.items() if isinstance(kind, ClassLabel)])

    train, classes = _with_classes(_encoded(train, image, label, config.train_split), label, config, only_test)
    if test is not None:
        test = _encoded(test, image, label, config.test_split)
        if isinstance(test, Dataset) and test.features != train.features:  # whole numbers
            _classes_with_rows(test, config.test_split, label, classes, config)
            test = test.cast(train.features)
    if len(classes) < 2 and not only_test:
        raise UserError(f"data.label: column '{label}' of {config.source} has {len(classes)} class(es); two are needed")
    if isinstance(train, Dataset):
        if not only_test:
            _check_classes(train, test, label, classes, config)
        train, test = (rows and rows.add_column(ROW, np.arange(len(rows))) for rows in (train, test))
    if isinstance(test, IterableDataset):
        test = streaming.Stream(test, image, config.source)
    if only_test:
        size = _size(test, image, config, config.test_split)
        return Data(None, None, test, image, label, class_labels, classes, size)
    on_side = partial(held_out, folds=config.folds, fold=config.fold)
    if isinstance(train, IterableDataset):
        stream = streaming.TrainingStream(train, image, on_side, config, seed)
        size = _size(stream.shuffled, image, config, config.train_split)
        validation = stream.validation if config.folds else None
        return Data(stream.training, validation, test, image, label, class_labels, classes, size)
    size = first_size(train, image, config, config.train_split)
    training, validation = hold_out(train, image, on_side) if config.folds else (train, None)
    for name, rows in (("training", training), ("validation", validation), ("test", test)):
        if rows is not None and not len(rows):
            folds = f"fold {config.fold} of {config.folds} validates" if config.folds else "none are held out"
            raise UserError(f"{config.source}: no {name} rows (of {len(train)}, {folds})")
    return Data(training, validation, test, image, label, class_labels, classes, size)


def _size(rows: Dataset | streaming.Stream, image: str, config: DataConfig, split: str) -> tuple[int, int]:
    """The first image's size. A stream is looked at by the main process, and goes on behind what was looked at."""
    if isinstance(rows, Dataset):
        return first_size(rows, image, config, split)
    return on_main(lambda: first_size(rows.look(), image, config, split))


def first_size(rows, image: str, config: DataConfig, split: str | None) -> tuple[int, int]:
    """Height and width of the first image; of the first that can be decoded, where others are skipped.

    Args:
        split: that the rows are of, for messages.
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
    except Exception as error:  # a stream's first bytes arrive here, with whatever can go wrong on their way
        raise UserError(f"data.source: {config.source} can't be read: {first_line(error)}") from error
    found = "no rows" if row is None else "no image that can be decoded"
    raise UserError(f"{config.source}: " + (f"the split '{split}' has {found}" if split else f"there is {found}"))


def held_out(content: bytes, folds: int | None, fold: int) -> bool:
    """Whether a row is for validation, told from its image's encoded bytes; without folds none is.

    It depends on nothing else: not on the row's position, the number of workers, shards or processes, nor on whether it
    is streamed. Copies of an image fall on the same side.
    """
    if folds is None:
        return False
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big") % folds == fold


def hold_out(dataset: Dataset, image: str, on_side: Callable[[bytes], bool]) -> tuple[Dataset, Dataset]:
    """Memory-mapped rows as (training, validation)."""
    batches = dataset.select_columns([image]).iter(1000)
    side = np.array([on_side(bytes_of(encoded)) for batch in batches for encoded in batch[image]])
    return dataset.select(np.flatnonzero(~side)), dataset.select(np.flatnonzero(side))


# ---- sources ----------------------------------------------------------------------------------------------------


def _open(config: DataConfig) -> Mapping:
    """All splits of the source by name, streamed or memory-mapped."""
    kind, streams = config.kind, config.streams
    try:
        if kind == "embedded":
            return _embedded(config.embedded_rows, streams)
        if kind == "parquet":
            files = {split: [*map(glob.escape, names)] for split, names in _parquet_files(config.source).items()}
            return datasets.load_dataset("parquet", data_files=files, streaming=streams)
        if kind == "folder":
            files, others = _class_folders(config)
            if not files:
                return dict.fromkeys(others)
            splits = datasets.load_dataset("imagefolder", data_files=files, drop_labels=False, streaming=streams)
            return dict.fromkeys(others) | splits
        if streams and hub.data_offline():  # a stream has no cache; what was downloaded earlier is read as one
            return {name: split.to_iterable_dataset() for name, split in datasets.load_dataset(config.source).items()}
        return datasets.load_dataset(config.source, streaming=streams)
    except UserError:
        raise
    except Exception as error:  # the libraries raise a dozen types here, from OSError to pyarrow's
        if kind == "hub" and hub.data_offline():
            raise hub.unreachable(f"the dataset {config.source}") from error
        if kind == "parquet":
            _check_pages(config.source)
        reason = first_line(error.__cause__ or error)
        if kind == "folder" and (
            "corresponds to no data" in reason or isinstance(error, datasets.data_files.EmptyDatasetError)
        ):
            reason = "it holds no images and no .parquet files"
        raise UserError(f"data.source: {config.source} can't be loaded: {reason}") from error


def _embedded(rows: int, streams: bool) -> dict:
    features = Features(
        img=Image(),
        fine_label=ClassLabel(names=embedded.FINE_NAMES),
        coarse_label=ClassLabel(names=embedded.COARSE_NAMES),
    )
    splits = {}
    for name, wanted in (("train", rows), ("test", rows // 5)):
        starts = list(range(0, wanted, embedded.CHUNK))
        if streams:
            splits[name] = IterableDataset.from_generator(
                _draw, features=features, gen_kwargs={"starts": starts, "split": name, "rows": wanted}
            )
        else:
            splits[name] = Dataset.from_list(list(_draw(starts, name, wanted)), features=features)
    return splits


def _draw(starts: list[int], split: str, rows: int):
    for start in starts:
        for offset, row in enumerate(embedded.rows(split, start, start + embedded.CHUNK)):
            if start + offset < rows:
                yield row


def _class_folders(config: DataConfig) -> tuple[dict[str, str], list[str]]:
    """Of a folder of images the patterns of its splits' files, and other subfolders that may be splits, for messages.

    A split is a subfolder of a wanted name that has folders, one a class, or a table of labels (metadata.csv, .jsonl).
    Where there is none all files are of the split train. Left to find the splits itself, `datasets` goes by words
    anywhere in a path: a class called train, or test_tube, is a split to it, and rows of other splits get into it.
    """

    def subfolders(of: Path) -> list[Path]:
        try:
            found = sorted(of.iterdir())
        except OSError:  # of somebody else's, such as lost+found
            return []
        return [path for path in found if path.is_dir() and not path.name.startswith((".", "__"))]

    folder = Path(config.source).expanduser()
    wanted, inside = (config.train_split, config.test_split), subfolders(folder)
    like_splits = [path for path in inside if subfolders(path) or any(path.glob("metadata.*"))]
    splits = {path.name: f"{glob.escape(str(path))}/**" for path in like_splits if path.name in wanted}
    if splits:
        return splits, [path.name for path in like_splits]
    for path in inside:
        if any(below.name in wanted and subfolders(below) for below in subfolders(path)):
            raise UserError(
                f"data.source: {folder} has no folder '{config.train_split}', but {path} has: name that one"
            )
    if inside and like_splits == inside:  # no class has images of its own
        return {}, [path.name for path in inside]
    return {"train": f"{glob.escape(str(folder))}/**"}, []


def _parquet_files(source: str) -> dict[str, list[str]]:
    """Files by split: the part of a file's name before the first '-' or '.', as in train-00000-of-00001.parquet.

    Raises:
        UserError: one of them is no parquet, they do not agree about their classes, or a split has no rows. Only the
            files' ends are read for that.
    """
    path = Path(source).expanduser()
    names = map(str, path.rglob("*.parquet")) if path.is_dir() else glob.glob(str(path), recursive=True)
    files, rows, classes = {}, {}, {}
    for name in sorted(filter(os.path.isfile, names)):
        split = Path(name).name.split(".")[0].split("-")[0]
        files.setdefault(split, []).append(name)
        try:
            end = pa.parquet.read_metadata(name)
        except (OSError, pa.ArrowException) as error:
            raise UserError(f"data.source: {name} is no whole parquet file: {first_line(error)}") from error
        rows[split] = rows.get(split, 0) + end.num_rows
        try:
            features = Features.from_arrow_schema(end.schema.to_arrow_schema())
        except Exception as error:  # types of a newer `datasets`, or a description that is none
            raise UserError(
                f"data.source: {name} has columns that this `datasets` can't read: {first_line(error)}"
            ) from error
        for column, feature in features.items():
            # `datasets` takes the names of one file for all of them, and labels would silently change their meaning.
            if isinstance(feature, ClassLabel) and feature.names != classes.setdefault(column, feature.names):
                odd = [one for one in feature.names if one not in classes[column]][:5]
                how = f"it has {', '.join(odd)} besides" if odd else f"{len(feature.names)} in an order of its own"
                raise UserError(
                    f"data.source: the classes of column '{column}' in {name} are not those of the other files: {how}"
                )
    for split, count in rows.items():
        if not count:
            raise UserError(f"data.source: the split '{split}' has no rows ({', '.join(files[split])})")
    return files


def _check_pages(source: str) -> None:
    """UserError that names the first file with a page that can't be read, where `datasets` would name none."""
    for name in (name for names in _parquet_files(source).values() for name in names):
        try:
            for _ in pa.parquet.ParquetFile(name).iter_batches():
                pass
        except (OSError, pa.ArrowException) as error:
            raise UserError(f"data.source: {name} can't be read: {first_line(error)}") from error


def _pick(splits: Mapping, name: str, option: str, source: str):
    if name not in splits:
        way_on = ", or null to do without test figures" if option == "data.test_split" else ""
        raise UserError(
            f"{option}: {source} has no split '{name}'; it has {', '.join(splits)}: name one of them{way_on}", USAGE
        )
    return splits[name]


# ---- columns ----------------------------------------------------------------------------------------------------


def _columns(features: Features, config: DataConfig) -> tuple[str, str]:
    """The image and the label column: as named, otherwise found by their types."""
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
    # Of several labels (CIFAR-100: fine and coarse) the one with the most classes is what a classifier is judged by.
    label = config.label or max(labels, key=lambda name: features[name].num_classes)
    if label == (config.image or images[0]):
        raise UserError(f"data.label: column '{label}' of {config.source} holds images, not classes", USAGE)
    return config.image or images[0], label


def _encoded(rows, image: str, label: str, split: str):
    """The two columns alone, the image as the encoded bytes (or the file) that it comes as."""
    try:
        return rows.select_columns([image, label]).cast_column(image, Image(decode=False))
    except (ValueError, KeyError, TypeError, pa.ArrowException) as error:
        raise UserError(
            f"split '{split}' has no images and classes in its columns {image}, {label}: {first_line(error)}", USAGE
        ) from error


def _with_classes(split, label: str, config: DataConfig, only_test: bool):
    """The split with its label as a ClassLabel, and the class names; whole numbers are given the names 0, 1, ..."""
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
            f"data.label: how many classes column '{label}' has can't be told from a stream; --data.streaming false",
            USAGE,
        )
    most = max((value for value in split.unique(label) if value is not None), default=0)
    if most >= (MANY if only_test else len(split)):  # a test split alone may lack any class
        than = f"{MANY:,}" if only_test else "it has rows"
        raise UserError(
            f"data.label: column '{label}' of {config.source} holds {most}, more than {than}; classes count from 0"
        )
    names = [str(value) for value in range(most + 1)]
    _classes_with_rows(split, config.train_split, label, names, config)
    return split.cast_column(label, ClassLabel(names=names)), names


def _check_classes(train: Dataset, test: Dataset | None, label: str, names: list[str], config: DataConfig) -> None:
    """UserError unless every label is a class, training has two, and the test split has none that training lacks."""
    trained = _classes_with_rows(train, config.train_split, label, names, config)
    if len(trained) < 2:
        raise UserError(
            f"data.label: all rows of split '{config.train_split}' are of {len(trained)} class "
            f"({', '.join(names[value] for value in trained)}); two are needed"
        )
    if test is not None:
        tested = _classes_with_rows(test, config.test_split, label, names, config)
        new = [names[value] for value in np.setdiff1d(tested, trained)]
        if new:
            more = f" and {len(new) - 5} more" if len(new) > 5 else ""
            raise UserError(
                f"data.test_split: '{config.test_split}' has rows of {', '.join(new[:5])}{more}, of which "
                f"'{config.train_split}' has none; add some, or --data.test_split null"
            )


def superclasses(data: Data) -> dict[str, str] | None:
    """Each class's superclass, by name, if the data have a second, coarser label, as CIFAR-100 has; None otherwise.

    Of a stream, so many rows are read that each class was seen once.

    Raises:
        UserError: rows can't be read.
    """
    features = data.class_labels.features
    coarser = {name: kind.num_classes for name, kind in features.items() if kind.num_classes < len(data.class_names)}
    if data.label not in features or not coarser:
        return None
    column, found = max(coarser, key=coarser.get), {}
    try:
        for rows in data.class_labels.iter(1000):
            for label, above in zip(rows[data.label], rows[column], strict=True):
                if found.setdefault(label, above) != above:
                    return None  # a label of another kind: it splits classes
            if isinstance(data.class_labels, IterableDataset) and len(found) == len(data.class_names):
                break
    except Exception as error:  # whatever can go wrong with a file, a format or a connection
        raise UserError(f"data.train_split: column '{column}' can't be read: {first_line(error)}") from error
    named = {label: above for label, above in found.items() if None not in (label, above) and min(label, above) >= 0}
    return {data.class_names[label]: features[column].names[above] for label, above in named.items()}


def _classes_with_rows(rows: Dataset, split: str, label: str, names: list[str], config: DataConfig) -> np.ndarray:
    """The labels that occur; UserError names the first row whose label is missing or none of the classes."""
    column = rows.data.column(label)
    values = column.cast(pa.int64(), safe=False).fill_null(-1).to_numpy()
    wrong = np.flatnonzero((values < 0) | (values >= len(names)))
    if len(wrong):
        way_on = "; --data.test_split null does without test figures" if split == config.test_split else ""
        raise UserError(
            f"data.label: column '{label}' of {config.source} holds {column[wrong[0]].as_py()} in row {wrong[0]} of "
            f"split '{split}', which is none of the {len(names)} classes (they count from 0){way_on}"
        )
    return np.unique(values)


def model_size(data: Data, config: DataConfig) -> tuple[int, int]:
    """Height and width in pixels of the images that the model sees."""
    return (config.image_size, config.image_size) if config.image_size else data.size


def is_streamed(data: Data) -> bool:
    """Whether the training rows come from a stream, so that nobody knows how many there are."""
    return isinstance(data.train, streaming.Part)


def facts(data: Data) -> dict:
    """What a resumed run has to find unchanged, as far as it can be told without reading the images."""
    splits = {"training rows": data.train, "validation rows": data.validation}
    rows = {name: None if is_streamed(data) or split is None else len(split) for name, split in splits.items()}
    found = rows | {"classes": list(data.class_names), "first image's size": list(data.size)}
    if is_streamed(data):  # decides the order; from the cache, without the hub, it is read as one
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
        f"{config.source}, {rows} ({validates}), {width}x{height} pixels, "
        f"{len(data.class_names)} classes of column '{data.label}'"
    )


def check_batch(data: Data, config: DataConfig) -> None:
    """UserError if the training rows, where they can be counted, do not fill a single batch."""
    if not is_streamed(data) and len(data.train) < config.batch_size:
        raise UserError(
            f"{config.source}: {len(data.train)} training rows are fewer than data.batch_size {config.batch_size}"
        )
