"""The results table's runs: which there are, training those that are missing, and the tables made of them.

    python benchmarks/results.py                                           # what is done, cut short, missing
    python benchmarks/results.py --run --data CIFAR100 --weights WEIGHTS   # train what is missing, in order
    python benchmarks/results.py --run deep_cnn --data CIFAR100            # only this row
    python benchmarks/results.py --tables                                  # rebuild the tables

docs/results/plan.yaml says which runs there are. Each is trained by the shipped command (with benchmarks/patches.py in
the place of train.py where a row names patches), judged under the 19 corruptions, and its small files are copied from
runs/NAME-seedN to docs/results/NAME-seedN: configuration, history, summary, robustness, and how it was made. A run that
was cut short is resumed. The tables in README.md and docs/results.md and the measured line of recipes are written from
those files, and no figure in them by hand.
"""

import argparse
import datetime
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
from typing import Annotated, Literal

import turns
import yaml
from patches import PATCHES
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

import comparison
from checkpoint import write_whole
from config import PLAIN_NAME
from errors import USAGE, UserError, told
from runfolder import Run, read_run

ROOT = turns.ROOT
RESULTS = ROOT / "docs" / "results"
KEPT = ("config.yaml", "history.jsonl", "summary.json")  # and predictions/robustness*.json
MADE = "made.json"


# ---- the plan -------------------------------------------------------------------------------------------------------


class Row(BaseModel):
    """A row of the tables: one or more runs that differ by their seed alone."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Annotated[str, Field(**PLAIN_NAME)]
    part: Literal["reproduce", "explain", "beat"]
    what: str = Field(min_length=1)
    recipe: Annotated[str, Field(**PLAIN_NAME)]
    options: list[str] = []
    patches: list[str] = []
    seeds: list[int] = Field([0], min_length=1)
    precision: Literal["no", "bf16", "fp16"] = "bf16"
    robustness: bool = True

    def runs(self) -> dict[str, int]:
        """The seeds by the names of their runs."""
        return {f"{self.name}-seed{seed}": seed for seed in self.seeds}


def read_plan(path: Path) -> list[Row]:
    """The plan's rows; UserError if it can't be read or names what is not there."""
    try:
        plan = TypeAdapter(list[Row]).validate_python(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"{path} can't be read: {error}", USAGE) from None
    except ValidationError as error:
        problem = error.errors()[0]
        raise UserError(f"{path}: {'.'.join(map(str, problem['loc']))}: {problem['msg']}", USAGE) from None
    names = [row.name for row in plan]
    for row in plan:
        if names.count(row.name) > 1:
            raise UserError(f"{path}: {row.name} is there twice", USAGE)
        if not recipe_of(row).is_file():
            raise UserError(f"{path}: {row.name}: there is no {recipe_of(row)}", USAGE)
        if unknown := set(row.patches) - set(PATCHES):
            raise UserError(f"{path}: {row.name}: there is no patch {min(unknown)}", USAGE)
    return plan


def recipe_of(row: Row) -> Path:
    return ROOT / "recipes" / f"{row.recipe}.yaml"


def state(run: str, runs: Path) -> str:
    """Whether a run is done (its files are kept), cut short, or missing."""
    if (RESULTS / run / "summary.json").is_file():
        return "done"
    return "cut short" if (runs / run).is_dir() else "missing"


# ---- training what is missing ---------------------------------------------------------------------------------------


def complete(row: Row, run: str, seed: int, args) -> None:
    """Train a run, or go on with it, judge it, and keep its small files."""
    folder = args.runs / run
    script = ["benchmarks/patches.py", *row.patches, "--"] if row.patches else ["train.py"]
    launch = ["accelerate", "launch", "--config_file", "accelerate_config.yaml", "--mixed_precision", row.precision]
    options = ["--config", f"recipes/{row.recipe}.yaml", "--data.source", "DATA", *row.options, "--tracking", "none"]
    fresh = [*launch, *script, *options, "--seed", str(seed), "--run_name", run]
    if not (folder / "summary.json").is_file():
        if (folder / "checkpoints").is_dir():
            start(args, folder, fresh, [*launch, *script, "--resume", str(folder)])
        else:
            start(args, folder, fresh, [*fresh, "--output_dir", str(args.runs)])
    if row.robustness and not list(folder.glob("predictions/robustness*.json")):
        limit = ["--limit", str(args.limit)] if args.limit else []
        judge = ["accelerate", "launch", "--config_file", "accelerate_config.yaml", "--mixed_precision", row.precision]
        execute(args, [*judge, "predict.py", str(folder), "--robustness", *limit])
    keep(args, folder)


def start(args, folder: Path, fresh: list[str], command: list[str]) -> None:
    """Train, and note in the run's folder how it was made, even where that ends too early."""
    usage = None
    try:
        usage = execute(args, command)
    finally:
        if folder.is_dir():
            note = folder / MADE
            made = json.loads(note.read_text()) if note.is_file() else {"commits": [], "peak_memory_mib": 0}
            made |= {"command": shlex.join(fresh), "date": str(datetime.date.today())}
            made |= {"machine": turns.conditions()}
            if commit() not in made["commits"]:
                made["commits"].append(commit())
            if usage:
                made["peak_memory_mib"] = max(made["peak_memory_mib"], usage)
            write_whole(note, json.dumps(made, indent=1) + "\n")


def execute(args, command: list[str]) -> int:
    """Run a command of the project, shown first, until it ends; its processes' peak memory in MiB.

    Ctrl-C reaches the command too, which then writes its checkpoint.
    """
    found = {"DATA": args.data, "WEIGHTS": args.weights}
    if wanting := [word for word in command if word in found and found[word] is None]:
        raise UserError(f"name --{wanting[0].lower()}: this run needs it", USAGE)
    print("$", shlex.join(command), flush=True)
    words = [str(found.get(word, word)) for word in command]
    words[0] = str(Path(sys.executable).with_name(words[0]))
    process = subprocess.Popen(words, cwd=ROOT)
    while True:
        try:
            _, status, usage = os.wait4(process.pid, 0)
            break
        except KeyboardInterrupt:
            continue
    if code := os.waitstatus_to_exitcode(status):
        raise UserError(f"this command has ended with exit code {code}; give it again to go on")
    return usage.ru_maxrss // 1024


def commit() -> str:
    """The commit of the working tree, marked if the tree has changes."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=7"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip() or "unknown"


def keep(args, folder: Path) -> None:
    """Copy what tables are made of, whole or not at all, with DATA and WEIGHTS for this machine's paths."""
    unfinished, target = RESULTS / f".{folder.name}", RESULTS / folder.name
    shutil.rmtree(unfinished, ignore_errors=True)
    (unfinished / "predictions").mkdir(parents=True)
    predictions = [f"predictions/{path.name}" for path in folder.glob("predictions/robustness*.json")]
    for name in (*KEPT, MADE, *predictions):
        text = (folder / name).read_text(encoding="utf-8")
        for word, value in (("DATA", args.data), ("WEIGHTS", args.weights), ("runs", args.runs)):
            text = text.replace(str(value), word) if value else text
        (unfinished / name).write_text(text, encoding="utf-8")
    shutil.rmtree(target, ignore_errors=True)
    unfinished.rename(target)


# ---- the tables -----------------------------------------------------------------------------------------------------

Figures = dict[str, float | str | None]


def figures(run: Run) -> Figures:
    """What the tables say of a run: fractions, nats, minutes, MiB. None where there is no such figure."""
    best, found = comparison.best_epoch(run), comparison.robustness(run)
    changes = comparison.phase_changes(run)
    made = json.loads((run.path / MADE).read_text(encoding="utf-8"))
    fell = [
        f"{before['epoch']}"
        for before, after in zip(run.history, run.history[1:], strict=False)
        if before["phase"] == after["phase"] and after["lr"] < 0.2 * before["lr"]
    ]
    return {
        "epochs": len(run.history),
        "train_loss": best["train_loss"],
        "train_top1": best["train_top1"],
        "val_loss": best["val_loss"],
        "val_top1": best["val_top1"],
        "test_loss": run.summary["test_loss"],
        "test_top1": run.summary["test_top1"],
        "mean15": found.mean15 if found else None,
        "mean15_of": comparison.conditions(found) if found else "",
        "jump": changes[0].one - changes[0].top1 if changes else None,
        "jump5": changes[0].several - changes[0].top1 if changes and changes[0].several is not None else None,
        "fell": ", ".join(fell) or "-",
        "minutes": run.summary["minutes"],
        "memory": made["peak_memory_mib"] or None,
        "commits": ", ".join(made["commits"]),
        "command": made["command"],
        "date": made["date"],
    }


def spread(values: list, form: str, scale: float = 1.0) -> str:
    """Mean and, of several, standard deviation over the seeds."""
    if any(value is None for value in values) or not values:
        return "-"
    values = [scale * value for value in values]
    mean = format(statistics.mean(values), form)
    return mean if len(values) == 1 else f"{mean} ± {format(statistics.stdev(values), form)}"


def mean_of(name: str, form: str, scale: float = 1.0) -> Callable[[list[Figures]], str]:
    return lambda found: spread([it[name] for it in found], form, scale)


def robustness(found: list[Figures]) -> str:
    """The mean over 15 corruptions, and of which images if not of all."""
    return " ".join(filter(None, [mean_of("mean15", ".1f", 100)(found), found[0]["mean15_of"]]))


def jumps(found: list[Figures]) -> str:
    if found[0]["jump"] is None:
        return "-"
    return f"{mean_of('jump', '+.1f', 100)(found)} in one epoch, {mean_of('jump5', '+.1f', 100)(found)} in five"


COLUMNS: dict[str, Callable[[list[Figures]], str]] = {
    "epochs": mean_of("epochs", ".0f"),
    "train loss": mean_of("train_loss", ".3f"),
    "train top-1 %": mean_of("train_top1", ".1f", 100),
    "val loss": mean_of("val_loss", ".3f"),
    "val top-1 %": mean_of("val_top1", ".1f", 100),
    "test loss": mean_of("test_loss", ".3f"),
    "test top-1 %": mean_of("test_top1", ".1f", 100),
    "robustness %": robustness,
    "phase change, points": jumps,
    "lr fell after epoch": lambda found: "; ".join(it["fell"] for it in found),
    "minutes": mean_of("minutes", ".0f"),
    "peak MiB": mean_of("memory", ",.0f"),
}
SHORT = ("epochs", "val top-1 %", "test top-1 %", "robustness %", "minutes")


def table(rows: list[tuple[Row, list[Figures]]], columns) -> str:
    """Markdown: a line for each row that has a finished run."""
    lines = [["", "seeds", *columns]]
    for row, found in rows:
        lines.append([row.what, str(len(found)), *(COLUMNS[column](found) for column in columns)])
    return markdown(lines)


def markdown(lines: list[list[str]]) -> str:
    lines = [lines[0], ["---"] * len(lines[0]), *lines[1:]]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)


def how(rows: list[tuple[Row, list[Figures]]]) -> str:
    """The commands behind a table, with their commits and dates."""
    return "\n".join(
        f"- {row.what}: `{found[0]['command']}`{f', and {len(found) - 1} more seeds' if found[1:] else ''} "
        f"(commit {found[0]['commits']}, {found[0]['date']})"
        for row, found in rows
    )


def put(path: Path, name: str, text: str) -> None:
    """Write text between a file's marks `<!-- results: NAME -->` and `<!-- end -->`, if it has them."""
    old = path.read_text(encoding="utf-8")
    new = re.sub(
        rf"(<!-- results: {name} -->\n).*?(<!-- end -->)",
        lambda found: f"{found[1]}{text}\n{found[2]}",
        old,
        flags=re.DOTALL,
    )
    if new != old:
        write_whole(path, new)
        print(f"{path.relative_to(ROOT)}: {name}")


def measured(row: Row, found: list[Figures]) -> str:
    """A recipe's measured line."""
    seeds = f"{len(found)} seeds" if found[1:] else "one seed"
    weights = ", from Tiny ImageNet weights (not ImageNet)" if "WEIGHTS" in row.options else ""
    return (
        f"# Measured on CIFAR-100 at full length{weights}, {row.precision}, {seeds}: test top-1 "
        f"{COLUMNS['test top-1 %'](found)} %, {COLUMNS['minutes'](found)} minutes. Conditions: docs/results.md."
    )


def write_tables(plan: list[Row]) -> None:
    finished = []
    for row in plan:
        runs = [read_run(RESULTS / run) for run in row.runs() if state(run, ROOT) == "done"]
        if runs:
            finished.append((row, [figures(run) for run in runs]))
    for part in ("reproduce", "explain", "beat"):
        own = [(row, found) for row, found in finished if row.part == part]
        text = f"{table(own, COLUMNS)}\n\n{how(own)}" if own else "Nothing yet."
        put(ROOT / "docs" / "results.md", part, text)
    main = [(row, found) for row, found in finished if row.part != "explain"]
    put(ROOT / "README.md", "summary", table(main, SHORT) if main else "Nothing yet.")
    for row, found in main:
        if not row.patches and (row.part == "beat" or row.name == row.recipe):
            path = recipe_of(row)
            text = re.sub(r"^# Measured.*$", measured(row, found), path.read_text(encoding="utf-8"), flags=re.MULTILINE)
            write_whole(path, text)


# ---- the command line -----------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--run", nargs="*", metavar="NAME", help="train what is missing of these rows [all], then --tables"
    )
    parser.add_argument("--tables", action="store_true", help="rebuild the tables")
    parser.add_argument("--data", default="uoft-cs/cifar100", help="CIFAR-100: folder of parquet [the hub's]")
    parser.add_argument("--weights", help="ResNet-50 pretrained on Tiny ImageNet, .safetensors or a run's best/")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder that holds the runs [runs]")
    parser.add_argument("--limit", type=turns.positive, help="corrupt this many test images only, marked [all]")
    args = parser.parse_args()
    args.runs = args.runs.absolute()
    plan = read_plan(RESULTS / "plan.yaml")
    if unknown := set(args.run or ()) - {row.name for row in plan}:
        raise UserError(f"--run: there is no row {min(unknown)} in {RESULTS / 'plan.yaml'}", USAGE)
    if args.run is not None:
        for row in plan:
            for run, seed in row.runs().items():
                if (not args.run or row.name in args.run) and state(run, args.runs) != "done":
                    complete(row, run, seed, args)
    if args.run is not None or args.tables:
        return write_tables(plan)
    for row in plan:
        for run in row.runs():
            print(f"{state(run, args.runs):10s} {row.part:10s} {run:34s} {row.what}")


if __name__ == "__main__":
    with told():
        main()
