"""Run folders as data: what train.py and predict.py wrote there, checked when read. No training code, no torch.

A run folder may come from somebody else, be unfinished, damaged or of an older version. What a report can do without is
left out with a line in `Run.notes`; only a folder that is not a run, or an unreadable history, is an error. No file
outside the folder is read.
"""

import io
import json
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from errors import USAGE, UserError
from recipe import read_yaml
from text import plain, shown

MOST_EPOCHS = 10**6  # more means damage
LARGEST = 1e30  # of any figure: more means damage, too, and fits on no axis
CONFIG_BYTES = 2**18  # a config.yaml has about a thousand
JSON_BYTES = 2**26  # of a history, a summary or predictions
THUMBNAIL_BYTES, THUMBNAIL_SIDE = 2**18, 1024  # of a file that is read
SHOWN_SIDE = 96  # pixels, as shown on the page
FIGURES = (
    *("lr", "train_loss", "train_top1", "train_top5", "val_loss", "val_top1", "val_top5"),
    *("step", "seconds", "images_per_second", "peak_memory_mb"),
)
SUMMARY_FIGURES = ("parameters", "test_loss", "test_top1", "test_top5")


def number(value) -> float | None:
    """The value as a float, or None unless it is a number of at most `LARGEST`."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if abs(value) <= LARGEST else None


# ---- what predict.py writes -----------------------------------------------------------------------------------------

Name = Annotated[str, AfterValidator(shown)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=0, lt=2**53)]
Loss = Annotated[float | None, BeforeValidator(number)]
Sentence = Annotated[str, AfterValidator(lambda text: plain(text)[:400])]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, allow_inf_nan=False)


class ClassFigures(_Part):
    name: Name
    rows: Count
    top1: Fraction | None = None
    superclass_top1: Fraction | None = None


class Superclasses(_Part):
    top1: Fraction | None = None
    per_superclass: list[ClassFigures] = []


class Bin(_Part):
    """Rows whose highest probability lies between `low` and `high`."""

    low: Fraction
    high: Fraction
    rows: Count
    accuracy: Fraction | None = None


class Confused(_Part):
    true: Name
    predicted: Name
    rows: Count
    share: Fraction


class Mistake(_Part):
    true: Name
    predicted: Name
    probability: Fraction
    thumbnail: str | None = None


class Corruption(_Part):
    name: Name
    in_mean15: bool
    top1: list[Fraction] = Field(min_length=5, max_length=5)  # severities 1 to 5


def suffix(tta: str | None, limit: int | None, seed: int | None) -> str:
    """The end of a file name, so that --tta, --limit and --seed do not overwrite the plain figures."""
    parts = {"-": tta, "-limit": limit, "-seed": seed}
    return "".join(f"{name}{value}" for name, value in parts.items() if value)


class Predictions(_Part):
    """RUN/predictions/NAME.json. Fractions in [0, 1], loss in nats; `confusion` counts by true, predicted class."""

    kind: Literal["split", "robustness", "cifar100c"]
    name: Name
    rows: Count
    source: Name = "-"
    limit: Count | None = None
    tta: Name | None = None
    epochs: Count | None = None  # finished by the run
    seed: Count = 0  # of corruptions
    version: Count = 1  # of corruptions made here: corruptions.VERSION
    # kind "split"
    corrupt: Count = 0
    loss: Loss = None
    top1: Fraction | None = None
    top5: Fraction | None = None
    ece: Fraction | None = None
    class_names: list[Name] = []
    confusion: list[list[Count]] = []
    per_class: list[ClassFigures] = []
    superclasses: Superclasses | None = None
    reliability: list[Bin] = Field([], max_length=200)
    confused: list[Confused] = Field([], max_length=100)
    mistakes: list[Mistake] = Field([], max_length=100)
    # kinds "robustness" and "cifar100c"
    corruptions: list[Corruption] = Field([], max_length=100)
    mean15: Fraction | None = None
    mean19: Fraction | None = None
    note: Sentence = ""

    @model_validator(mode="after")
    def _square(self):
        sizes = {len(self.class_names), *map(len, self.confusion)}
        if self.confusion and (len(sizes) > 1 or len(self.confusion) not in sizes):
            raise ValueError("confusion is not a square of as many rows as there are class_names")
        return self

    @property
    def own(self) -> bool:
        """Whether the run's own test split was judged: other data would be part of the name."""
        return self.name.removesuffix(suffix(self.tta, self.limit, self.seed)) in ("test", "robustness", "cifar100c")

    @property
    def origin(self) -> str:
        """Which images a robustness mean is of."""
        version = f" v{self.version}" if self.version > 1 else ""
        return "CIFAR-100-C" if self.kind == "cifar100c" else f"own corruptions{version}"

    @property
    def rank(self) -> tuple:
        """Sort key, most telling first: by kind, all rows before some, one view before several, own data, many rows."""
        kinds = ("split", "robustness", "cifar100c")
        looks = self.limit is not None, self.tta is not None, not self.own
        return kinds.index(self.kind), *looks, -(self.limit or 0), self.name


# ---- a run folder ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """A run folder's content.

    Args:
        history: a row per finished epoch. `phase` and `epoch` are always set; missing or non-finite figures are None.
        summary: empty if the run is unfinished or crashed, or if it can't be read.
        predictions: sorted by `Predictions.rank`.
        notes: a line for each item that could not be read or is outdated.
    """

    name: str
    path: Path
    config: dict
    history: list[dict]
    summary: dict
    predictions: list[Predictions]
    notes: list[str]

    @property
    def phases(self) -> dict[str, int]:
        """Epochs run by phase."""
        counts = {}
        for row in self.history:
            counts[row["phase"]] = counts.get(row["phase"], 0) + 1
        return counts

    def planned(self) -> int | None:
        """The configured epochs of all phases together; None if unknown."""
        phases = self.setting("phases")
        epochs = [phase.get("epochs") if isinstance(phase, dict) else None for phase in _dict(phases).values()]
        known = epochs and all(type(count) is int and 0 < count < MOST_EPOCHS for count in epochs)
        return sum(epochs) if known else None

    @property
    def validates(self) -> bool:
        """Whether rows were held out of training to choose the best epoch."""
        return _validates(self.config)

    @property
    def best_epoch(self) -> dict:
        """The epoch saved in best/: the first with the highest validation top-1, or without validation the last.

        {} if there is none.
        """
        if not self.validates:
            return self.history[-1] if self.history else {}
        rows = [row for row in self.history if row["val_top1"] is not None]
        return max(rows, key=lambda row: row["val_top1"], default={})

    def is_outdated(self, found: Predictions) -> bool:
        """Whether predictions were made during training, with weights that best/ no longer holds."""
        best = self.best_epoch
        return bool(best) and found.epochs is not None and best not in self.history[: found.epochs]

    def setting(self, *keys: str):
        """A value of the configuration, None where there is none."""
        value = self.config
        for key in keys:
            value = _dict(value).get(key)
        return value


def read_run(path: Path) -> Run:
    """Read a run folder; UserError if it is not one, or its history is damaged."""
    try:
        _check(path / "config.yaml", path, CONFIG_BYTES)
        config = read_yaml(path / "config.yaml")
        config["model"]["name"]
    except (OSError, ValueError, UserError) as error:
        why = getattr(error, "strerror", None) or str(error).removeprefix("--config: ")
        raise UserError(f"{path} is not a run folder: it has no readable config.yaml ({why})", USAGE) from None
    except (KeyError, TypeError):
        why = "it names no model"
        raise UserError(f"{path} is not a run folder: it has no readable config.yaml ({why})", USAGE) from None
    notes = []
    history = _history(path / "history.jsonl", notes, _validates(config))
    summary = _summary(path / "summary.json", notes)
    predictions = sorted(_predictions(path, notes), key=lambda found: found.rank)
    run = Run(shown(Path(os.path.abspath(path)).name), path, config, history, summary, predictions, notes)
    notes += [
        f"predictions/{found.name}.json is of the weights after epoch {found.epochs}, and best/ has changed since: run "
        "predict.py again"
        for found in predictions
        if run.is_outdated(found)
    ]
    return run


def _validates(config: dict) -> bool:
    return _dict(config.get("data")).get("folds", ...) is not None


def _dict(value) -> dict:
    return value if isinstance(value, dict) else {}


def _check(path: Path, folder: Path, most: int) -> None:
    """OSError or ValueError unless a path, links resolved, is a file below `folder` of at most `most` bytes."""
    if not _lies_in(path, folder):
        raise ValueError("it leads out of the run folder")
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):  # reading a pipe would wait for ever
        raise ValueError("not a file")
    if status.st_size > most:
        raise ValueError("too large")


def _read(path: Path, run: Path) -> str:
    """A text file of a run folder; "" if there is none. OSError or ValueError if it can't be read."""
    if not os.path.lexists(path):
        return ""
    _check(path, run, JSON_BYTES)
    return path.read_text(encoding="utf-8")


def _why(error: Exception) -> str:
    return "nested too deep" if isinstance(error, RecursionError) else getattr(error, "strerror", None) or str(error)


def _history(path: Path, notes: list[str], validates: bool) -> list[dict]:
    try:
        text = _read(path, path.parent)
        lines = text.splitlines()
        rows = []
        for count, line in enumerate(lines, start=1):
            try:
                row = json.loads(line)
            except ValueError:
                # A crash may leave half a line; the epochs before it are whole.
                if count == len(lines) and not text.endswith("\n"):
                    notes.append(f"{path.name}: its last line is incomplete and left out")
                    break
                raise
            if not isinstance(row, dict):
                raise ValueError(f"line {count} is not a JSON object")
            rows.append(_epoch(row, count))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path.parent}: {path.name} is damaged ({_why(error)})") from None
    expected = ("train_loss", "train_top1", *(("val_loss", "val_top1") if validates else ()))
    if lost := sum(row[key] is None for row in rows for key in expected):
        notes.append(f"{path.name}: {lost} figures are missing or not finite: shown as - and as gaps")
    return rows


def _epoch(row: dict, count: int) -> dict:
    epoch = number(row.get("epoch")) or 0
    names = {"phase": shown(row.get("phase", "-")), "epoch": int(epoch) if 1 <= epoch < MOST_EPOCHS else count}
    return names | {key: number(row.get(key)) for key in FIGURES}


def _summary(path: Path, notes: list[str]) -> dict:
    try:
        text = _read(path, path.parent)
        summary = json.loads(text) if text else {}
        if not isinstance(summary, dict):
            raise ValueError("it is not a JSON object")
    except (OSError, ValueError, RecursionError) as error:
        notes.append(plain(f"{path.name} is left out: {_why(error)}"))
        return {}
    return summary | {key: number(summary[key]) for key in SUMMARY_FIGURES if key in summary}


def _predictions(run: Path, notes: list[str]):
    folder = run / "predictions"
    try:
        paths = sorted(folder.glob("*.json"))
    except OSError as error:
        notes.append(f"predictions can't be read ({error.strerror})")
        return
    for path in paths:
        name = f"predictions/{shown(path.name)}"
        try:
            found = Predictions.model_validate_json(_read(path, run))
            if found.name != shown(path.stem):
                raise ValueError(f"it says that its name is {found.name}")
        except ValidationError as error:
            problem = error.errors()[0]
            where = ".".join(map(str, problem["loc"]))
            notes.append(plain(f"{name} is left out: {f'{where}: ' if where else ''}{problem['msg']}"))
        except (OSError, ValueError, RecursionError) as error:
            notes.append(plain(f"{name} is left out: {_why(error)}"))
        else:
            yield found


def _lies_in(path: Path, folder: Path) -> bool:
    """Whether a path, links resolved, is below a folder."""
    try:
        return path.resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError):  # a loop of links
        return False


def thumbnail(run: Run, name: str | None) -> bytes | None:
    """A mistake's picture, re-encoded as a PNG of at most 96 pixels a side; None if it can't be read.

    Args:
        name: its path relative to RUN/predictions, from the JSON. It is foreign: it must not lead out of there.
    """
    from PIL import Image

    folder = run.path / "predictions"
    try:
        path = folder / (name or "")
        if path.suffix.lower() != ".png" or not _lies_in(folder, run.path):
            return None
        _check(path, folder, THUMBNAIL_BYTES)
        with Image.open(io.BytesIO(path.read_bytes()), formats=["PNG"]) as image:
            if max(image.size) > THUMBNAIL_SIDE:  # known from its header, before decoding
                return None
            picture = image.convert("RGB")
        picture.thumbnail((SHOWN_SIDE, SHOWN_SIDE))
        written = io.BytesIO()
        picture.save(written, "PNG", optimize=True)
        return written.getvalue()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):  # SyntaxError: Pillow's for broken PNGs
        return None
