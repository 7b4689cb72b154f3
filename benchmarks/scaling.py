"""What do larger images, larger batches and more rows cost, and how long does a run take to its first step?

    python benchmarks/scaling.py                                  # all four; writes scaling.json and scaling.png
    python benchmarks/scaling.py --parts rows --rows 1000 10000   # one of them
    python benchmarks/scaling.py --parts start --data CIFAR100    # with data of your own

size    ResNet-50, layer3, layer4 and head training, batch 64: rate and peak memory by image size
batch   the same at 32x32 by batch size. Rates of both are relative to 32x32 and batch 64, measured in turns with it
rows    SimpleCNN over one streamed epoch of embedded images, none of them kept: peak memory by the number of rows,
        workers included, and the rate, relative to the first number's (a short epoch is mostly start-up)
start   from `accelerate launch` to the first training step, in turns with a process that only imports the same
        libraries

Memory is the resident set of a run's processes (shared pages counted once, where the system tells) or, on a GPU, its
tensors' memory.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import loops
import psutil
import turns

from errors import reported

CASE, SIZE, BATCH = "resnet50:finetune", 32, 64
STREAMED_BATCH = 256
LIBRARIES = "torch, timm, accelerate, datasets, evaluate"  # what a run imports


# ---- the processes that are measured --------------------------------------------------------------------------------


class Peak(threading.Thread):
    """The peak memory of this process and its children so far, in MiB, sampled twice a second."""

    def __init__(self):
        super().__init__(daemon=True)
        self.mib = 0.0
        self.start()

    def run(self):
        while True:
            self.look()
            time.sleep(0.5)

    def look(self) -> int:
        held = 0
        for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
            try:
                info = process.memory_full_info()
            except psutil.Error:  # it has ended, or is somebody else's
                continue
            held += getattr(info, "pss", info.rss)
        self.mib = max(self.mib, held / 2**20)
        return round(self.mib)


def training(args, folder: str) -> None:
    """Epochs of a run, each with its rate and the peak memory so far."""
    peak = Peak()
    if args.measure == "rows":
        streamed = {"embedded_rows": args.rows[0], "streaming": True, "keep_mb": 0}
        config = loops.config_of("simple_cnn", "embedded", STREAMED_BATCH, folder, data=streamed)
    else:
        size = args.sizes[0] if args.sizes[0] != SIZE else None
        config = loops.config_of(CASE, args.data, args.batches[0], folder, data={"image_size": size})
    loops.ours(
        config,
        lambda row: {"rate": row["images_per_second"], "mib": row.get("peak_memory_mb", peak.look())},
    )


def first_step(args, folder: str) -> None:
    """A run up to its first step; reports the seconds from the command to each part's end."""
    marks, began = {}, args.began

    def mark(name, function):
        def marked(*arguments, **named):
            result = function(*arguments, **named)
            marks[name] = round(time.time() - began, 2)
            return result

        return marked

    import data
    import loading
    import models
    import train
    from tracking import Tracking

    marks["launched, imported"] = round(time.time() - began, 2)
    data.load, models.create = mark("data opened", data.load), mark("model made", models.create)
    loading.keep_decoded = mark("images decoded", loading.keep_decoded)
    watch = Tracking.watch

    def watch_one(*arguments):
        for step in watch(*arguments):
            step.loss.item()
            marks["first step"] = round(time.time() - began, 2)
            turns.take(marks)
            yield step

    Tracking.watch = watch_one
    train.train(loops.config_of(CASE, args.data, BATCH, folder, data={"folds": 5}))


def child(args) -> None:
    with tempfile.TemporaryDirectory() as folder:
        turns.answer(lambda: (first_step if args.measure == "start" else training)(args, folder))


# ---- the parts ------------------------------------------------------------------------------------------------------


def against_size_or_batch(part: str, args, folder: Path) -> list[dict]:
    def start(size, batch):
        source = turns.subset(args.data, max(200, 20 * batch), folder)
        return turns.Process("training", "--sizes", size, "--batches", batch, "--data", source)

    reference, rows = start(SIZE, BATCH), []
    for value in args.sizes if part == "size" else args.batches:
        size, batch = (value, BATCH) if part == "size" else (SIZE, value)
        process = start(size, batch)  # a new one even for the reference's size: memory grows with the turns taken
        turns.alternate([reference, process], args.rounds)
        rates = [[turn["rate"] for turn in one.values] for one in (process, reference)]
        ratio = statistics.median(one / two for one, two in zip(*rates, strict=True))
        rows.append(
            {"part": part, "image_size": size, "batch_size": batch, "relative_rate": round(ratio, 4)}
            | {"images_per_second": round(statistics.median(rates[0]), 1), "peak_mib": process.values[-1]["mib"]}
        )
        print(
            f"{part:6s}{size:4d} pixels  batch {batch:4d}  {ratio:7.3f} x the rate of {SIZE} pixels and batch {BATCH}  "
            f"{rows[-1]['peak_mib']:6d} MiB",
            flush=True,
        )
        reference.values.clear()
        process.end()
    reference.end()
    return rows


def against_rows(args) -> list[dict]:
    rows = []
    for count in args.rows:
        process = turns.Process("rows", "--rows", count)
        value = process.turn()
        process.end()
        row = {"part": "rows", "rows": count, "batch_size": STREAMED_BATCH, "peak_mib": value["mib"]}
        row |= {"images_per_second": round(value["rate"], 1)}
        rows.append(row | {"relative_rate": round(value["rate"] / (rows or [row])[0]["images_per_second"], 4)})
        ratio = rows[-1]["relative_rate"]
        print(f"rows  {count:9,d} streamed  {ratio:7.3f} x the first rate  {value['mib']:6d} MiB", flush=True)
    return rows


def start_of_a_run(args) -> list[dict]:
    rows = []
    for _ in range(args.rounds + 1):
        began = time.perf_counter()
        subprocess.run([sys.executable, "-c", f"import {LIBRARIES}"], check=True)
        imports = time.perf_counter() - began
        launcher = (sys.executable, "-m", "accelerate.commands.launch", "--mixed_precision", turns.fast_precision())
        process = turns.Process("start", "--data", args.data, "--began", time.time(), launcher=launcher)
        process.end()
        rows.append({"part": "start", "bare_imports": round(imports, 2)} | process.ready)
    rows = rows[1:]  # the first one warms the disk's cache
    for row in rows:
        marks = ", ".join(f"{name} {value}" for name, value in row.items() if name != "part")
        ratio = row["first step"] / row["bare_imports"]
        print(f"start  {ratio:.2f} x the bare imports; seconds: {marks}", flush=True)
    return rows


def plot(rows: list[dict], device: str, path: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    parts = [part for part in ("size", "batch", "rows") if any(row["part"] == part for row in rows)]
    if not parts:
        return
    axis = {"size": "image_size", "batch": "batch_size", "rows": "rows"}
    label = {"size": "image size (pixels a side)", "batch": "batch size", "rows": "rows streamed"}
    figure, grid = plt.subplots(2, len(parts), figsize=(4 * len(parts), 6), layout="constrained", squeeze=False)
    for (rate, memory), part in zip(grid.T, parts, strict=True):
        own = [row for row in rows if row["part"] == part]
        x = [row[axis[part]] for row in own]
        memory.plot(x, [row["peak_mib"] for row in own], marker="o", color="tab:orange")
        memory.set_ylabel("peak memory (MiB)")
        rate.plot(x, [row["relative_rate"] for row in own], marker="o")
        one = "the first" if part == "rows" else f"{SIZE} pixels and batch {BATCH}"
        rate.set_ylabel(f"rate, {one} being 1")
        for axes in (rate, memory):
            axes.set_xlabel(label[part])
            axes.set_xscale("log", base=10 if part == "rows" else 2)
            axes.set_ylim(bottom=0)
    figure.suptitle(f"Cost as work grows, on {device}")
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = ["size", "batch", "rows", "start"]
    parser.add_argument("--parts", nargs="+", choices=known, default=known, help="what to measure [all]")
    parser.add_argument(
        "--sizes", nargs="+", type=turns.positive, default=[32, 64, 96, 128, 160, 224], help="pixels a side"
    )
    parser.add_argument(
        "--batches", nargs="+", type=turns.positive, default=[16, 32, 64, 128, 256, 512], help="batch sizes"
    )
    parser.add_argument(
        "--rows",
        nargs="+",
        type=turns.positive,
        default=[1000, 10_000, 100_000, 1_000_000],
        help="embedded rows to stream",
    )
    parser.add_argument("--rounds", type=turns.positive, default=3, help="turns of each that count [3]")
    turns.add_options(parser, "scaling")
    parser.add_argument("--began", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--measure", choices=("training", "rows", "start"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    turns.prepare()
    if args.measure:
        return child(args)

    said = turns.conditions()
    turns.tell(said)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for part in args.parts:
            if part == "rows":
                rows += against_rows(args)
            elif part == "start":
                rows += start_of_a_run(args)
            else:
                rows += against_size_or_batch(part, args, Path(folder))
            turns.save(args.output, said, rows)
    plot(rows, said["device"], args.output.with_suffix(".png"))


if __name__ == "__main__":
    with reported():
        main()
