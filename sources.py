"""Where rows come from: the splits of a hub dataset, of parquet, of a folder of images or of the embedded drawings.

All are `datasets` objects, streamed or memory-mapped; columns.py looks into their columns.
"""

import glob
import itertools
import os
import re
from collections.abc import Mapping
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet
from datasets import ClassLabel, Dataset, Features, Image, IterableDataset
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder

import columns
import embedded
import hub
from config import DataConfig
from errors import USAGE, UserError, first_line

UNKNOWN = {".avif", ".heic", ".heif", ".jxl"} - set(ImageFolder.EXTENSIONS)  # photos that `datasets` would pass over


def open_splits(config: DataConfig) -> Mapping:
    """All splits of the source by name, streamed or memory-mapped; None for local ones that no option names.

    Raises:
        UserError: the source can't be loaded.
    """
    kind, streams, files = config.kind, config.streams, {}
    for option in ("subset", "revision"):
        if getattr(config, option) and kind != "hub":
            raise UserError(
                f"data.{option}: only datasets on the hub have {option}s, and {config.source} is not there", USAGE
            )
    try:
        if kind == "embedded":
            return embedded_splits(config.embedded_rows, streams)
        if kind == "parquet":
            files, others = _parquet_files(config)
            # Each split by itself, as together the first one's columns would be all splits'.
            splits = {
                split: datasets.load_dataset("parquet", data_files={split: names}, streaming=streams)[split]
                for split, names in files.items()
            }
            return dict.fromkeys(others) | splits
        if kind == "folder":
            files, others = _class_folders(config)
            if not files:
                return dict.fromkeys(others)
            splits = datasets.load_dataset("imagefolder", data_files=files, drop_labels=False, streaming=streams)
            return dict.fromkeys(others) | splits
        builder = _hub_builder(config)
        if streams and not hub.data_offline():
            return builder.as_streaming_dataset()
        builder.download_and_prepare()
        kept = builder.as_dataset()
        # Streams are not cached: without a connection, stream an earlier download.
        return {name: split.to_iterable_dataset() for name, split in kept.items()} if streams else kept
    except UserError:
        raise
    except Exception as error:  # the libraries raise a dozen types here, from OSError to pyarrow's
        if kind == "hub" and (cached := re.search("(?:configurations|configs) in the cache: .*", str(error))):
            raise UserError(
                f"data.subset: of {config.source} without the hub ({hub.endpoint()}): {cached[0]}"
            ) from error
        if kind == "hub" and hub.data_offline():
            raise hub.unreachable(f"the dataset {config.source}") from error
        if kind == "parquet":
            _check_pages(files)
        reason = first_line(error.__cause__ or error)
        if "Config name is missing" in reason:  # the next line lists them
            reason = f"it has several subsets. {' '.join(str(error).splitlines()[1:2])}: --data.subset"
        if kind == "folder" and (
            "corresponds to no data" in reason or isinstance(error, datasets.data_files.EmptyDatasetError)
        ):
            empty = [split for split in files if len(files) > 1 and f'"{split}"' in reason]
            reason = "it holds no images and no .parquet files"
            if empty:
                reason = f"{Path(config.source) / empty[0]} holds no images"
        raise UserError(f"data.source: {config.source} can't be loaded: {reason}") from error


def _hub_builder(config: DataConfig) -> datasets.DatasetBuilder:
    """What reads a hub dataset, of the commit that is asked for. Its `hash` is the commit.

    Raises:
        UserError: the hub is silent, and the cache's newest commit, which `datasets` takes then, is another.
    """
    builder = datasets.load_dataset_builder(config.source, config.subset, revision=config.revision)
    if config.commit and builder.hash != config.commit:
        raise UserError(
            f"data.revision: {config.source} at {config.commit} is wanted, and the hub does not answer: the newest in "
            f"this machine's cache is {builder.hash}. Connect; or read that one, if this is no resumed run: "
            "--data.revision null"
        )
    return builder


def commit(config: DataConfig) -> str | None:
    """The commit of a hub dataset that a run reads, for its config.yaml; for other sources, what is configured.

    Raises:
        UserError: a branch or tag is asked for, and the hub can't be, which commit that means.
    """
    if config.kind != "hub":
        return config.revision
    if config.revision and not config.commit and hub.data_offline():
        raise UserError(
            f"data.revision: without the hub ({hub.endpoint()}) nobody knows which commit {config.revision} is; give "
            "all 40 digits of a commit, or nothing for the newest in this machine's cache"
        )
    try:
        return _hub_builder(config).hash
    except Exception:  # opening the splits fails, too, and explains it
        return config.revision


def embedded_splits(rows: int, streams: bool) -> dict:
    """`rows` drawings to train on, and a fifth as many to test on."""
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


def _class_folders(config: DataConfig) -> tuple[dict[str, list[str]], list[str]]:
    """The file patterns of an image folder's splits, and the subfolders that look like splits, for messages.

    A split is a subfolder with a wanted name that holds one folder per class or a table of labels (metadata.csv,
    .jsonl). If there is none, all files belong to the split train. By itself `datasets` looks for words anywhere in a
    path: it takes a class called train, or test_tube, for a split, and mixes rows of other splits into it.
    """
    folder = Path(config.source).expanduser()
    wanted, inside = (config.train_split, config.test_split), _subfolders(folder)
    like_splits = [path for path in inside if _subfolders(path) or _has_table(path)]
    splits = {path.name: _patterns(path) for path in like_splits if path.name in wanted}
    if splits:
        return splits, [path.name for path in like_splits]
    for path in inside:
        if any(below.name in wanted and _subfolders(below) for below in _subfolders(path)):
            raise UserError(
                f"data.source: {folder} has no folder '{config.train_split}', but {path} has: name that one"
            )
    if inside and like_splits == inside:  # none can be a class folder
        return {}, [path.name for path in inside]
    return {"train": _patterns(folder)}, []


def _subfolders(of: Path) -> list[Path]:
    """The folders, and links to folders, in a folder; not hidden ones."""
    names = [path.name for path in _inside(of) if path.is_dir() and not path.name.startswith((".", "__"))]
    return [of / name for name in sorted(names, key=lambda name: f"{name}/")]  # as the paths of their files sort


def _inside(folder: Path) -> list[Path]:
    """What a folder holds; nothing if it is not ours to read, such as lost+found."""
    try:
        return list(folder.iterdir())
    except OSError:
        return []


def _has_table(folder: Path) -> bool:
    """Whether a folder of images has its labels in a table, by the names that `datasets` knows."""
    return any((folder / f"metadata.{kind}").is_file() for kind in ("csv", "jsonl"))


def _patterns(split: Path) -> list[str]:
    """The file patterns of one folder per class; beside a table of labels, or without class folders, of all files.

    Raises:
        UserError: an image lies elsewhere: `datasets` would take its own folder for its class. Or it is in a format
            that `datasets` knows no files of, and would be left out.
    """
    classes = _subfolders(split)
    if not classes or _has_table(split):
        return [f"{glob.escape(str(split))}/**"]
    deeper = (path for each in classes for below in _subfolders(each) for path in below.rglob("*"))
    for path in itertools.chain(split.iterdir(), deeper):
        if _is_image(path.name) and path.is_file():
            raise UserError(f"data.source: {path} is not directly in a class's folder, as {classes[0]}/*; move it")
    for path in (path for each in classes for path in _inside(each) if not is_hidden(path, each)):
        if path.suffix.lower() in UNKNOWN:
            raise UserError(f"data.source: {path}: {path.suffix} files are not read here; convert it, to PNG for one")
        if _is_image(path.stem) and not _is_image(path.name):
            raise UserError(f"data.source: {path} is no image, but `datasets` would take it for one; move it")
    return [f"{glob.escape(str(each))}/*" for each in classes]  # each is named, as links are followed only there


def is_hidden(path: Path, below: Path) -> bool:
    """Whether `datasets` passes over a file: .name and .folder/name, as macOS makes, and __folder/name."""
    *folders, name = path.relative_to(below).parts
    return name.startswith(".") or any(folder.startswith((".", "__")) for folder in folders)


def _is_image(name: str) -> bool:
    return Path(name).suffix.lower() in ImageFolder.EXTENSIONS


def _parquet_files(config: DataConfig) -> tuple[dict[str, list[str]], list[str]]:
    """The file patterns of the wanted splits, and the names of all splits there are.

    A file's split is the part of its name before the first '-' or '.', as in train-00000-of-00001.parquet.

    Raises:
        UserError: a file is not parquet or has unknown column types, a split's files disagree about their columns or
            two splits about their classes, a split has no rows, or a folder's subfolders have files of one split: it
            may be several, such as train/0.parquet and test/0.parquet. Only the files' footers are read.
    """
    path = Path(config.source).expanduser()
    names = map(str, path.rglob("*.parquet")) if path.is_dir() else glob.glob(str(path), recursive=True)
    found = {}
    for name in sorted(filter(os.path.isfile, names)):
        found.setdefault(Path(name).name.split(".")[0].split("-")[0], []).append(name)
    files = {split: found[split] for split in (config.train_split, config.test_split) if split in found}
    for split, names in (files or found).items():
        folders = sorted({str(Path(name).parent) for name in names})
        if len(folders) > 1 and path.is_dir():
            raise UserError(
                f"data.source: {folders[0]} and {folders[1]} have files of one split, '{split}', the part of a file's "
                "name before the first '-' or '.'. If they belong together, move them into one folder; if not, name "
                "one of these folders, or rename the files (train-0.parquet, test-0.parquet)"
            )
    classes = {}
    for split, names in files.items():
        rows, first = 0, None
        for name in names:
            features, more = _footer(name)
            first, rows = first or features, rows + more
            _check_columns(name, features, names[0], first)
            _check_classes(name, features, classes, "" if split == config.train_split else columns.DO_WITHOUT)
        if not rows:
            raise UserError(f"data.source: the split '{split}' has no rows ({', '.join(names)})")
    return {split: [*map(glob.escape, names)] for split, names in files.items()}, list(found)


def _footer(name: str) -> tuple[Features, int]:
    """A parquet file's columns and its number of rows."""
    try:
        end = pa.parquet.read_metadata(name)
    except (OSError, ValueError, pa.ArrowException) as error:
        raise UserError(f"data.source: {name} is not an intact parquet file: {first_line(error)}") from error
    try:
        return Features.from_arrow_schema(end.schema.to_arrow_schema()), end.num_rows
    except Exception as error:  # types of a newer `datasets`, or broken metadata
        raise UserError(
            f"data.source: {name} has columns that this `datasets` can't read: {first_line(error)}"
        ) from error


def _check_columns(name: str, features: Features, first: str, wanted: Features) -> None:
    """UserError if a file has columns or class names that its split's first file lacks, whose are used for all."""
    for column, feature in features.items():
        if column not in wanted:
            raise UserError(f"data.source: {name} has a column '{column}', which {first} has not")
        if isinstance(feature, ClassLabel) and not isinstance(wanted[column], ClassLabel):
            raise UserError(f"data.source: {name} names the classes of column '{column}', and {first} does not")


def _check_classes(name: str, features: Features, classes: dict[str, list[str]], remedy: str) -> None:
    """UserError if a file's classes are not those of the files before it: its labels would mean something else."""
    for column, feature in features.items():
        if isinstance(feature, ClassLabel) and feature.names != classes.setdefault(column, feature.names):
            odd = [one for one in feature.names if one not in classes[column]][:5]
            how = f"it has {', '.join(odd)} besides" if odd else f"{len(feature.names)} in an order of its own"
            raise UserError(
                f"data.source: the classes of column '{column}' in {name} are not those of the other files: "
                f"{how}{remedy}"
            )


def _check_pages(files: dict[str, list[str]]) -> None:
    """Raise a UserError that names the first file with an unreadable page; `datasets` names none."""
    for name in (name for patterns in files.values() for pattern in patterns for name in glob.glob(pattern)):
        try:
            for _ in pa.parquet.ParquetFile(name).iter_batches():
                pass
        except (OSError, pa.ArrowException) as error:
            raise UserError(f"data.source: {name} can't be read: {first_line(error)}") from error


def pick(splits: Mapping, name: str, option: str, source: str, remedy: str = ""):
    """A split by its name; UserError lists the names there are, and another remedy."""
    if name not in splits:
        raise UserError(
            f"{option}: {source} has no split '{name}'; it has {', '.join(splits)}: name one of them{remedy}",
            USAGE,
        )
    return splits[name]
