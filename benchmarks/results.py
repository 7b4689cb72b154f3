"""The runs behind the results tables: list them, train the missing ones, rebuild the tables.

    python benchmarks/results.py                                           # what is done, cut short, missing
    python benchmarks/results.py --run --data CIFAR100 --weights WEIGHTS   # train what is missing, in order
    python benchmarks/results.py --run deep_cnn --data CIFAR100            # only this row
    python benchmarks/results.py --tables                                  # rebuild the tables

docs/results/plan.yaml lists the runs. Each is trained with the shipped command (benchmarks/patches.py instead of
train.py if a row names patches), judged, unless the plan says otherwise, on the test split under the 19 corruptions and
with six views of each image averaged (predict.py --tta shifts), and its small files are copied from runs/NAME-seedN to
docs/results/NAME-seedN: configuration, history, summary, what it was judged at, and how it was made. A run that was cut
short is resumed; Ctrl-C cuts one short. The tables in README.md and docs/results.md, docs/comparison.md with its curves
and the "Measured on" line of recipes are generated from those files; no figure in them is written by hand.

This script makes the runs; results_plan.py reads the plan, and results_tables.py writes the tables.
"""

import argparse
import datetime
import functools
import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import safetensors
import turns
import yaml
from filelock import FileLock
from results_plan import (
    MADE,
    RESULTS,
    ROBUSTNESS,
    ROOT,
    VIEWS,
    Row,
    as_planned,
    lacks_views,
    launcher,
    note_of,
    read_made,
    read_plan,
    state,
)
from results_tables import write_tables

from errors import USAGE, Interrupted, UserError, reported
from files import write_whole
from recipe import read_yaml

TEST_VIEWS = "predictions/test-shifts.json"  # as predict.py writes it


def complete(row: Row, run: str, args) -> None:
    """Train or resume a run, judge it, and keep its small files."""
    check_startable(row, run, args)
    folder, note, command = args.runs / run, note_of(args.runs, run), row.runs()[run]
    if folder.is_dir() and not row.can_be_resumed and not (folder / "summary.json").is_file():
        print(f"{run} was cut short, and can't be resumed: it starts again")
        shutil.rmtree(folder)
    precision = args.mixed_precision or next((read_made(kept / MADE)["precision"] for kept in beside(row)), "no")
    made = {"command": shlex.join(command), "precision": precision, "sessions": []}
    if note.is_file() and folder.is_dir():
        made = read_made(note)

    def session(does: str, *words: str) -> None:
        facts = {"does": does, "commit": turns.commit(), "date": str(datetime.date.today()), "machine": turns.machine()}
        if does == "train" and "WEIGHTS" in row.options:
            weights = weights_of(folder, args.weights)
            if weights.is_file():  # a resumed run no longer needs them
                facts["weights_tensors_sha256"] = tensors_digest(weights)
        made["sessions"].append(facts)
        write_whole(note, json.dumps(made, indent=1) + "\n")
        code, facts["peak_memory_mib"] = execute(args, [*launcher(made["precision"]), *words], folder)
        write_whole(note, json.dumps(made, indent=1) + "\n")
        if code:
            raise UserError(f"{run}: that command ended with exit code {code}, for the reason above")

    args.runs.mkdir(parents=True, exist_ok=True)
    if not (folder / "summary.json").is_file():
        own = row.resume(folder) if folder.is_dir() else [*command, "--output_dir", str(args.runs)]
        session("train", *own)
    if row.judged and not (folder / ROBUSTNESS).is_file():
        session("judge", "predict.py", str(folder), "--robustness")
    if row.judged and not (folder / TEST_VIEWS).is_file():
        session("judge", "predict.py", str(folder), "--tta", "shifts")
    keep(row, folder, note)


def check_startable(row: Row, run: str, args) -> None:
    """UserError if a run can't be started, or would not be comparable with its neighbours in the tables."""
    folder, note = args.runs / run, note_of(args.runs, run)
    if folder.exists() and not note.is_file():
        raise UserError(f"{folder} is there, but not {note}, which says how it was made: move it away")
    if note.is_file() and not as_planned(row, run, folder, note):
        raise UserError(
            f"{folder} was started by another command than the plan's, or its recipe has changed since: delete it and "
            f"{note} to start over"
        )
    if note.is_file() and folder.is_dir() and (row.can_be_resumed or (folder / "summary.json").is_file()):
        return  # it is resumed as it was begun
    for kept in beside(row):
        made = read_made(kept / MADE)
        if args.mixed_precision not in (None, made["precision"]):
            raise UserError(
                f"--mixed_precision {args.mixed_precision}: {row.name} is compared or averaged with {kept}, in "
                f"{made['precision']}; leave the option out",
                USAGE,
            )
        weights = {it["weights_tensors_sha256"] for it in made["sessions"] if "weights_tensors_sha256" in it}
        given = weights_given(args.weights) if "WEIGHTS" in row.options else set()
        if given and weights and given != weights:
            raise UserError(
                f"--weights: {row.name} is compared or averaged with {kept}, from other weights, whose digest begins "
                f"with {min(weights)[:12]}; to start over with these, delete that folder and its like",
                USAGE,
            )


def beside(row: Row) -> list[Path]:
    """The folders of the kept runs that a row is averaged or compared with."""
    names = [name for name in (row.name, row.against) if name]
    return [path.parent for name in names for path in sorted(RESULTS.glob(f"{name}-seed*/{MADE}"))]


@functools.cache
def weights_given(weights: str) -> set[str]:
    """The digest of --weights; empty if there is no such file, which is reported elsewhere."""
    file = weights_file(weights)
    return {tensors_digest(file)} if os.path.isfile(file) else set()


def tensors_digest(file: Path) -> str:
    """SHA-256 of the tensors in a safetensors file: their names, types, shapes and values, in the order of the names.

    The file's own changes whenever the same tensors are written again, as metadata have no fixed order in its header.

    Raises:
        UserError: it is no such file.
    """
    sha256 = hashlib.sha256()
    try:
        tensors = safetensors.deserialize(file.read_bytes())
    except safetensors.SafetensorError as error:
        raise UserError(f"--weights: {file} is not a safetensors file ({error})", USAGE) from error
    for name, tensor in sorted(tensors, key=lambda named: named[0]):
        sha256.update(f"{name} {tensor['dtype']} {tensor['shape']}\n".encode())
        sha256.update(tensor["data"])
    return sha256.hexdigest()


def weights_of(folder: Path, given: str) -> Path:
    """The weights file a run starts from: once it has begun, the one in its own configuration."""
    config = folder / "config.yaml"
    return weights_file(read_yaml(config)["model"]["weights"] if config.is_file() else given)


def weights_file(weights: str) -> Path:
    """The weights file itself, given that file or a run's best/."""
    path = ROOT / weights
    return path / "model.safetensors" if os.path.isdir(path) else path


def execute(args, command: list[str], folder: Path) -> tuple[int, int]:
    """Print and run a command of the project; return its exit code and peak memory in MiB.

    Ctrl-C reaches all its processes. The launcher ends at once, the training once its checkpoint is written.
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
        raise Interrupted("stopped; to continue, run the same command again", 2) from None
    return os.waitstatus_to_exitcode(status), usage.ru_maxrss // 1024


def keep(row: Row, folder: Path, note: Path) -> None:
    """Copy the files behind the tables, all or nothing, without this machine's paths."""
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
    if row.judged:
        found = json.loads((folder / ROBUSTNESS).read_text(encoding="utf-8"))
        (unfinished / ROBUSTNESS).write_text(json.dumps(found | {"source": "DATA"}) + "\n", encoding="utf-8")
        views = json.loads((folder / TEST_VIEWS).read_text(encoding="utf-8"))
        views = {name: views[name] for name in ("split", "tta", "rows", "precision", "loss", "top1", "top5", "ece")}
        (unfinished / VIEWS).write_text(json.dumps(views) + "\n", encoding="utf-8")
    shutil.rmtree(target, ignore_errors=True)
    unfinished.rename(target)


# ---- the command line -----------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", nargs="*", metavar="NAME", help="train what these rows lack [all], then --tables")
    parser.add_argument("--tables", action="store_true", help="rebuild the tables")
    parser.add_argument("--data", default="uoft-cs/cifar100", help="CIFAR-100: folder of parquet [the hub's]")
    parser.add_argument("--weights", help="ResNet-50 pretrained on Tiny ImageNet: .safetensors, or a run's best/")
    parser.add_argument(
        "--mixed_precision",
        choices=("no", "bf16", "fp16"),
        help="of new runs [as the finished runs they are compared or averaged with; without any, no]",
    )
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder that holds the runs [runs]")
    args = parser.parse_args()
    args.runs = args.runs.absolute()
    args.data, args.weights = (
        str(Path(it).absolute()) if it and os.path.exists(it) else it for it in (args.data, args.weights)
    )
    plan_file = RESULTS / "plan.yaml"
    plan = read_plan(plan_file)
    if unknown := set(args.run or ()) - {row.name for row in plan}:
        raise UserError(f"--run: there is no row {min(unknown)} in {plan_file}", USAGE)
    wanted = [row for row in plan if args.run is not None and (not args.run or row.name in args.run)]
    if args.run == [] and not turns.on_gpu():
        for row in (row for row in wanted if row.gpu):
            print(f"{row.name} is left out, since it is for a GPU: --run {row.name} trains it here, too")
        wanted = [row for row in wanted if not row.gpu]
    runs = [(row, run) for row in wanted for run in row.runs()]
    untrained = [it for it in runs if state(*it, args.runs) != "done"]
    if lacking := [row.name for row, _ in untrained if "WEIGHTS" in row.options and not args.weights]:
        raise UserError(f"--weights: {lacking[0]} needs them; or name other rows after --run", USAGE)
    missing = [it for it in runs if it not in untrained and lacks_views(*it, args.runs)]  # minutes, so they come first
    missing += untrained
    for row, run in list(missing):
        try:
            check_startable(row, run, args)
        except UserError as error:
            if args.run:
                raise
            print(f"{run} is left out: {error}", file=sys.stderr)
            missing.remove((row, run))
    if args.weights and not os.path.isfile(weights_file(args.weights)):
        raise UserError(f"--weights: {args.weights} is neither a file of weights nor a run's best/", USAGE)
    failed = []
    for row, run in missing:
        try:
            complete(row, run, args)
            write_tables(plan, args.runs)
        except Interrupted:
            raise
        except UserError as error:  # the next run may succeed
            print(f"error: {error}", file=sys.stderr)
            failed.append(run)
    if failed:
        raise UserError(f"not made, for the reasons above: {', '.join(failed)}")
    if args.tables or args.run is not None:
        return None if missing else write_tables(plan, args.runs)
    for row in plan:
        for run in row.runs():
            print(f"{state(row, run, args.runs):10s} {row.part:10s} {run:34s} {row.what}")


if __name__ == "__main__":
    with reported():
        main()
