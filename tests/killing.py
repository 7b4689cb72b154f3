"""Kill a two-phase run at random moments, resume it each time, and compare what came out with the uninterrupted run.

    python tests/killing.py FOLDER --data kept|mapped|streamed --processes 1|2 --kills 25

Run by test_resume.py. The libraries are imported once, here, and each attempt is a fork, so that an attempt costs a
second and not ten. Prints one JSON object: how many kills fell where.
"""

import argparse
import contextlib
import gc
import json
import mmap
import os
import random
import signal
import socket
import sys
import time
from collections import Counter
from pathlib import Path

os.environ |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
sys.path.insert(0, str(Path(__file__).parent.parent))

import checkpoint
import sources
import train
from errors import UserError
from recipe import check

PLACES = ("starting", "phase 1", "phase 2", "validation", "writing a checkpoint", "test")
TIMINGS = ("seconds", "seconds_left", "images_per_second", "minutes")


def make_config(folder: Path, name: str, kind: str):
    phase = {"epochs": 2, "lr": 1e-2, "schedule": "plateau", "early_stopping": 5}
    tree = {
        "model": {"name": "test_resnet"},
        "data": {"source": str(folder / "data"), "batch_size": 32, "workers": 0, "streaming": kind == "streamed"},
        "phases": {"head": phase | {"modules": "head"}, "finetune": phase | {"modules": "layer4,head"}},
        "checkpoint": {"every_steps": 4},
        "output_dir": str(folder / "runs"),
        "run_name": name,
        "tracking": "none",
    }
    if kind == "mapped":
        tree["data"]["keep_mb"] = 0  # images are decoded in each epoch, not kept
    return check(tree, "test")


def make_data(folder: Path) -> None:
    (folder / "data").mkdir()
    splits = sources.embedded_splits(400, streams=False)
    for split in ("train", "test"):
        splits[split].to_parquet(folder / "data" / f"{split}-00000-of-00001.parquet")


def watched(place: mmap.mmap, name: str, function):
    """The function, noting in shared memory that it is being run."""

    def call(*args, **kwargs):
        before, place[0] = place[0], PLACES.index(name)
        try:
            return function(*args, **kwargs)
        finally:
            place[0] = before

    return call


def child(config, resume: Path | None, place: mmap.mmap) -> None:
    describe = train.describe_phase

    def begin_phase(config, name, *rest):
        place[0] = PLACES.index("phase 1" if name == "head" else "phase 2")
        return describe(config, name, *rest)

    train.describe_phase = begin_phase
    train.validate = watched(place, "validation", train.validate)
    checkpoint.Checkpoints.save = watched(place, "writing a checkpoint", checkpoint.Checkpoints.save)
    load_best = checkpoint.load_best
    checkpoint.load_best = lambda *args: (load_best(*args), place.__setitem__(0, PLACES.index("test")))
    try:
        train.train(config, resume)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        os._exit(error.exit_code)
    except BaseException:
        import traceback

        traceback.print_exc()
        os._exit(9)
    os._exit(0)


def start(processes: int, function, *args) -> list[int]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    children = []
    for rank in range(processes):
        pid = os.fork()
        if pid == 0:
            log = os.open(
                args[0].parent / f"log{rank}" if isinstance(args[0], Path) else LOG / f"log{rank}", 1 | 64 | 1024
            )
            os.dup2(log, 1), os.dup2(log, 2)
            if processes > 1:
                os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
                os.environ |= {"LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            function(*args)
            os._exit(0)
        children.append(pid)
    return children


def wait(children: list[int], seconds: float) -> list[int] | None:
    """Exit statuses, or None if not all have ended in time."""
    codes, until = {}, time.monotonic() + seconds
    while len(codes) < len(children):
        for pid in set(children) - codes.keys():
            try:
                ended, status = os.waitpid(pid, os.WNOHANG)
            except ChildProcessError:  # an earlier call has seen its end, and not the others'
                ended, status = pid, 0
            if ended:
                codes[pid] = os.waitstatus_to_exitcode(status)
        if time.monotonic() > until:
            return None
        time.sleep(0.002)
    return list(codes.values())


def result(run: Path) -> dict[str, bytes]:
    """All that has to be equal, byte for byte, timings taken out."""
    rows = [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()] + [
        json.loads((run / "summary.json").read_text())
    ]
    kept = [{key: value for key, value in row.items() if key not in TIMINGS} for row in rows]
    last = sorted((run / "checkpoints").glob("0*"))[-1]
    files = [run / "best" / "model.safetensors", run / "best" / "config.json", last / "model.safetensors"]
    return {"figures": json.dumps(kept).encode()} | {str(path.relative_to(run)): path.read_bytes() for path in files}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--data", choices=("kept", "mapped", "streamed"), default="kept")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--kills", type=int, default=25)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    global LOG
    LOG = args.folder
    draw, place, counts = random.Random(args.seed), mmap.mmap(-1, 1), Counter()
    wait(start(1, make_data, args.folder), 60)
    gc.freeze()  # else each attempt's collections look through the libraries' objects

    for name in ("warm-up", "whole"):  # the first one takes longer: it reads the libraries' rest from the disk
        began = time.monotonic()
        wait(start(args.processes, child, make_config(args.folder, name, args.data), None, place), 300)
        took = time.monotonic() - began
    expected = result(args.folder / "runs" / "whole")

    runs = 0
    while sum(counts.values()) < args.kills or set(counts) <= {"starting"}:  # where there is nothing to lose yet
        if runs > 10 * args.kills:
            sys.exit(f"of {runs} runs none was killed after its start, which shows nothing: {dict(counts)}")
        name = f"run{runs}"
        config, run = make_config(args.folder, name, args.data), args.folder / "runs" / name
        runs += 1
        while not (run / "summary.json").exists():
            place[0] = 0
            children = start(args.processes, child, config, run if run.exists() else None, place)
            codes = wait(children, draw.uniform(0.2, 1.0) * took)
            if codes is None:
                counts[PLACES[place[0]]] += 1
                for pid in children:
                    with contextlib.suppress(ProcessLookupError):  # one of two may just have ended by itself
                        os.kill(pid, signal.SIGKILL)
                wait(children, 60)
            elif any(codes) or not (run / "summary.json").exists():
                sys.exit(f"an attempt failed:\n{(args.folder / 'log0').read_text()[-3000:]}")
        found = result(run)
        different = [what for what in expected if found.get(what) != expected[what]]
        if different or found.keys() != expected.keys():
            sys.exit(f"{run} differs from the uninterrupted run in {different}")
    print(json.dumps({"kills": sum(counts.values()), "runs": runs, "seconds": round(took, 1)} | counts))


if __name__ == "__main__":
    main()
