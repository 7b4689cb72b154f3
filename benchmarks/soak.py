"""500 tiny epochs in one run: do its memory and its open files stay flat?

    python benchmarks/soak.py [--epochs 500]

Starts the real command with the embedded data, a loader worker, a checkpoint per epoch and W&B offline, looks at its
process after each epoch, and prints JSON: resident memory (MiB), open files and child processes, each as the median
over 50 epochs at the start (after the first 20, which fill caches) and over the last 50.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
from tqdm import tqdm

ROOT = Path(__file__).parent.parent
SETTLED, WINDOW = 20, 50  # epochs


def look(process: psutil.Process) -> dict[str, float]:
    with process.oneshot():
        return {
            "memory_mib": process.memory_info().rss / 2**20,
            "open_files": process.num_fds() if os.name == "posix" else process.num_handles(),
            "children": len(process.children(recursive=True)),
        }


def soak(epochs: int, folder: Path) -> list[dict[str, float]]:
    """Run it; return one reading per epoch. Two short epochs may share a reading."""
    command = [sys.executable, "train.py", "--config", "recipes/demo_scratch.yaml", "--tracking", "wandb"]
    command += ["--data.embedded_rows", "200", "--data.workers", "1", "--data.keep_mb", "0"]
    command += ["--phases.train.epochs", str(epochs), "--output_dir", str(folder), "--run_name", "soak"]
    history, seen = folder / "soak" / "history.jsonl", []
    with (folder / "log").open("w") as log, tqdm(total=epochs, unit=" epochs", disable=None) as bar:
        child = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, env=os.environ | {"WANDB_MODE": "offline"})
        process = psutil.Process(child.pid)
        while child.poll() is None:
            finished = history.read_bytes().count(b"\n") if history.exists() else 0
            if finished > len(seen) and finished < epochs:
                seen += [look(process)] * (finished - len(seen))
                bar.update(finished - bar.n)
            time.sleep(0.05)
    if child.returncode:
        sys.exit((folder / "log").read_text()[-2000:])
    return seen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=500)
    epochs = parser.parse_args().epochs
    if epochs < SETTLED + 2 * WINDOW:
        parser.error(f"--epochs: at least {SETTLED + 2 * WINDOW}")
    with tempfile.TemporaryDirectory() as folder:
        seen = soak(epochs, Path(folder))
    parts = {"start": seen[SETTLED : SETTLED + WINDOW], "end": seen[-WINDOW:]}
    medians = {
        name: {what: round(statistics.median(one[what] for one in part), 1) for what in seen[0]}
        for name, part in parts.items()
    }
    print(json.dumps({"epochs": epochs} | medians, indent=1))


if __name__ == "__main__":
    main()
