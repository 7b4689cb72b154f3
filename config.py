"""The configuration: what a run is, and which values are valid.

A run is a model, a data source and a list of phases. Each field's type, range and explanation are stated once, here;
`--help` (commandline.py), the checks and their messages (recipe.py) are made from them. No torch here: `--help` must
answer at once.
"""

import dataclasses
import glob
import os
import re
import typing
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import (
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    field_validator,
    model_validator,
)
from pydantic.dataclasses import dataclass

from errors import USAGE, UserError
from text import UNPRINTABLE

STRICT = ConfigDict(extra="forbid", coerce_numbers_to_str=True, allow_inf_nan=False, protected_namespaces=())
PLAIN_NAME = {"pattern": r"^\w[\w.-]*$", "max_length": 100}  # one folder's name, never a path


def _split_commas(value):
    return [part.strip() for part in value.split(",")] if isinstance(value, str) else value


def _whole_or_auto(value):
    if value in (None, "auto") or (type(value) is int and value >= 1):
        return value
    raise ValueError("should be a whole number of at least 1, or auto")


def hub_id(text: str) -> str:
    """A repository's id on the hub, unchanged; ValueError if it can't be one."""
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
    """Checks on every field: `true` is not a number (pydantic takes it for 1), and text is printable."""

    @field_validator("*", mode="before")
    @classmethod
    def _as_meant(cls, value, info):
        annotation = cls.__pydantic_fields__[info.field_name].annotation
        if isinstance(value, bool) and bool not in (annotation, *typing.get_args(annotation)):
            raise ValueError("should not be true or false (YAML reads yes, no, on, off as these: put text in quotes)")
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
        min_length=1,
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
    subset: str | None = Field(None, min_length=1, description="which subset of a hub dataset, if it has several")
    revision: str | None = Field(
        None,
        min_length=1,
        description="which commit, branch or tag of a hub dataset; config.yaml records the commit, which a resumed run "
        "and predict.py read again (default: the newest; without a connection, the one in the cache)",
    )
    streaming: bool | None = Field(
        None,
        description="true: the main process reads rows as they arrive and hands out batches; false: download first, "
        "then each process reads its own rows memory-mapped, which feeds fast GPUs better (default: true for a hub "
        "source, false for others)",
    )
    image: str | None = Field(None, min_length=1, description="the image column (default: the only one of image type)")
    label: str | None = Field(
        None, min_length=1, description="the label column (default: the class label with the most classes)"
    )
    train_split: str = Field(
        "train", min_length=1, description="the split to train on; validation rows are held out of it"
    )
    test_split: str | None = Field(
        "test", min_length=1, description="the split to read once, after training; null: finish without test figures"
    )
    folds: int | None = Field(
        5,
        ge=2,
        description="parts that the training split is hashed into; validation is one of them, so 5 means 20 %; null: "
        "train on all of it, without validation (and so no plateau, no early stopping), and keep the last weights",
    )
    fold: int = Field(0, ge=0, description="which part is validation, 0 to folds - 1 (cross-validation: train each)")
    image_size: int | None = Field(
        None,
        ge=8,
        le=1024,
        description="side in pixels of the squares that images become: small square ones are enlarged on the device; "
        "larger ones, and those of other shapes or several sizes, are cropped to their centre while they are decoded "
        "(default: as they are)",
    )
    batch_size: int = Field(
        64, ge=1, description="images per optimizer step, all processes and gradient accumulation together"
    )
    micro_batch_size: MicroBatchSize = Field(
        None,
        description="images per forward pass of one process; if that is less than its share of the batch, gradients "
        "are accumulated, while batch norms that train see one forward pass at a time; auto: halve it, before "
        "training, until a step fits in memory (default: the whole share)",
    )
    workers: int | None = Field(
        None,
        ge=0,
        le=256,
        description="worker processes that decode images, for each training process (default: its cores less one, "
        "from 1 to 4; all its cores, up to 4, for decoding before training; up to 16 (4 where they are not forked) "
        "for predict.py's --images and distorted images)",
    )
    shuffle_buffer: int = Field(
        10_000,
        ge=1,
        description="rows that a stream is shuffled within, fewer if they take more than a GB (memory-mapped data is "
        "shuffled whole)",
    )
    keep_mb: int = Field(
        2048,
        ge=0,
        description="MB of memory in which to keep images, if all of them fit; 0: keep none. Memory-mapped images are "
        "decoded once, before training, and kept by each process, on its GPU if they take little of its memory. "
        "Streamed ones are kept by the main process as the first epoch reads them, decoded if that fits, too, and "
        "shuffled fully from then on; if they do not fit, each epoch reads them again",
    )
    on_corrupt: Literal["error", "skip"] = Field(
        "error",
        description="error: an image that can't be decoded ends the run, which names its row; skip: leave it out and "
        "count it",
    )
    embedded_rows: int = Field(
        10_000, ge=200, description="training rows of the 'embedded' source; its test split has a fifth of them"
    )

    @model_validator(mode="after")
    def _fold_exists(self):
        if self.folds is None and self.fold:
            raise ValueError(f"fold is {self.fold}, but folds is null: nothing is held out")
        if self.folds and self.fold >= self.folds:
            raise ValueError(f"fold is {self.fold}, but with {self.folds} folds it goes from 0 to {self.folds - 1}")
        return self

    @property
    def named(self) -> str:
        """The source as messages name it: with its subset and revision, if these are chosen."""
        subset = f", subset {self.subset}" if self.subset else ""
        revision = f" at {self.commit[:12] if self.commit else self.revision}" if self.revision else ""
        return f"{self.source}{subset}{revision}"

    @property
    def commit(self) -> str | None:
        """The revision, if it is a whole commit: branches and tags may move."""
        return self.revision if re.fullmatch("[0-9a-f]{40}", self.revision or "") else None

    @property
    def kind(self) -> Literal["embedded", "parquet", "folder", "hub"]:
        """What `source` is, judged by its form and by the disk, without reading any data.

        Raises:
            UserError: it looks like a path, but nothing usable is there.
        """
        if self.source == "embedded":
            return "embedded"
        try:
            path = Path(self.source).expanduser()
            if path.is_dir():
                return "parquet" if next(path.rglob("*.parquet"), None) else "folder"
            found = glob.glob(str(path), recursive=True)
        except (OSError, RuntimeError) as error:  # a name that is too long, no permission, an unknown ~user
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
    """How training images are augmented, batched, on the device."""

    policy: Literal["report", "augmix", "none"] = Field(
        "report",
        description="training augmentation. report: padded crop, flip, colour jitter 0.2, rotation up to 15 degrees; "
        "augmix: padded crop, flip, then AugMix without its consistency loss; none: normalise only",
    )
    mix: Literal["none", "mixup", "cutmix"] = Field(
        "none",
        description="mix each image with another of its micro-batch, and weight the loss of both labels by their "
        "shares. mixup: blend them, alpha 0.2; cutmix: paste a box of the other into half of the images, alpha 1",
    )
    distort: bool = Field(
        False,
        description="speckle noise or Gaussian blur on half of the training images. predict.py --robustness counts "
        "these two corruptions in its mean over 19, not in that over 15",
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
    """When a run is saved, besides each epoch's end and a signal to stop."""

    every_steps: int | None = Field(None, ge=1, description="optimizer steps between two checkpoints (default: off)")
    every_minutes: float | None = Field(10.0, gt=0, description="minutes between two checkpoints; null: don't count")
    keep: int = Field(2, ge=1, description="checkpoints to keep; older ones are removed, best/ never is")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Environment(_Section):
    """What a run ran on. Recorded in config.yaml, never set here: Accelerate decides precision and processes."""

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
    sync_batch_norm: bool = Field(
        False,
        description="batch norms in training mode take their statistics from a forward pass of all processes together, "
        "instead of each one's own; GPUs only",
    )
    tf32: bool = Field(
        False,
        description="compute fp32 matrix products and convolutions in TF32: faster, with 10 bits of mantissa; Nvidia "
        "GPUs only",
    )
    cuda_graphs: bool = Field(
        True,
        description="on a GPU: record the augmentation as a CUDA graph and replay it in each step, instead of "
        "launching its kernels one by one; with one process and no accumulation each phase's forward and backward "
        "pass, too. The results are the same, sooner, for somewhat more memory",
    )
    timeout_minutes: float = Field(
        30.0,
        gt=0,
        le=10_000,
        description="minutes that processes wait for one another; if one disappears with its machine, the others end "
        "after this long",
    )
    seed: int = Field(
        0, ge=0, lt=2**32 - 2**16, description="seed of initialisation, shuffling, augmentation and dropout"
    )  # less than NumPy takes, as each process adds its number
    recipe: str = Field("run", **PLAIN_NAME)  # the recipe file's name; the run is named after it
    run_name: str | None = Field(
        None, **PLAIN_NAME, description="folder of this run below output_dir (default: recipe and time)"
    )
    output_dir: str = Field("runs", min_length=1, description="folder that holds the runs")
    profile: int | None = Field(
        None,
        ge=1,
        description="trace this many steps of each phase's first epoch (after 3 to warm up) with torch's profiler, to "
        "RUN/profile/PHASE.json.gz, which ui.perfetto.dev opens (default: off)",
    )
    tracking: Literal["wandb", "none"] = Field(
        "wandb",
        description="where metrics go besides history.jsonl; without a key or a network wandb goes offline by itself",
    )
    push_to_hub: str | None = Field(
        None,
        description="after training, upload best/ with its model card to this repository on the hub, NAME/MODEL, "
        "which is created if need be, and public unless your account says otherwise; null: upload nothing",
    )
    environment: Environment | None = None

    @model_validator(mode="after")
    def _others_to_mix_with(self):
        if self.augment.mix != "none" and 1 in (self.data.batch_size, self.data.micro_batch_size):
            raise ValueError(f"augment.mix {self.augment.mix}: in a batch or micro-batch of 1 there is no other image")
        return self

    @model_validator(mode="after")
    def _validation_where_it_decides(self):
        if self.data.folds is None:
            decided = [f"phases.{name}.schedule" for name, it in self.phases.items() if it.schedule == "plateau"]
            decided += [f"phases.{name}.early_stopping" for name, it in self.phases.items() if it.early_stopping]
            if decided:
                raise ValueError(
                    f"data.folds null leaves no validation, which {', '.join(decided)} need: choose cosine or "
                    "constant schedules, and no early stopping"
                )
        return self

    @field_validator("push_to_hub")
    @classmethod
    def _on_the_hub(cls, value):
        return value if value is None else hub_id(value)

    def runs_folder(self) -> Path:
        """`output_dir` as a path, which need not exist yet.

        Raises:
            UserError: it can't be a folder to write to: it lies below a file, or we have no permission.
        """
        try:
            folder = Path(self.output_dir).expanduser()
            there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        except (OSError, RuntimeError) as error:  # a name that is too long, an unknown ~user
            raise UserError(f"output_dir: {self.output_dir} can't be used: {error}", USAGE) from None
        if not there.is_dir():
            raise UserError(f"output_dir: {there} is not a folder", USAGE)
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
