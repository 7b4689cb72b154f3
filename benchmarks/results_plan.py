"""The plan of the results tables: which runs it wants, how each is started, and which are done.

docs/results/plan.yaml holds the plan. Beside it is a folder of small files for each finished run; beside a run's own
folder is a note of how it was made.
"""

import dataclasses
import json
import re
import shlex
from pathlib import Path
from typing import Annotated, Any, Literal

import turns
import yaml
from patches import PATCHES  # filled by the files that it imports
from patching import mark
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

import commandline
from config import PLAIN_NAME, Config
from errors import USAGE, UserError
from recipe import check, read_yaml

ROOT = turns.ROOT
RESULTS = ROOT / "docs" / "results"
MADE = "made.json"
ROBUSTNESS = "predictions/robustness.json"
VIEWS = "views.json"  # a kept run's test figures with six views of each image averaged
WEIGHTS = ["--model.weights", "WEIGHTS"]
MEASURED = r"^(# )Measured on [^\n]*(\n)"  # a recipe's line

Part = Literal["reproduce", "explain", "confirm", "tune", "beat"]
State = Literal["done", "cut short", "missing", "changed"]


class Section(BaseModel):
    """A part of the plan: rows, and what they have in common."""

    model_config = ConfigDict(extra="forbid")

    recipe: str | None = None
    options: list[str] = []
    seeds: list[int] = [0]
    judged: bool = True
    gpu: bool = False
    against: str | None = None  # the row that each of its rows differs from by one change
    rows: list[dict[str, Any]]

    def row(self, part: str, own: dict[str, Any]) -> "Row":
        common = {"judged": self.judged, "seeds": self.seeds, "gpu": self.gpu, "against": self.against}
        common |= {"recipe": self.recipe} if self.recipe else {}
        row = Row.model_validate(common | own | {"part": part})
        return row.model_copy(update={"options": [*self.options, *row.options]})


class Row(BaseModel):
    """A row of the tables: one or more runs that differ by their seed alone."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Annotated[str, Field(**PLAIN_NAME)]
    part: Part
    what: str = Field(min_length=1)
    recipe: Annotated[str, Field(**PLAIN_NAME)]
    options: list[str] = []
    patches: list[str] = []
    seeds: list[int] = Field([0], min_length=1)
    judged: bool = True  # under the corruptions, and with six views of each image
    gpu: bool = False  # too much for a CPU
    against: str | None = None

    @property
    def script(self) -> list[str]:
        return ["benchmarks/patches.py", *self.patches, "--"] if self.patches else ["train.py"]

    def runs(self) -> dict[str, list[str]]:
        """Commands by run name, without the launcher, with DATA and WEIGHTS as placeholders."""
        command = [*self.script, "--config", f"recipes/{self.recipe}.yaml", "--data.source", "DATA"]
        command += [*self.options, "--tracking", "none"]
        names = {seed: f"{self.name}-seed{seed}" for seed in self.seeds}
        return {name: [*command, "--seed", str(seed), "--run_name", name] for seed, name in names.items()}

    @property
    def speaks_for_its_recipe(self) -> bool:
        """Whether it measures the recipe itself, so that its file shows the result."""
        return self.against is None and self.name == self.recipe and not self.patches and self.options in ([], WEIGHTS)

    @property
    def can_be_resumed(self) -> bool:
        return "ema" not in self.patches  # its averages are in no checkpoint

    def resume(self, folder: Path) -> list[str]:
        """What resumes a run."""
        return [*self.script, "--resume", str(folder)]


def launcher(precision: str) -> list[str]:
    return ["accelerate", "launch", "--config_file", "accelerate_config.yaml", "--mixed_precision", precision]


def read_plan(path: Path) -> list[Row]:
    """The plan's rows; UserError if it can't be read or names something missing."""
    where, plan = "", []
    try:
        sections = TypeAdapter(dict[Part, Section]).validate_python(yaml.safe_load(path.read_text(encoding="utf-8")))
        for part, section in sections.items():
            for number, own in enumerate(section.rows, start=1):
                where = f"{own.get('name', f'row {number} of {part}')}: "
                plan.append(section.row(part, own))
    except ValidationError as error:
        problem = error.errors()[0]
        raise UserError(f"{path}: {where}{'.'.join(map(str, problem['loc']))}: {problem['msg']}", USAGE) from None
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{path} can't be read: {error}", USAGE) from None
    names = [row.name for row in plan]
    for row in plan:
        if names.count(row.name) > 1:
            raise UserError(f"{path}: {row.name} is listed twice", USAGE)
        if not recipe_of(row).is_file():
            raise UserError(f"{path}: {row.name}: there is no {recipe_of(row)}", USAGE)
        if (
            row.speaks_for_its_recipe
            and len(re.findall(MEASURED, recipe_of(row).read_text(encoding="utf-8"), re.MULTILINE)) != 1
        ):
            raise UserError(f"{recipe_of(row)}: should have one line that begins with '# Measured on'", USAGE)
        if row.against is not None and row.against not in names:
            raise UserError(f"{path}: {row.name}: there is no row {row.against} to compare it with", USAGE)
        if unknown := set(row.patches) - set(PATCHES):
            raise UserError(f"{path}: {row.name}: there is no patch {min(unknown)}", USAGE)
    return plan


def recipe_of(row: Row) -> Path:
    return ROOT / "recipes" / f"{row.recipe}.yaml"


# ---- progress -------------------------------------------------------------------------------------------------------


def state(row: Row, run: str, runs: Path) -> State:
    """How far a run is. Done: its files are kept. Changed: it exists, but no longer fits the plan."""
    kept, note = RESULTS / run, note_of(runs, run)
    whole = (kept / MADE).is_file() and ((kept / ROBUSTNESS).is_file() or not row.judged)
    if whole and as_planned(row, run, kept, kept / MADE):
        return "done"
    if note.is_file() and as_planned(row, run, runs / run, note):
        return "cut short"
    return "changed" if kept.exists() or note.is_file() else "missing"


def lacks_views(row: Row, run: str, runs: Path) -> bool:
    """Whether a kept run, made before runs were judged with six views, can still be: its weights are there."""
    note = note_of(runs, run)
    if not row.judged or (RESULTS / run / VIEWS).is_file() or not note.is_file():
        return False
    return (runs / run / "best").is_dir() and as_planned(row, run, runs / run, note)


def as_planned(row: Row, run: str, folder: Path, made: Path) -> bool:
    """Whether a run's command, and its configuration if there is one yet, fit the current plan."""
    if read_made(made)["command"] != shlex.join(row.runs()[run]):
        return False
    if not (folder / "config.yaml").is_file():
        return True
    trained = check(read_yaml(folder / "config.yaml"), str(folder / "config.yaml"))
    return dataclasses.replace(without_place(trained), environment=None) == without_place(planned(row, run))


def planned(row: Row, run: str) -> Config:
    """The configuration a run should have, without environment."""
    command = row.runs()[run]
    config, _ = commandline.parse(["--config", str(recipe_of(row)), *command[command.index("--data.source") :]])
    return dataclasses.replace(config, recipe=config.recipe + mark(row.patches))


def without_place(config: Config) -> Config:
    """The configuration without a run's name, its paths, how this machine reads the data, and of which commit."""
    weights = "WEIGHTS" if config.model.weights else None
    return dataclasses.replace(
        config,
        run_name=None,
        output_dir="runs",
        data=dataclasses.replace(config.data, source="DATA", streaming=None, revision=None),
        model=dataclasses.replace(config.model, weights=weights),
    )


def read_made(path: Path) -> dict:
    """How a run was made; UserError if that can't be read."""
    try:
        made = json.loads(path.read_text(encoding="utf-8"))
        made["command"], made["precision"], made["sessions"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({type(error).__name__}: {error}); delete it to start over") from None
    return made


def note_of(runs: Path, run: str) -> Path:
    """The path of the note on how a run is made: beside its folder, which does not exist at the start."""
    return runs / f"{run}.{MADE}"
