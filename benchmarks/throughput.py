"""How close does training come to the machine's limit, and how far ahead of the usual scripts is it?

    python benchmarks/throughput.py                                       # on embedded images; about an hour
    python benchmarks/throughput.py --data CIFAR100 --output throughput   # writes throughput.json and throughput.png
    python benchmarks/throughput.py --cases deep_cnn resnet50:head --batch_sizes 64

For each model and phase, at 32x32, in images per second:

limit     forward, backward and optimizer step on one batch already on the device, with frozen batch norms folded
          and, on a CPU, convolutions of small maps as matrix products, like ours (compiled without packed kernels). The
          best of contiguous, channels_last or only images channels_last, in fp32 or bf16, timed in turns; then, given a
          C++ compiler and unless --eager, the best of each precision (if it is more than half as fast as the other's)
          and ours' own layout against themselves compiled, on a GPU with CUDA graphs (mode reduce-overhead)
ours      epochs of train.py, in bf16 (fp32 where that would be emulated): data, augmentation and each step's metrics,
          not the epoch's figures and history. Images are decoded once, before training, the default for local ones
streamed  the same, streamed, the default for a dataset of the hub, which is kept and decoded in the first epoch
decoding  like ours, but with images decoded again in each epoch (--data.keep_mb 0)
plain     the usual loop: torchvision's transforms on PIL images in a DataLoader with a worker per core, fp32,
          contiguous, model.train() on the whole model, frozen parameters without gradient, .item() in each step
hf        the loop of Hugging Face's example without Trainer: the same transforms through with_transform, a collate
          function, Accelerate's prepare, a metric's add_batch in each step (which the example has only in evaluation);
          fp32, as it is launched by default

Each runs in its own process. They take turns, the first of which is a warm-up. Validation and checkpoints are not
timed.
"""

import argparse
import itertools
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import loops
import turns
from loops import CASES

import processes
from errors import reported

VARIANTS = ("limit", "ours", "streamed", "decoding", "plain", "hf")
PIL = 1000  # images a second that a core opens and transforms, about: slow variants get fewer rows
LOOKS = 3  # timings of each way to compute a step


def limit(case: str, batch_size: int, seconds: float, compiling: bool):
    """Yield the best variant of the step alone, then its rates."""
    import timm
    import torch
    import torch.nn.functional as F
    from speed import contiguous_folds

    import folding
    import launch
    import models
    import smallmaps
    import tracking
    from engine import train_mode
    from phases import make_optimizer

    config = loops.config_of(case, "embedded", batch_size, "runs")
    device = launch.make_accelerator(config).device
    launch.tune_allocator(device)
    name, phase, modules = CASES[case]

    plain, last = torch.contiguous_format, torch.channels_last
    layouts = {"contiguous": (plain, plain), "channels_last": (last, last), "channels_last images": (plain, last)}

    # The layout and precision of ours always stay in, whatever the first timings say.
    own = "channels_last" if device.type == "cuda" else "channels_last images", turns.fast_precision()

    def stepper(layout, precision, compiled=False):
        of_weights, of_images = layouts[layout]
        torch.manual_seed(0)
        model = timm.create_model(name, num_classes=100).to(device, memory_format=of_weights)
        models.freeze_all_but(model, modules)
        if device.type == "cpu":
            smallmaps.as_products(model)
        folding.fold(model, (32, 32), precision)
        if layout == "contiguous":
            contiguous_folds(model)
        train_mode(model)
        if compiled:
            model.compile(mode="reduce-overhead" if device.type == "cuda" else None)
        optimizer = make_optimizer(config.phases[phase], model)
        images = torch.randn(batch_size, 3, 32, 32, device=device).contiguous(memory_format=of_images)
        labels = torch.randint(100, (batch_size,), device=device)

        def step():
            with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
                logits = model(images)
            F.cross_entropy(logits.float(), labels).backward()
            optimizer.step()
            optimizer.zero_grad()

        return step

    def rate(step, seconds):
        step()
        wait(device)
        together = tracking.READ_EVERY if device.type == "cuda" else 4  # ours waits for a GPU no more often
        steps, began = 0, time.perf_counter()
        while time.perf_counter() - began < seconds:
            for _ in range(together):
                step()
            wait(device)
            steps += together
        return steps * batch_size / (time.perf_counter() - began)

    def in_turns(steps: dict) -> dict:
        """Each step's rate: the median of several timings, in turns."""
        looks = [{way: rate(step, seconds / 4) for way, step in steps.items()} for _ in range(LOOKS)]
        return {way: statistics.median(look[way] for look in looks) for way in steps}

    precisions = sorted({"no", turns.fast_precision()})
    eager = {(layout, precision): stepper(layout, precision) for layout in layouts for precision in precisions}
    best = dict.fromkeys([*best_of_each(in_turns(eager)), own])
    steps = {(*way, "eager"): eager[way] for way in best}
    if compiling:
        steps |= {(*way, "compiled"): stepper(*way, compiled=True) for way in best}
    del eager  # frees the losers' models
    rates = in_turns(steps)
    layout, precision, how = chosen = max(steps, key=rates.get)
    if compiling:
        other = rates[layout, precision, "eager" if how == "compiled" else "compiled"] / rates[chosen]
        how += f" ({1 / other:.2f} x eager)" if how == "compiled" else f" (compiled {other:.2f} x)"
    yield {"what": f"{layout}, {precision.replace('no', 'fp32')}, {how}", "rate": rates[chosen]}
    while True:
        yield rate(steps[chosen], seconds)


def best_of_each(rates: dict[tuple, float]) -> list[tuple]:
    """The fastest way (layout, precision) of each precision, unless it is at most half as fast as another's.

    Not just the fastest of all: launched from Python, bf16 has more kernels to launch; compiled it may be faster.
    """
    best = {}
    for way in sorted(rates, key=rates.get):
        best[way[1]] = way
    return [way for way in best.values() if rates[way] > max(rates.values()) / 2]


def wait(device) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize()


def child(args) -> None:
    """What a measured process does: one case, one batch size, one variant."""
    case, batch_size = args.cases[0], args.batch_sizes[0]
    with tempfile.TemporaryDirectory() as folder:
        work = {
            "limit": lambda: limit(
                case, batch_size, args.seconds, compiling=not args.eager and bool(shutil.which("g++"))
            ),
            "ours": lambda: loops.ours(loops.config_of(case, args.data, batch_size, folder)),
            "streamed": lambda: loops.ours(
                loops.config_of(case, args.data, batch_size, folder, data={"streaming": True})
            ),
            "decoding": lambda: loops.ours(loops.config_of(case, args.data, batch_size, folder, data={"keep_mb": 0})),
            "plain": lambda: loops.plain(case, args.data, batch_size),
            "hf": lambda: loops.hf(case, args.data, batch_size),
        }
        turns.answer(work[args.measure])


def measure(case: str, batch_size: int, args, folder: Path) -> list[dict]:
    """The rows of one case: its variants, in turns."""

    def start(variant, source):
        options = ["--cases", case, "--data", source, "--batch_sizes", batch_size, "--seconds", args.seconds]
        return turns.Process(variant, *options, *["--eager"] * args.eager)

    def source(rate):
        return turns.subset(args.data, max(200, 10 * batch_size, round(rate * args.seconds / 0.98)), folder)

    first = start("limit", args.data)
    rate, cores = first.ready["rate"], processes.cores_per_process()
    bounded = {"plain": min(rate, PIL * cores), "hf": min(rate, PIL)}
    others = [name for name in VARIANTS[1:] if name in ("ours", *args.variants)]
    sources = {name: source(bounded.get(name, rate)) for name in others}
    measured = [first] + [start(name, sources[name]) for name in others]
    turns.alternate(measured, args.rounds)
    model, phase, _ = CASES[case]
    results = []
    for process in measured:
        process.end()
        rates = process.values
        of_limit, of_limit_spread = turns.ratio(process, first)
        ours_to_this, ours_to_this_spread = turns.ratio(measured[1], process)
        results.append(
            {
                "model": model,
                "phase": phase,
                "batch_size": batch_size,
                "device": turns.device_name(),
                "variant": process.name,
                "what": process.ready["what"],
                "images_per_second": round(statistics.median(rates), 1),
                "spread": [round(min(rates), 1), round(max(rates), 1)],
                "rates": [round(rate, 1) for rate in rates],
                "of_limit": of_limit,
                "of_limit_spread": of_limit_spread,
                "ours_to_this": ours_to_this,
                "ours_to_this_spread": ours_to_this_spread,
            }
        )
    return results


def plot(rows: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    groups = list(dict.fromkeys(map(key, rows)))
    variants = [name for name in VARIANTS if any(row["variant"] == name for row in rows)]
    figure, axes = plt.subplots(figsize=(2 + 1.6 * len(groups), 4.5), layout="constrained")
    for number, variant in enumerate(variants):
        shares = {key(row): row["of_limit"] for row in rows if row["variant"] == variant}
        heights = [shares.get(group, 0) for group in groups]
        places = [place + (number - (len(variants) - 1) / 2) * 0.15 for place in range(len(groups))]
        bars = axes.bar(places, heights, 0.14, label=variant)
        axes.bar_label(bars, fmt="%.2f", fontsize=7)
    axes.set_xticks(range(len(groups)), [f"{model}\n{phase}, batch {size}" for model, phase, size in groups])
    axes.set_ylabel("images per second, as a share of the limit")
    axes.set_title(f"Training rate on {rows[0]['device']}")
    axes.legend(ncols=len(variants), loc="upper center", bbox_to_anchor=(0.5, -0.12))
    figure.savefig(path, dpi=130)


def key(row: dict) -> tuple:
    return row["model"], row["phase"], row["batch_size"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), help="models and phases [all]")
    parser.add_argument(
        "--batch_sizes", nargs="+", type=turns.positive, default=[64, 512], help="images a step [64 512]"
    )
    parser.add_argument(
        "--variants", nargs="*", choices=VARIANTS[2:], default=VARIANTS[2:], help="beside limit and ours [all]"
    )
    parser.add_argument("--rounds", type=turns.positive, default=5, help="turns of each variant that count [5]")
    parser.add_argument("--seconds", type=turns.seconds, default=8.0, help="length of a turn at the limit's rate [8]")
    parser.add_argument(
        "--eager", action="store_true", help="do not let the limit try torch.compile, which takes minutes"
    )
    turns.add_options(parser, "throughput")
    parser.add_argument("--measure", choices=VARIANTS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    turns.prepare()
    if args.measure:
        return child(args)

    said = turns.conditions()
    turns.tell(said)
    print(f"{'':36s}{'images/s':>9s}  {'spread':16s}{'of limit':>8s}  ours is")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for case, batch_size in itertools.product(args.cases, args.batch_sizes):
            for row in measure(case, batch_size, args, Path(folder)):
                rows.append(row)
                spread = f"({row['spread'][0]:.0f} to {row['spread'][1]:.0f})"
                low, high = row["ours_to_this_spread"]
                print(
                    f"{row['model']:11s}{row['phase']:9s}{batch_size:4d}  {row['variant']:9s}"
                    f"{row['images_per_second']:10.0f}  {spread:16s}{row['of_limit']:8.2f}  "
                    f"{row['ours_to_this']:6.2f} x ({low:.2f} to {high:.2f})  {row['what']}",
                    flush=True,
                )
            turns.save(args.output, said, rows)
            plot(rows, args.output.with_suffix(".png"))


if __name__ == "__main__":
    with reported():
        main()
