"""How long does the usual loop take to reach its accuracy, and train.py to reach the same?

    python benchmarks/time_to_accuracy.py --data CIFAR100 --weights resnet50.safetensors      # 2 hours on two cores
    python benchmarks/time_to_accuracy.py --data CIFAR100 --weights ... --rows 12500          # with its first rows only

Both fine-tune ResNet-50 from the same weights, as recipes/resnet50.yaml says: the same modules, optimizer, learning
rates, plateau, batch size, training and validation rows. The usual loop (`plain` of throughput.py) trains 10 epochs of
each phase; its last validation top-1 is the target. train.py, in bf16 where that is not emulated, trains the head for
10 epochs and then fine-tunes for as many as it takes. They take turns: after each epoch of the usual loop, train.py
trains until it has caught up with its top-1. Validation counts for both; decoding the images, checkpoints and history
count for train.py, whereas the usual loop gets its images decoded.
"""

import argparse
import dataclasses
import tempfile
from pathlib import Path

import loops
import turns

from errors import reported

EPOCHS = 10  # of each of the usual loop's phases, and of train.py's first
VARIANTS = ("plain", "ours")


def config_of(args, output_dir: str):
    """The recipe, with this data and these weights."""
    from recipe import DEFAULT_RECIPE, check, read_yaml

    tree = read_yaml(DEFAULT_RECIPE)
    tree["model"] = {"name": "resnet50", "weights": str(args.weights)}
    tree["data"] |= {"source": args.data, "test_split": None}
    tree |= {"tracking": "none", "seed": args.seed, "output_dir": output_dir}
    config = check(tree, "benchmark")
    lengths = {"head": args.epochs, "finetune": 10**6}
    phases = {
        name: dataclasses.replace(phase, epochs=lengths[name], early_stopping=None)
        for name, phase in config.phases.items()
    }
    return dataclasses.replace(config, phases=phases)


def plain(args):
    """The usual loop's epochs, both phases."""
    import torch
    from torch.optim.lr_scheduler import ReduceLROnPlateau

    import data
    import models

    config = config_of(args, "runs")
    torch.manual_seed(config.seed)
    source = data.load(config.data)
    model, _ = models.create(config.model, source.class_names, source.size)
    model.to(memory_format=torch.contiguous_format)
    cfg = model.pretrained_cfg
    loop = loops.Plain(source, config.data.batch_size, cfg["mean"], cfg["std"])
    model.to(loop.device)
    yield {"what": "fp32"}
    for name, phase in config.phases.items():
        optimizer = loops.usual_optimizer(model, phase.modules, phase.lr, phase.weight_decay)
        plateau = ReduceLROnPlateau(optimizer, mode="max", factor=0.1, patience=5, threshold=0.0, threshold_mode="abs")
        for _ in range(args.epochs):
            rate = loop.train_epoch(model, optimizer)
            top1 = loop.validate(model)
            plateau.step(top1)
            yield {"phase": name, "val_top1": top1, "images_per_second": rate}


def child(args) -> None:
    if args.measure == "plain":
        return turns.answer(lambda: plain(args))
    keys = ("phase", "val_top1", "images_per_second")
    turns.answer(lambda: loops.ours(config_of(args, args.runs), lambda row: {key: row[key] for key in keys}))


def run(args, said: dict) -> list[dict]:
    """Both in turns, until the usual loop has ended and train.py has caught up; returns a row per epoch."""
    source = turns.subset(args.data, args.rows, Path(args.runs)) if args.rows else args.data
    options = ["--data", source, "--weights", args.weights, "--seed", args.seed, "--epochs", args.epochs]
    options += ["--runs", args.runs]
    plain, ours = (turns.Process(name, *options) for name in VARIANTS)
    _ = plain.ready, ours.ready  # neither starts up while the other is timed
    rows, best = [], -1.0

    def epoch(process) -> float:
        value, number = process.turn(), len(process.values)
        rows.append({"variant": process.name, "epoch": number, "seconds": round(process.seconds, 1)} | value)
        turns.save(args.output, said, rows)
        print(
            f"{process.name:6s} epoch {number:3d} {value['phase']:9s} {process.seconds:8.0f} s  "
            f"val top1 {value['val_top1']:.2%}  {value['images_per_second']:.0f} images/s",
            flush=True,
        )
        return value["val_top1"]

    for _ in range(2 * args.epochs):
        target = epoch(plain)
        while best < target and len(ours.values) < args.most:
            best = max(best, epoch(ours))
    for process in (plain, ours):
        process.process.kill()
        process.process.wait()
    return rows


def judge(rows: list[dict]) -> dict:
    """The usual loop's last top-1, when each loop first reached it, and the ratio of seconds; None if never."""
    target = [row["val_top1"] for row in rows if row["variant"] == "plain"][-1]
    judged = {"target_val_top1": target}
    for variant in VARIANTS:
        there = (row for row in rows if row["variant"] == variant and row["val_top1"] >= target)
        first = next(there, {"seconds": None, "epoch": None})
        judged |= {f"{variant}_seconds": first["seconds"], f"{variant}_epoch": first["epoch"]}
    plain, ours = (judged[f"{variant}_seconds"] for variant in VARIANTS)
    return judged | {"ratio": ours and round(plain / ours, 2)}


def plot(rows: list[dict], judged: dict, device: str, path: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    whole = max(row["seconds"] for row in rows if row["variant"] == "plain")
    for name, label in zip(VARIANTS, ("the usual loop", "train.py"), strict=True):
        own = [row for row in rows if row["variant"] == name]
        times = [row["seconds"] / whole for row in own]
        axes.plot(times, [100 * row["val_top1"] for row in own], marker="o", markersize=4, label=label)
    axes.axhline(100 * judged["target_val_top1"], color="grey", linestyle="--", linewidth=1)
    axes.set_xlabel("time, as a share of the usual loop's")
    axes.set_ylabel("validation top-1 (%)")
    axes.set_title(f"ResNet-50, head and then finetune, on {device}")
    axes.legend()
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--rows", type=turns.positive, help="take the first ones only, of which a fifth is held out [all]"
    )
    parser.add_argument("--weights", type=Path, required=True, help="ResNet-50's, .safetensors")
    parser.add_argument(
        "--epochs", type=turns.positive, default=EPOCHS, help=f"of each of the usual loop's phases [{EPOCHS}]"
    )
    parser.add_argument("--most", type=turns.positive, default=50, help="epochs after which train.py gives up [50]")
    parser.add_argument("--seed", type=int, default=0, help="of both [0]")
    turns.add_options(parser, "time_to_accuracy")
    parser.add_argument("--measure", choices=VARIANTS, help=argparse.SUPPRESS)
    parser.add_argument("--runs", help=argparse.SUPPRESS)
    args = parser.parse_args()
    turns.prepare()
    if args.measure:
        return child(args)

    if not args.weights.is_file():
        parser.error(f"--weights: there is no file {args.weights}")
    said = turns.conditions()
    turns.tell(said)
    with tempfile.TemporaryDirectory() as args.runs:
        rows = run(args, said)
    judged = judge(rows)
    turns.tell(judged)
    turns.save(args.output, said, [*rows, {"variant": "judged"} | judged])
    plot(rows, judged, said["device"], args.output.with_suffix(".png"))


if __name__ == "__main__":
    with reported():
        main()
