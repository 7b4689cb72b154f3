"""The results tables' runs: which there are, training those that are missing, and the tables made of them.

    python benchmarks/results.py                                           # what is done, cut short, missing
    python benchmarks/results.py --run --data CIFAR100 --weights WEIGHTS   # train what is missing, in order
    python benchmarks/results.py --run deep_cnn --data CIFAR100            # only this row
    python benchmarks/results.py --tables                                  # rebuild the tables

docs/results/plan.yaml says which runs there are. Each is trained by the shipped command (benchmarks/patches.py in the
place of train.py where a row names patches), judged under the 19 corruptions, and its small files are copied from
runs/NAME-seedN to docs/results/NAME-seedN: configuration, history, summary, robustness, and how it was made. A run that
was cut short is resumed; Ctrl-C cuts one short. The tables in README.md and docs/results.md, docs/comparison.md with
its curves and the measured line of recipes are written from those files, and no figure in them by hand.
"""

import argparse
import dataclasses
import datetime
import hashlib
import json
import os
import re
import shlex
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import turns
import yaml
from filelock import FileLock
from patches import PATCHES
from patching import mark
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

import commandline
import comparison
import report
from checkpoint import write_whole
from config import PLAIN_NAME, Config
from errors import USAGE, Interrupted, UserError, told
from recipe import check, read_yaml
from runfolder import Run, read_run

ROOT = turns.ROOT
RESULTS = ROOT / "docs" / "results"
MADE = "made.json"
ROBUSTNESS = "predictions/robustness.json"
WEIGHTS = ["--model.weights", "WEIGHTS"]
MEASURED = r"(?m)^(# )Measured on [^\n]*(\n)"


# ---- the plan -------------------------------------------------------------------------------------------------------


Part = Literal["reproduce", "explain", "beat"]


class Section(BaseModel):
    """A part of the plan: rows, and what they have in common."""

    model_config = ConfigDict(extra="forbid")

    recipe: str | None = None
    options: list[str] = []
    robustness: bool = True
    rows: list[dict[str, Any]]

    def row(self, part: str, own: dict[str, Any]) -> "Row":
        common = {"robustness": self.robustness} | ({"recipe": self.recipe} if self.recipe else {})
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
    robustness: bool = True

    @property
    def script(self) -> list[str]:
        return ["benchmarks/patches.py", *self.patches, "--"] if self.patches else ["train.py"]

    def runs(self) -> dict[str, list[str]]:
        """Commands without their launcher, with DATA and WEIGHTS in them, by the names of the runs."""
        command = [*self.script, "--config", f"recipes/{self.recipe}.yaml", "--data.source", "DATA"]
        command += [*self.options, "--tracking", "none"]
        names = {seed: f"{self.name}-seed{seed}" for seed in self.seeds}
        return {name: [*command, "--seed", str(seed), "--run_name", name] for seed, name in names.items()}

    @property
    def speaks_for_its_recipe(self) -> bool:
        """Whether what it measures is the recipe itself, and stands in its file."""
        return (
            self.part != "explain" and self.name == self.recipe and not self.patches and self.options in ([], WEIGHTS)
        )

    def resume(self, folder: Path) -> list[str]:
        """What goes on with a run."""
        return [*self.script, "--resume", str(folder)]


def launch(precision: str) -> list[str]:
    return ["accelerate", "launch", "--config_file", "accelerate_config.yaml", "--mixed_precision", precision]


def read_plan(path: Path) -> list[Row]:
    """The plan's rows; UserError if it can't be read or names what is not there."""
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
            raise UserError(f"{path}: {row.name} is there twice", USAGE)
        if not recipe_of(row).is_file():
            raise UserError(f"{path}: {row.name}: there is no {recipe_of(row)}", USAGE)
        if row.speaks_for_its_recipe and len(re.findall(MEASURED, recipe_of(row).read_text(encoding="utf-8"))) != 1:
            raise UserError(f"{recipe_of(row)}: should have one line that begins with '# Measured on'", USAGE)
        if unknown := set(row.patches) - set(PATCHES):
            raise UserError(f"{path}: {row.name}: there is no patch {min(unknown)}", USAGE)
    return plan


def recipe_of(row: Row) -> Path:
    return ROOT / "recipes" / f"{row.recipe}.yaml"


def state(row: Row, run: str, runs: Path) -> str:
    """Whether a run is done (its files are kept), cut short or missing, or is there, but not as it is planned now."""
    kept, note = RESULTS / run, note_of(runs, run)
    if (kept / MADE).is_file() and as_planned(row, run, kept):
        return "done"
    if note.is_file() and read_made(note)["command"] == shlex.join(row.runs()[run]):
        return "cut short"
    return "changed" if kept.exists() or note.is_file() else "missing"


def as_planned(row: Row, run: str, kept: Path) -> bool:
    """Whether kept files are those of the plan and of the recipe as it is now."""
    command = row.runs()[run]
    if read_made(kept / MADE)["command"] != shlex.join(command):
        return False
    if row.robustness and not (kept / ROBUSTNESS).is_file():
        return False
    trained = check(read_yaml(kept / "config.yaml"), str(kept / "config.yaml"))
    return dataclasses.replace(without_place(trained), environment=None) == without_place(planned(row, run))


def planned(row: Row, run: str) -> Config:
    """What a run's config.yaml is to say, with DATA and WEIGHTS in it, and without its environment."""
    command = row.runs()[run]
    config, _ = commandline.parse(["--config", str(recipe_of(row)), *command[command.index("--data.source") :]])
    return dataclasses.replace(config, recipe=config.recipe + mark(row.patches))


def without_place(config: Config) -> Config:
    """The configuration without what says where a run lies, and how this machine reads the data."""
    return dataclasses.replace(
        config, run_name=None, output_dir="runs", data=dataclasses.replace(config.data, streaming=None)
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
    """Where it is noted how a run is made. Beside its folder, which is not there yet when the run is started."""
    return runs / f"{run}.{MADE}"


# ---- training what is missing ---------------------------------------------------------------------------------------


def complete(row: Row, run: str, args) -> None:
    """Train a run, or go on with it, judge it, and keep its small files."""
    check_startable(row, run, args.runs)
    folder, note, command = args.runs / run, note_of(args.runs, run), row.runs()[run]
    made = {"command": shlex.join(command), "precision": args.mixed_precision, "sessions": []}
    if note.is_file():
        made = read_made(note)

    def session(does: str, *words: str) -> None:
        facts = {"does": does, "commit": commit(), "date": str(datetime.date.today()), "machine": turns.conditions()}
        facts["machine"].pop("precision", None)  # the machine's fast one, not the run's
        if does == "train" and "WEIGHTS" in row.options:
            facts["weights_sha256"] = digest(Path(args.weights))
        made["sessions"].append(facts)
        write_whole(note, json.dumps(made, indent=1) + "\n")
        code, facts["peak_memory_mib"] = execute(args, [*launch(made["precision"]), *words], folder)
        write_whole(note, json.dumps(made, indent=1) + "\n")
        if code:
            raise UserError(f"{run}: that command has ended with exit code {code}, for the reason above")

    args.runs.mkdir(parents=True, exist_ok=True)
    if not (folder / "summary.json").is_file():
        own = row.resume(folder) if folder.is_dir() else [*command, "--output_dir", str(args.runs)]
        session("train", *own)
    if row.robustness and not (folder / ROBUSTNESS).is_file():
        session("judge", "predict.py", str(folder), "--robustness")
    keep(row, folder, note)


def check_startable(row: Row, run: str, runs: Path) -> None:
    """UserError if what is in the way of a run has to be moved or deleted first."""
    folder, note = runs / run, note_of(runs, run)
    if folder.exists() and not note.is_file():
        raise UserError(f"{folder} is there, but not {note}, which says how it was made: move it away")
    if note.is_file() and read_made(note)["command"] != shlex.join(row.runs()[run]):
        raise UserError(f"{folder} was started by another command than the plan's: delete it and {note} to start over")


def digest(weights: Path) -> str:
    """SHA-256 of a file of weights, or of that in a run's best/."""
    path = weights / "model.safetensors" if weights.is_dir() else weights
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def execute(args, command: list[str], folder: Path) -> tuple[int, int]:
    """Run a command of the project, shown first: its exit code, and its processes' peak memory in MiB.

    Ctrl-C reaches all of its processes. The launcher ends at once, the training when its checkpoint is written.
    """
    print("$", shlex.join(command), flush=True)
    found = {"DATA": args.data, "WEIGHTS": args.weights}
    words = [found.get(word, word) for word in command[2:]]  # after accelerate launch
    process = subprocess.Popen([sys.executable, "-m", "accelerate.commands.launch", *words], cwd=ROOT)
    try:
        _, status, usage = os.wait4(process.pid, 0)
    except KeyboardInterrupt:
        process.wait()
        if (folder / "checkpoints").is_dir():
            FileLock(folder / "checkpoints" / ".lock").acquire()
        raise Interrupted("stopped; the same command goes on", 2) from None
    return os.waitstatus_to_exitcode(status), usage.ru_maxrss // 1024


def commit() -> str:
    """The commit of the working tree, marked if anything has changed since that a run is made by."""
    makes = ("*.py", "recipes", "accelerate_config.yaml", "requirements.txt")
    try:
        git = ["git", "-C", str(ROOT)]
        name = subprocess.run([*git, "rev-parse", "--short=7", "HEAD"], capture_output=True, text=True).stdout.strip()
        changed = subprocess.run([*git, "status", "--porcelain", "--", *makes], capture_output=True).stdout
    except OSError:
        return "unknown"
    return f"{name} and changes" if changed else name or "unknown"


def keep(row: Row, folder: Path, note: Path) -> None:
    """Copy what tables are made of, whole or not at all, without this machine's paths."""
    unfinished, target = RESULTS / f".{folder.name}", RESULTS / folder.name
    shutil.rmtree(unfinished, ignore_errors=True)
    (unfinished / "predictions").mkdir(parents=True)
    for name in ("history.jsonl", "summary.json"):
        shutil.copy(folder / name, unfinished)
    shutil.copy(note, unfinished / MADE)
    config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    config["data"]["source"], config["output_dir"] = "DATA", "runs"
    if config["model"].get("weights"):
        config["model"]["weights"] = "WEIGHTS"
    (unfinished / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    if row.robustness:
        found = json.loads((folder / ROBUSTNESS).read_text(encoding="utf-8"))
        (unfinished / ROBUSTNESS).write_text(json.dumps(found | {"source": "DATA"}) + "\n", encoding="utf-8")
    shutil.rmtree(target, ignore_errors=True)
    unfinished.rename(target)


# ---- the tables -----------------------------------------------------------------------------------------------------

Figures = dict[str, Any]  # numbers, or None where there is no such figure; the run itself, and how it was made


def figures(folder: Path) -> Figures:
    """What the tables say of a kept run: fractions, nats, minutes, MiB. None where there is no such figure."""
    run: Run = read_run(folder)
    if run.notes or not run.summary or not run.history:
        raise UserError(f"{folder} is damaged: {'; '.join(run.notes) or 'it has no summary or no history'}")
    best, found, changes = comparison.best_epoch(run), comparison.robustness(run), comparison.phase_changes(run)
    made = read_made(folder / MADE)
    pairs = zip(run.history, run.history[1:], strict=False)
    fell = [a["epoch"] for a, b in pairs if a["phase"] == b["phase"] and b["lr"] < 0.2 * a["lr"]]  # not a cosine's
    names = ("train_loss", "train_top1", "val_loss", "val_top1")
    jump = changes[0] if changes else None
    return {
        "run": run,
        "epochs": len(run.history),
        **{name: best[name] for name in names},
        **{name: run.summary[name] for name in ("test_loss", "test_top1", "minutes")},
        "mean15": found.mean15 if found else None,
        "jump": jump.one - jump.top1 if jump else None,
        "later": jump.several - jump.top1 if jump and jump.several is not None else None,
        "span": jump.span if jump else None,
        "fell": ", ".join(map(str, fell)) or "-",
        "memory": max(it.get("peak_memory_mib", 0) for it in made["sessions"] if it["does"] == "train") or None,
        "made": made,
    }


def spread(values: list, form: str, scale: float = 1.0) -> str:
    """Mean and, of several, standard deviation over the seeds."""
    if any(value is None for value in values):
        return "-"
    values = [scale * value for value in values]
    mean = format(statistics.mean(values), form)
    return mean if len(values) == 1 else f"{mean} ± {format(statistics.stdev(values), form.lstrip('+'))}"


def mean_of(name: str, form: str, scale: float = 1.0) -> Callable[[list[Figures]], str]:
    return lambda found: spread([it[name] for it in found], form, scale)


def jumps(found: list[Figures]) -> str:
    one, later = mean_of("jump", "+.1f", 100)(found), mean_of("later", "+.1f", 100)(found)
    return one if later == "-" else f"{one} in one epoch, {later} in {found[0]['span']}"


COLUMNS: dict[str, Callable[[list[Figures]], str]] = {
    "epochs": mean_of("epochs", ".0f"),
    "train loss": mean_of("train_loss", ".3f"),
    "train top-1 %": mean_of("train_top1", ".1f", 100),
    "val loss": mean_of("val_loss", ".3f"),
    "val top-1 %": mean_of("val_top1", ".1f", 100),
    "test loss": mean_of("test_loss", ".3f"),
    "test top-1 %": mean_of("test_top1", ".1f", 100),
    "robustness %": mean_of("mean15", ".1f", 100),
    "phase change, points": jumps,
    "lr fell after epoch": lambda found: "; ".join(it["fell"] for it in found),
    "minutes": mean_of("minutes", ".0f"),
    "peak MiB": mean_of("memory", ",.0f"),
}
COMPARISON = """# The runs of the results, side by side

Written by `python benchmarks/results.py --tables` from the files in [results/](results/). The commands, data, weights
and machines behind them: [results.md](results.md)."""
SHORT = ("epochs", "val top-1 %", "test top-1 %", "robustness %", "minutes")
Finished = list[tuple[Row, list[Figures]]]


def table(rows: Finished, columns) -> str:
    """Markdown: a line for each row that has a finished run."""
    lines = [[row.what, str(len(found)), *(COLUMNS[column](found) for column in columns)] for row, found in rows]
    return markdown(["", "seeds", *columns], lines)


def ablation(rows: Finished, first: Row) -> str:
    """Markdown: each row against the section's first one, which each other row has one change to.

    Changes are judged on the validation rows: the test split is no place to choose by.
    """
    columns, lines = ("val top-1 %", "val loss", "train top-1 %", "minutes"), []
    reached = {row.name: statistics.mean(it["val_top1"] for it in found) for row, found in rows}
    for row, found in rows:
        gained = "-"
        if row.name != first.name and first.name in reached:
            gained = format(100 * (reached[row.name] - reached[first.name]), "+.1f")
        lines.append([row.what, str(len(found)), gained, *(COLUMNS[column](found) for column in columns)])
    return markdown(["", "seeds", "points of val top-1", *columns], lines)


def markdown(head: list[str], lines: list[list[str]]) -> str:
    return "\n".join(
        f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in [head, ["---"] * len(head), *lines]
    )


def how(rows: Finished) -> str:
    """The commands behind a table, with their commits, dates and machines."""
    lines = []
    for row, found in rows:
        made = [it["made"] for it in found]
        precisions = sorted({it["precision"] for it in made})
        if len(precisions) > 1:
            raise UserError(f"{row.name}: its seeds were trained in {' and '.join(precisions)}; train them in one")
        sessions = [session for it in made for session in it["sessions"]]
        facts = [
            sorted(
                {", ".join(it["machine"][key] for key in ("device", "machine", "cpu_capability")) for it in sessions}
            ),
            ["commit " + ", ".join(sorted({it["commit"] for it in sessions}))],
            [", ".join(sorted({it["date"] for it in sessions}))],
            sorted({f"weights' SHA-256 {it['weights_sha256'][:12]}..." for it in sessions if "weights_sha256" in it}),
        ]
        seeds = f", and seeds {', '.join(map(str, row.seeds[1:]))}" if found[1:] else ""
        lines.append(
            f"- {row.what}: `{shlex.join([*launch(precisions[0]), *shlex.split(made[0]['command'])])}`{seeds} "
            f"({'; '.join(fact for group in facts for fact in group)})"
        )
    return "\n".join(lines)


def put(path: Path, pattern: str, text: str) -> None:
    """Write text in the place of a pattern that has to be in the file once; around it stay groups 1 and 2."""
    old = path.read_text(encoding="utf-8")
    new, count = re.subn(pattern, lambda found: f"{found[1]}{text}{found[2]}", old, flags=re.DOTALL | re.MULTILINE)
    if count != 1:
        raise UserError(f"{path}: {pattern} should match once, and does {count} times")
    if new != old:
        write_whole(path, new)
        print(f"written: {path.relative_to(ROOT)}")


def put_table(path: Path, name: str, text: str) -> None:
    """Write a table between its marks."""
    put(path, rf"(^<!-- results: {name} -->\n)(?:(?!<!--).)*?(^<!-- end -->)", f"{text}\n")


def measured(row: Row, found: list[Figures]) -> str:
    """A recipe's measured line."""
    seeds = f"{len(found)} seeds" if found[1:] else "one seed"
    weights = " from Tiny ImageNet weights (not ImageNet)," if row.options else ""
    made = found[0]["made"]
    precision, device = made["precision"].replace("no", "fp32"), made["sessions"][0]["machine"]["device"]
    return (
        f"Measured on CIFAR-100,{weights} {precision}, {device}, {seeds}: "
        f"test top-1 {COLUMNS['test top-1 %'](found)} %. Conditions: docs/results.md."
    )


def write_tables(plan: list[Row], runs: Path) -> None:
    """Rebuild all tables, and the measured lines of recipes that were run as they are."""
    finished: Finished = []
    for row in plan:
        done = [run for run in row.runs() if state(row, run, runs) == "done"]
        if done:
            finished.append((row, [figures(RESULTS / run) for run in done]))
    for part in ("reproduce", "explain", "beat"):
        own = [(row, found) for row, found in finished if row.part == part]
        first = next((row for row in plan if row.part == part), None)
        made = ablation(own, first) if part == "explain" else table(own, COLUMNS)
        put_table(ROOT / "docs" / "results.md", part, f"{made}\n\n{how(own)}" if own else "Nothing yet.")
    main = [(row, found) for row, found in finished if row.part != "explain"]
    put_table(ROOT / "README.md", "summary", table(main, SHORT) if main else "Nothing yet.")
    write_comparison([it["run"] for _, found in main for it in found])
    for row, found in main:
        if row.speaks_for_its_recipe:
            put(recipe_of(row), MEASURED, measured(row, found))


def write_comparison(runs: list[Run]) -> None:
    """The comparison as a page of Markdown, with the runs' curves."""
    import plots

    folder = ROOT / "docs" / "curves"
    parts = [COMPARISON, report.markdown(runs, with_commands=False) if runs else "Nothing yet."]
    folder.mkdir(exist_ok=True)
    for picture in plots.curves(runs, with_legend=True) if runs else ():
        write_whole(folder / f"{picture.stem}.svg", picture.encode("svg").decode())
        parts.append(f"![{picture.alt}](curves/{picture.stem}.svg)")
    write_whole(ROOT / "docs" / "comparison.md", "\n\n".join(parts) + "\n")


# ---- the command line -----------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", nargs="*", metavar="NAME", help="train what these rows lack [all], then --tables")
    parser.add_argument("--tables", action="store_true", help="rebuild the tables")
    parser.add_argument("--data", default="uoft-cs/cifar100", help="CIFAR-100: folder of parquet [the hub's]")
    parser.add_argument("--weights", help="ResNet-50 pretrained on Tiny ImageNet: .safetensors, or a run's best/")
    parser.add_argument("--mixed_precision", choices=("no", "bf16", "fp16"), default="no", help="of new runs [no]")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder that holds the runs [runs]")
    args = parser.parse_args()
    args.runs = args.runs.absolute()
    args.data, args.weights = (
        str(Path(it).absolute()) if it and Path(it).exists() else it for it in (args.data, args.weights)
    )
    plan_file = RESULTS / "plan.yaml"
    plan = read_plan(plan_file)
    if unknown := set(args.run or ()) - {row.name for row in plan}:
        raise UserError(f"--run: there is no row {min(unknown)} in {plan_file}", USAGE)
    wanted = [row for row in plan if args.run is not None and (not args.run or row.name in args.run)]
    missing = [(row, run) for row in wanted for run in row.runs() if state(row, run, args.runs) != "done"]
    if lacking := [row.name for row, _ in missing if "WEIGHTS" in row.options and not args.weights]:
        raise UserError(f"--weights: {lacking[0]} needs them; or name other rows after --run", USAGE)
    for row, run in missing:
        check_startable(row, run, args.runs)
    for row, run in missing:
        complete(row, run, args)
        write_tables(plan, args.runs)
    if args.tables or args.run is not None:
        return write_tables(plan, args.runs)
    for row in plan:
        for run in row.runs():
            print(f"{state(row, run, args.runs):10s} {row.part:10s} {run:34s} {row.what}")


if __name__ == "__main__":
    with told():
        main()
