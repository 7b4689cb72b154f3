"""The configuration: what a run is, where its values come from, and which values are valid.

A run is a model, a data source and a list of phases. A recipe (YAML) states them, the command line overrides single
values (`--phases.finetune.lr 3e-5`). Both are merged into one tree of plain values first and checked after that, so
overriding one value of one phase leaves its others alone. Each field's type, range and explanation stand here, once:
`--help`, the error messages and the check are made from them. No torch here: `--help` must answer at once.
"""

import argparse
import dataclasses
import difflib
import glob
import os
import re
import reprlib
import sys
import typing
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import (
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    TypeAdapter,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic.dataclasses import dataclass
from pydantic_core import PydanticUndefined

from errors import UNPRINTABLE, USAGE, UserError, plain

RECIPES = Path(__file__).parent / "recipes"
DEFAULT_RECIPE = RECIPES / "resnet50.yaml"
STRICT = ConfigDict(extra="forbid", coerce_numbers_to_str=True, allow_inf_nan=False, protected_namespaces=())
PLAIN_NAME = {"pattern": r"^\w[\w.-]*$", "max_length": 100}  # of a folder, and of nothing above or below it
SHORT = reprlib.Repr()  # of values in messages
SHORT.maxstring = SHORT.maxother = 80


def _split_commas(value):
    return [part.strip() for part in value.split(",")] if isinstance(value, str) else value


def _whole_or_auto(value):
    if value in (None, "auto") or (type(value) is int and value >= 1):
        return value
    raise ValueError("should be a whole number from 1, or auto")


def hub_id(text: str) -> str:
    """A repository's id on the hub as it was given; ValueError if it can't be one."""
    parts = text.split("/")
    plain_names = all(re.fullmatch(r"\w([\w.-]{0,94}\w)?", part, re.ASCII) for part in parts)
    if len(parts) != 2 or not plain_names or "--" in text or ".." in text or text.endswith(".git"):
        raise ValueError("should be NAME/MODEL (letters, digits, _ . - inside, but not -- or ..; no .git)")
    return text


MicroBatchSize = Annotated[int | Literal["auto"] | None, PlainValidator(_whole_or_auto)]
ModuleNames = Annotated[tuple[str, ...], BeforeValidator(_split_commas), Field(min_length=1)]
PhaseName = Annotated[str, Field(pattern=r"^[\w-]+$")]  # becomes part of options, and a cell of reports


@dataclass(frozen=True, kw_only=True, config=STRICT)
class _Section:
    """What holds for every field: `true` is no number (pydantic takes it for 1), and text can be printed."""

    @field_validator("*", mode="before")
    @classmethod
    def _as_meant(cls, value, info):
        annotation = cls.__pydantic_fields__[info.field_name].annotation
        if isinstance(value, bool) and bool not in (annotation, *typing.get_args(annotation)):
            raise ValueError("should not be true or false (nor yes, no, on, off: YAML reads them so; quote a text)")
        if isinstance(value, str) and UNPRINTABLE.search(value):
            raise ValueError("holds a character that can't be printed")
        return value


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ModelConfig(_Section):
    """Which network, and what it starts from (in this order: weights, pretrained, from scratch)."""

    name: str = Field("resnet50", description="any timm model, or simple_cnn, deep_cnn, resnet50_small_stem")
    pretrained: bool = Field(False, description="start from timm's pretrained weights of that name, from the hub")
    weights: str | None = Field(
        None,
        description="start from these weights: a .safetensors file with timm's keys, or another run's best/ folder",
    )


@dataclass(frozen=True, kw_only=True, config=STRICT)
class DataConfig(_Section):
    """Where the images come from and how they become batches."""

    source: str = Field(
        "uoft-cs/cifar100",
        min_length=1,
        description="a dataset id on the hub; a folder or glob of .parquet; a folder of images, one subfolder a class "
        "(or train/CLASS/..., test/CLASS/...); or 'embedded': small images drawn by code",
    )
    streaming: bool | None = Field(
        None,
        description="read rows as they arrive instead of downloading first and reading memory-mapped "
        "(default: true for a hub source, false for others)",
    )
    image: str | None = Field(None, description="the image column (default: the only one of image type)")
    label: str | None = Field(None, description="the label column (default: the class label with the most classes)")
    train_split: str = Field("train", description="the split to train on; validation rows are held out of it")
    test_split: str | None = Field(
        "test", description="the split to read once, after training; null: finish without test figures"
    )
    folds: int = Field(
        5, ge=2, description="parts that the training split is hashed into; validation is one of them, so 5 means 20 %"
    )
    fold: int = Field(0, ge=0, description="which part is validation, 0 to folds - 1 (cross-validation: train each)")
    image_size: int | None = Field(
        None,
        ge=8,
        le=1024,
        description="pixels a side that the model sees, resized on the device (default: as they are)",
    )
    batch_size: int = Field(
        64, ge=1, description="images per optimizer step, all processes and gradient accumulation together"
    )
    micro_batch_size: MicroBatchSize = Field(
        None,
        description="images per forward pass of one process, fewer than its share of the batch: accumulate; auto: the "
        "largest that fits the device's memory, found before training (default: the whole share)",
    )
    workers: int | None = Field(
        None,
        ge=0,
        le=256,
        description="processes that decode images, for each that trains (default: cores - 1, 1 to 4)",
    )
    shuffle_buffer: int = Field(
        10_000, ge=1, description="rows that a stream is shuffled within (memory-mapped data is shuffled whole)"
    )
    keep_mb: int = Field(
        2048,
        ge=0,
        description="decode training and validation images once, before training, and keep them in each process's "
        "memory, if they fit in this many MB; if not, and for streams, they are decoded in each epoch; 0: never keep",
    )
    on_corrupt: Literal["error", "skip"] = Field(
        "error",
        description="an image that can't be decoded ends the run, naming its row; skip: it is left out and counted",
    )
    embedded_rows: int = Field(
        10_000, ge=200, description="training rows of the 'embedded' source; its test split has a fifth of them"
    )

    @model_validator(mode="after")
    def _fold_exists(self):
        if self.fold >= self.folds:
            raise ValueError(f"fold is {self.fold}, but with {self.folds} folds it goes from 0 to {self.folds - 1}")
        return self

    @property
    def kind(self) -> Literal["embedded", "parquet", "folder", "hub"]:
        """What `source` is, told from its form and from the disk, without reading any data.

        Raises:
            UserError: it has the form of a path, but there is nothing there.
        """
        if self.source == "embedded":
            return "embedded"
        try:
            path = Path(self.source).expanduser()
            if path.is_dir():
                return "parquet" if next(path.rglob("*.parquet"), None) else "folder"
            found = glob.glob(str(path), recursive=True)
        except (OSError, RuntimeError) as error:  # a name that is too long, a folder of others, an unknown ~user
            raise UserError(f"data.source: {self.source} can't be read: {error}", USAGE) from None
        if found:
            if path.suffix == ".parquet":
                return "parquet"
            raise UserError(f"data.source: {self.source} is neither a folder nor .parquet files", USAGE)
        if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", self.source) and path.suffix != ".parquet" and self.source[0] != ".":
            return "hub"
        raise UserError(f"data.source: there is no file or folder {self.source}", USAGE)

    @property
    def streams(self) -> bool:
        """Whether rows are streamed: as asked, otherwise for hub sources only."""
        return self.kind == "hub" if self.streaming is None else self.streaming


@dataclass(frozen=True, kw_only=True, config=STRICT)
class AugmentConfig(_Section):
    """What is done to training images, batched, on the device."""

    policy: Literal["report", "none"] = Field(
        "report",
        description="report: padded crop, flip, colour jitter 0.2, rotation up to 15 degrees; none: normalise only",
    )


@dataclass(frozen=True, kw_only=True, config=STRICT)
class PhaseConfig(_Section):
    """One phase of a run: which modules train, for how long, and how."""

    modules: ModuleNames = Field(
        description="module names to train, comma-separated; 'head' is the model's classifier whatever its name, "
        "'all' is everything; the rest is frozen, batch-norm statistics included"
    )
    epochs: int = Field(ge=1, description="passes over the training split")
    optimizer: Literal["adam", "adamw", "sgd"] = Field("adam", description="torch's optimizer of that name")
    lr: float = Field(gt=0, description="learning rate at the phase's start")
    weight_decay: float = Field(0.0, ge=0, description="weight decay (L2; decoupled with adamw)")
    momentum: float = Field(0.9, ge=0, lt=1, description="momentum; sgd only")
    schedule: Literal["plateau", "cosine", "constant"] = Field(
        "constant",
        description="learning rate per epoch. plateau: a tenth after more than 5 epochs without gain in validation "
        "top-1; cosine: annealed to 0 over the phase",
    )
    early_stopping: int | None = Field(
        None, ge=1, description="end the phase after this many epochs without gain in validation top-1 (default: never)"
    )


@dataclass(frozen=True, kw_only=True, config=STRICT)
class CheckpointConfig(_Section):
    """When a run is saved, beside the end of each epoch and a signal to stop."""

    every_steps: int | None = Field(None, ge=1, description="optimizer steps between two checkpoints (default: off)")
    every_minutes: float | None = Field(10.0, gt=0, description="minutes between two checkpoints; null: don't count")
    keep: int = Field(2, ge=1, description="checkpoints to keep; older ones are removed, best/ never is")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Environment(_Section):
    """What a run found around it. Recorded in config.yaml, never set here: precision and processes are Accelerate's."""

    mixed_precision: str
    processes: int
    device_type: str
    device: str
    versions: dict[str, str]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Config(_Section):
    """The whole configuration of a run."""

    model: ModelConfig = Field(default_factory=ModelConfig)
    data: DataConfig = Field(default_factory=DataConfig)
    augment: AugmentConfig = Field(default_factory=AugmentConfig)
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    phases: dict[PhaseName, PhaseConfig] = Field(min_length=1)
    clip_norm: float | None = Field(None, gt=0, description="clip the gradients' global L2 norm to this (default: off)")
    seed: int = Field(0, ge=0, lt=2**32, description="seed of initialisation, shuffling, augmentation and dropout")
    recipe: str = Field("run", **PLAIN_NAME)  # the recipe file's name, which the run is called after
    run_name: str | None = Field(
        None, **PLAIN_NAME, description="folder of this run below output_dir (default: recipe and time)"
    )
    output_dir: str = Field("runs", min_length=1, description="folder that holds the runs")
    profile: int | None = Field(
        None,
        ge=1,
        description="trace this many steps of each phase's first epoch (after 3 that warm up) with torch's profiler, "
        "to RUN/profile/PHASE.json.gz, which ui.perfetto.dev opens (default: off)",
    )
    tracking: Literal["wandb", "none"] = Field(
        "wandb",
        description="where figures go beside history.jsonl; wandb goes offline by itself without key or network",
    )
    push_to_hub: str | None = Field(
        None,
        description="after training, upload best/ with its model card to this repository on the hub, NAME/MODEL; one "
        "that is not there yet is made, and public unless your account says otherwise; null: upload nothing",
    )
    environment: Environment | None = None

    @field_validator("push_to_hub")
    @classmethod
    def _on_the_hub(cls, value):
        return value if value is None else hub_id(value)

    def runs_folder(self) -> Path:
        """`output_dir` as a path, which need not exist yet.

        Raises:
            UserError: it can't be a folder to write to: it lies below a file, or its owner does not let us.
        """
        try:
            folder = Path(self.output_dir).expanduser()
            there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        except (OSError, RuntimeError) as error:  # a name that is too long, an unknown ~user
            raise UserError(f"output_dir: {self.output_dir} can't be used: {error}", USAGE) from None
        if not there.is_dir():
            raise UserError(f"output_dir: {there} is no folder", USAGE)
        if not os.access(there, os.W_OK | os.X_OK):
            raise UserError(f"output_dir: {folder} can't be written: no permission in {there}", USAGE)
        return folder

    def to_yaml(self) -> str:
        """The configuration as YAML that is itself a valid `--config`."""
        return yaml.safe_dump(_plain(dataclasses.asdict(self)), sort_keys=False, allow_unicode=True)


SECTIONS = {"model": ModelConfig, "data": DataConfig, "augment": AugmentConfig, "checkpoint": CheckpointConfig}


def _plain(value):
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return list(value) if isinstance(value, tuple) else value


# ---- from files and command line to a checked Config ----------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """YAML as recipes mean it: a key is text and comes once, dates stay text, and nothing refers to something else.

    Left alone PyYAML silently takes the last of two equal keys, and aliases of aliases make a small file huge.
    """

    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":timestamp")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            raise _malformed(self.peek_event(), "aliases (*name) are not read: write the value out")
        return super().compose_node(parent, index)

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key, _ in node.value:
            if not key.tag.endswith((":str", ":merge")):
                raise _malformed(key, f"the key {key.value if key.id == 'scalar' else ''} is not text: quote it")
            if key.value in seen:
                raise _malformed(key, f"the key '{key.value}' is there twice")
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _malformed(node: yaml.Node | yaml.Event, problem: str) -> yaml.YAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)


def _read(text: str):
    """The plain values that a text means as YAML; YAMLError if it is none."""
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError:
        raise
    except Exception as error:  # PyYAML lets through what `!!int x` or ten thousand brackets raise
        raise yaml.YAMLError(f"{type(error).__name__}: {error}") from error


def read_yaml(path: Path) -> dict:
    """The tree of plain values in a YAML file; UserError names the file and, where it is malformed, the line."""
    try:
        tree = _read(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        known = sorted(recipe.stem for recipe in RECIPES.glob("*.yaml"))
        hint = _nearest(path.stem, known) or f"recipes: {', '.join(known)}"
        raise UserError(f"--config: there is no file {path}; {hint}", USAGE) from None
    except UnicodeDecodeError:
        raise UserError(f"--config: {path} is not a text file in UTF-8", USAGE) from None
    except (OSError, ValueError) as error:
        raise UserError(f"--config: {path} can't be read: {error}", USAGE) from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}, line {mark.line + 1}" if mark else path
        raise UserError(f"{where}: not valid YAML ({getattr(error, 'problem', error)})", USAGE) from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: expected 'key: value' lines, found {type(tree).__name__}", USAGE)
    return tree


def check(tree: dict, origin: str) -> Config:
    """Parse and check a merged tree. UserError names each wrong field, its value and what is allowed."""
    try:
        return TypeAdapter(Config).validate_python(tree)
    except ValidationError as error:
        lines = [_explain(problem) for problem in error.errors()]
        more = f"; and {len(lines) - 5} more" if len(lines) > 5 else ""
        raise UserError(f"{origin}: " + "; ".join(lines[:5]) + more, USAGE) from None


def parse(argv: list[str] | None = None) -> tuple[Config, Path | None]:
    """The command line of train.py as (configuration, run folder to resume or None).

    A resumed run has its own config.yaml for a recipe, unless --config names one; what differs is judged later, by
    `runs.opened`. `--help` prints the options with the chosen recipe's values as defaults and exits.

    Raises:
        UserError: an option or value that does not exist (the nearest valid one is named) or is out of range.
    """
    argv = sys.argv[1:] if argv is None else argv
    first = QuietParser(add_help=False, allow_abbrev=False)
    for name in ("--config", "--run_name", "--output_dir"):
        first.add_argument(name)
    first.add_argument("--resume", nargs="?", const="")
    chosen, _ = first.parse_known_args(argv)

    path = Path(chosen.config) if chosen.config else DEFAULT_RECIPE
    run = None if chosen.resume is None else _run_to_resume(chosen, path)
    if run and not chosen.config:
        path = run / "config.yaml"
    tree = read_yaml(path)
    tree.setdefault("recipe", _recipe_name(path))

    overrides = vars(_parser(tree, path).parse_args(argv))
    overrides.pop("config", None), overrides.pop("resume", None)
    return overridden(tree, overrides, path), run


def overridden(tree: dict, overrides: dict[str, str], path: Path) -> Config:
    """The tree of a file with single values replaced (`{"phases.finetune.lr": "3e-5"}`), checked."""
    for dotted, text in overrides.items():
        _set(tree, dotted, text)
    return check(tree, f"{path} and command line" if overrides else str(path))


def _run_to_resume(chosen: argparse.Namespace, recipe: Path) -> Path:
    """The run folder that --resume means: its own value, --run_name's, or the newest run of the recipe."""
    if chosen.resume and chosen.run_name:
        raise UserError("--resume: give a run folder or --run_name, not both", USAGE)
    tree = read_yaml(recipe)
    output_dir = Path(os.path.expanduser(str(chosen.output_dir or tree.get("output_dir") or Config.output_dir)))
    name = str(tree.get("recipe") or _recipe_name(recipe))
    if chosen.resume:
        run = Path(os.path.expanduser(chosen.resume))
    elif chosen.run_name:
        run = output_dir / chosen.run_name
    else:
        known = sorted(output_dir.glob("*/config.yaml"), key=lambda path: path.stat().st_mtime)
        run = next((path.parent for path in reversed(known) if read_yaml(path).get("recipe") == name), None)
        if run is None:
            raise UserError(f"--resume: {output_dir} holds no run of the recipe {name}; name one: --resume RUN", USAGE)
    if not os.path.isfile(run / "config.yaml"):  # pathlib's raises where a name is too long
        raise UserError(f"--resume: {run} is not a run folder (it has no config.yaml)", USAGE)
    return run


def _recipe_name(path: Path) -> str:
    return re.sub(r"[^\w.-]+", "-", path.stem).lstrip(".-")[:100] or "run"


class QuietParser(argparse.ArgumentParser):
    """Its errors are `UserError`s, of one line."""

    def error(self, message):
        raise UserError(message, USAGE)


class Parser(QuietParser):
    """An option that does not exist is answered with the nearest that does."""

    def parse_args(self, argv):
        values, unknown = self.parse_known_args(argv)
        if unknown:
            known = [option for action in self._actions for option in action.option_strings]
            name = unknown[0].split("=")[0]
            hint = _nearest(name, known) or f"see python {self.prog} --help"
            raise UserError(f"there is no option {name}; {hint}", USAGE)
        return values


def _parser(tree: dict, path: Path) -> Parser:
    """An option for each field, and for each field of each phase that the recipe names."""
    parser = Parser(
        prog="train.py",
        usage="accelerate launch train.py [--config FILE] [--OPTION VALUE ...]",
        allow_abbrev=False,
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=34, width=110),
        argument_default=argparse.SUPPRESS,
        description="Train an image classifier in phases. Without options: the report's Part 3, a pretrained\n"
        "ResNet-50 fine-tuned on CIFAR-100, first its head, then its last two stages.",
        epilog="examples:\n"
        "  accelerate launch train.py\n"
        "  accelerate launch --mixed_precision bf16 train.py --config recipes/deep_cnn.yaml\n"
        "  accelerate launch train.py --data.source ~/photos --data.image_size 224 --phases.finetune.lr 3e-5\n"
        f"\nDefaults shown are those of {path.name}; --config FILE --help shows another recipe's.\n"
        "Precision, devices and processes are set through Accelerate: accelerate launch --help.",
    )
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help="recipe to start from (default: recipes/resnet50.yaml)"
    )
    parser.add_argument(
        "--resume",
        nargs="?",
        metavar="RUN",
        help="go on from a run folder's newest checkpoint (default: the folder of --run_name, or this recipe's newest)",
    )
    for name, cls in {"run": Config, **SECTIONS}.items():
        values = tree if name == "run" else tree.get(name)
        _add_group(parser, name, "" if name == "run" else f"{name}.", cls, values)
    phases = tree.get("phases")
    for name, values in (phases if isinstance(phases, dict) else {}).items():
        _add_group(parser, f"phase '{name}'", f"phases.{name}.", PhaseConfig, values)
    return parser


def add_data_options(parser: Parser, names: tuple[str, ...], title: str, about: str) -> None:
    """Options for some fields of the data section, which have no value unless they are given."""
    group = parser.add_argument_group(title, about)
    for name in names:
        field = DataConfig.__pydantic_fields__[name]
        metavar, text = _metavar(field.annotation), field.description.replace("%", "%%")
        group.add_argument(f"--data.{name}", default=argparse.SUPPRESS, metavar=metavar, help=text)


def _add_group(parser, title, prefix, cls, values):
    group = parser.add_argument_group(title, None if cls is Config else cls.__doc__)
    values = values if isinstance(values, dict) else {}
    for name, field in cls.__pydantic_fields__.items():
        if field.description is None:  # a section, or a recorded fact
            continue
        default = values.get(name, field.default)
        text = field.description
        if "(default" not in text or values.get(name) is not None:
            text += " (required)" if default is PydanticUndefined else f" [{_show(default)}]"
        group.add_argument(f"--{prefix}{name}", metavar=_metavar(field.annotation), help=text.replace("%", "%%"))


def _show(value) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, (list, tuple)):
        return ",".join(map(_show, value))
    return plain(value) if isinstance(value, str) else _quoted(value)


def _quoted(value) -> str:
    """A value as messages show it, cut where it is long."""
    try:
        return SHORT.repr(value)
    except ValueError:  # Python does not write out a number of thousands of digits
        return "a number of thousands of digits"


def _metavar(annotation) -> str:
    options = [option for option in (typing.get_args(annotation) or (annotation,)) if option is not type(None)]
    if typing.get_origin(annotation) is Literal:
        return "|".join(options)
    if typing.get_origin(annotation) is tuple:
        return "NAMES"
    if "auto" in typing.get_args(options[-1]):
        return "INT|auto"
    return {bool: "true|false", int: "INT", float: "FLOAT"}.get(options[0], "TEXT")


def _set(tree: dict, dotted: str, text: str):
    """Put one override into the tree; its text is read as YAML reads it, so `null`, `true` and `[a, b]` work."""
    *parents, name = dotted.split(".")
    for parent in parents:
        if not isinstance(tree.get(parent), dict):
            tree[parent] = {}
        tree = tree[parent]
    field = _fields_at(dotted.split(".")[:-1])[name]
    try:
        # Text stays text: a run may be called 2026-11-23, or no.
        tree[name] = text if field.annotation in (str, str | None) and text != "null" else _read(text)
    except yaml.YAMLError:
        tree[name] = text


def _explain(problem: dict) -> str:
    """One pydantic error as one sentence in the words of this project."""
    location = [str(part) for part in problem["loc"] if part != "[key]"]
    location = location or ["?"]  # pydantic hides a key that is called [key]
    field, value = ".".join(location), problem["input"]
    fields = _fields_at(location[:-1])
    if problem["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        hint = _nearest(location[-1], list(fields)) or f"allowed: {', '.join(fields)}"
        return f"there is no {field}; {hint}"
    if problem["type"] in ("missing", "missing_argument"):
        return f"{field} is missing"
    if problem["type"] == "literal_error":
        allowed = typing.get_args(fields[location[-1]].annotation)
        hint = (_nearest(value, list(allowed)) if isinstance(value, str) else "") or "allowed"
        return f"{field}: {_quoted(value)} is not known; {hint} ({', '.join(allowed)})"
    if problem["type"] == "string_pattern_mismatch":
        signs = "_ -" if location[0] == "phases" else "_ . -"
        return f"{field}: {_quoted(value)} must be a plain name (letters, digits, {signs}, no slash)"
    message = problem["msg"].removeprefix("Value error, ").replace("Input should", "should")
    message = re.sub(r" or an instance of \w+|^String (?=should)", "", message)
    return f"{field or 'configuration'}: {message}" + ("" if isinstance(value, dict) else f", not {_quoted(value)}")


def _fields_at(location: list[str]) -> dict:
    """The fields of the section that an error's location lies in."""
    if not location:
        return Config.__pydantic_fields__
    sections = SECTIONS | {"environment": Environment}
    return (PhaseConfig if location[0] == "phases" else sections.get(location[0], Config)).__pydantic_fields__


def _nearest(word: str, known: list[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]}?" if close else ""
