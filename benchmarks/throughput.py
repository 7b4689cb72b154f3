"""How near does the training come to what the machine can compute, and how far ahead of the usual scripts is it?

    python benchmarks/throughput.py                                       # on embedded images; some 5 minutes a case
    python benchmarks/throughput.py --data CIFAR100 --output throughput   # writes throughput.json and throughput.png
    python benchmarks/throughput.py --cases deep_cnn resnet50:head --batch_sizes 64

For each model and phase, at 32x32, in images per second:

limit     forward, backward and optimizer step on one batch that lies on the device already, its frozen batch norms
          folded like ours; the best of contiguous or channels_last, fp32 or bf16, eager or compiled
ours      epochs of train.py, in bf16: data, augmentation, metrics and history on. As its defaults are: images decoded
          once, before training
decoding  the same with images decoded anew in each epoch (--data.keep_mb 0)
plain     the usual loop: torchvision's transforms on PIL images in a DataLoader with a worker per core, fp32,
          contiguous, model.train() on the whole model, frozen parameters without gradient, .item() in each step
hf        the loop of Hugging Face's example without Trainer: the same transforms through with_transform, a collate
          function, Accelerate's prepare, a metric's add_batch in each step; fp32, as it is launched by default

Each runs in a process of its own, and they take turns, so that a busy machine is busy for all. The validation pass and
checkpoints are outside the timing.
"""

import argparse
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

CASES = {
    "simple_cnn": ("simple_cnn", "train", ("all",)),
    "deep_cnn": ("deep_cnn", "train", ("all",)),
    "resnet50:head": ("resnet50", "head", ("head",)),
    "resnet50:finetune": ("resnet50", "finetune", ("layer3", "layer4", "head")),
}
VARIANTS = ("limit", "ours", "decoding", "plain", "hf")


# ---- the processes that are measured: each yields a rate per turn ---------------------------------------------------


def config_of(case: str, args, **sections):
    from config import check

    model, phase, modules = CASES[case]
    tree = {
        "model": {"name": model},
        "data": {"source": args.data, "batch_size": args.batch_size, "folds": 50, "test_split": None},
        "phases": {phase: {"modules": modules, "epochs": 10**6, "lr": 1e-4, "weight_decay": 1e-4}},
        "tracking": "none",
        "checkpoint": {"every_minutes": None, "keep": 1},
    }
    for name, values in sections.items():
        tree[name] = tree.get(name, {}) | values if isinstance(values, dict) else values
    return check(tree, "benchmark")


def limit(case: str, args):
    """Rates of the best variant; the first value is what the variant is."""
    import timm
    import torch
    import torch.nn.functional as F

    import folding
    import launch
    import models
    from engine import train_mode
    from phases import make_optimizer

    config = config_of(case, args)
    device = launch.make_accelerator(config).device
    name, phase, modules = CASES[case]

    def stepper(layout, precision, compiled):
        torch.manual_seed(0)
        model = timm.create_model(name, num_classes=100).to(device, memory_format=layout)
        models.freeze_all_but(model, modules)
        folding.fold(model, (32, 32), precision)
        train_mode(model)
        if compiled:
            model.compile()
        optimizer = make_optimizer(config.phases[phase], model)
        images = torch.randn(args.batch_size, 3, 32, 32, device=device).contiguous(memory_format=layout)
        labels = torch.randint(100, (args.batch_size,), device=device)

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
        steps, began = 0, time.perf_counter()
        while time.perf_counter() - began < seconds:
            for _ in range(4):
                step()
            wait(device)
            steps += 4
        return steps * args.batch_size / (time.perf_counter() - began)

    # Two looks at each, the better of which counts; then whether compiling the best one makes it better still.
    ways = list(itertools.product((torch.contiguous_format, torch.channels_last), ("no", "bf16"), (False,)))
    looks = {way: max(rate(stepper(*way), args.seconds / 4) for _ in range(2)) for way in ways}
    best = max(looks, key=looks.get)
    step = stepper(*best)
    if args.compile:
        compiled = stepper(*best[:2], True)
        rates = [[rate(one, args.seconds / 4) for one in (step, compiled)] for _ in range(3)]
        if statistics.median(second / first for first, second in rates) > 1:
            step, best = compiled, (*best[:2], True)
    layout, precision, is_compiled = best
    yield {
        "what": f"{str(layout).removeprefix('torch.')}, {'fp32' if precision == 'no' else precision}, "
        f"{'compiled' if is_compiled else 'eager'}",
        "rate": looks[(*best[:2], False)],
    }
    while True:
        yield rate(step, args.seconds)


def ours(case: str, args, **data):
    import train
    from tracking import Tracking

    class TakingTurns(Tracking):
        def epoch(self, row, *rest, **named):
            super().epoch(row, *rest, **named)
            take_turn(row["images_per_second"] if row["epoch"] > 1 else {"what": "bf16"})

    train.Tracking = TakingTurns
    with tempfile.TemporaryDirectory() as folder:
        train.train(config_of(case, args, data=data, output_dir=folder))
    yield


def decoding(case: str, args):
    return ours(case, args, keep_mb=0)


def usual_transforms():
    from torchvision import transforms as T

    from models import CIFAR100_MEAN, CIFAR100_STD

    return T.Compose(
        [
            T.RandomCrop(32, padding=4),
            T.RandomHorizontalFlip(),
            T.ColorJitter(brightness=0.2, contrast=0.2, saturation=0.2),
            T.RandomRotation(15),
            T.ToTensor(),
            T.Normalize(CIFAR100_MEAN, CIFAR100_STD),
        ]
    )


def usual_model(case: str):
    import timm
    import torch

    import models

    name, _, modules = CASES[case]
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=100)
    models.freeze_all_but(model, modules)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-4, weight_decay=1e-4)
    return model, optimizer


def plain(case: str, args):
    import numpy as np
    import torch
    from PIL import Image
    from torch import nn
    from torch.utils.data import DataLoader, Dataset

    import data
    from config import DataConfig

    source = data.load(DataConfig(source=args.data, folds=50, test_split=None))

    class Images(Dataset):
        """As torchvision's own CIFAR100: arrays in memory, each made a PIL image and transformed when it is wanted."""

        def __init__(self):
            self.arrays = [np.asarray(data.decode(row[source.image])) for row in source.train]
            self.labels = source.train[source.label]
            self.transform = usual_transforms()

        def __len__(self):
            return len(self.labels)

        def __getitem__(self, index):
            return self.transform(Image.fromarray(self.arrays[index])), self.labels[index]

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, optimizer = usual_model(case)
    model.to(device)
    criterion = nn.CrossEntropyLoss()
    loader = DataLoader(Images(), args.batch_size, shuffle=True, drop_last=True, num_workers=data.cores_per_process())
    yield {"what": "fp32"}
    while True:
        model.train()
        began, seen, loss_sum, correct = time.perf_counter(), 0, 0.0, 0
        for images, labels in loader:
            images, labels = images.to(device), labels.to(device)
            optimizer.zero_grad()
            logits = model(images)
            loss = criterion(logits, labels)
            loss.backward()
            optimizer.step()
            loss_sum += loss.item()
            correct += (logits.argmax(1) == labels).sum().item()
            seen += len(labels)
        yield seen / (time.perf_counter() - began)


def hf(case: str, args):
    import torch
    from accelerate import Accelerator
    from datasets import Image
    from torch.utils.data import DataLoader

    import data
    from config import DataConfig
    from metrics import TopKAccuracy

    os.environ["ACCELERATE_MIXED_PRECISION"] = "no"
    accelerator = Accelerator()
    source = data.load(DataConfig(source=args.data, folds=50, test_split=None))
    transforms = usual_transforms()

    def preprocess(batch):
        batch["pixel_values"] = [transforms(image.convert("RGB")) for image in batch[source.image]]
        return batch

    def collate(rows):
        return {
            "pixel_values": torch.stack([row["pixel_values"] for row in rows]),
            "labels": torch.tensor([row[source.label] for row in rows]),
        }

    rows = source.train.cast_column(source.image, Image()).with_transform(preprocess)
    loader = DataLoader(rows, shuffle=True, collate_fn=collate, batch_size=args.batch_size, drop_last=True)
    model, optimizer, loader = accelerator.prepare(*usual_model(case), loader)
    metric = TopKAccuracy(1)
    yield {"what": "fp32"}
    while True:
        model.train()
        began, seen, loss_sum = time.perf_counter(), 0, 0.0
        for batch in loader:
            with accelerator.accumulate(model):
                logits = model(batch["pixel_values"])
                loss = torch.nn.functional.cross_entropy(logits, batch["labels"])
                loss_sum += loss.detach().float()
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            predictions, references = accelerator.gather_for_metrics((logits.argsort(-1, True), batch["labels"]))
            metric.add_batch(predictions=predictions[:, :1], references=references)
            seen += len(references)
        metric.compute()
        yield seen / (time.perf_counter() - began)


def wait(device) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize()


TURNS = os.dup(1)  # what is measured may print on stdout; the turns have their own way out


def take_turn(value) -> None:
    os.write(TURNS, (json.dumps({"turn": value}) + "\n").encode())
    if not sys.stdin.readline():
        os._exit(0)


# ---- the one that lets them take turns ------------------------------------------------------------------------------


class Process:
    """A measured process. It says what it is when it is ready, and a rate each time it is asked."""

    def __init__(self, variant: str, case: str, batch_size: int, source: Path, args):
        command = [sys.executable, __file__, "--measure", variant, "--cases", case, "--data", str(source)]
        command += ["--batch_sizes", str(batch_size), "--seconds", str(args.seconds)] + ["--compile"] * args.compile
        env = {"ACCELERATE_MIXED_PRECISION": "bf16", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
        self.variant = variant
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | env
        )
        self.rates, self.ready = [], self._hear()

    def _hear(self):
        for line in self.process.stdout:
            if line.startswith('{"turn"'):
                return json.loads(line)["turn"]
        sys.exit(f"{self.variant} has ended with exit code {self.process.wait()}")

    def turn(self) -> None:
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        self.rates.append(self._hear())

    def end(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def subset(source: str, rows: int, folder: Path) -> Path:
    """The first rows of a source as parquet, so that an epoch of each variant takes as long as a turn should."""
    from datasets import Image

    import data
    from config import DataConfig

    options = {"embedded_rows": max(200, rows)} if source == "embedded" else {}
    # Not by the 50 folds that the variants hold out by, or nothing would be left to hold out.
    opened = data.load(DataConfig(source=source, test_split=None, folds=7, **options))
    train = opened.train.select(range(min(rows, len(opened.train)))).remove_columns(data.ROW)
    path = folder / f"rows-{rows}"
    path.mkdir(exist_ok=True)
    train.cast_column(opened.image, Image()).to_parquet(path / "train.parquet")
    return path


def measure(case: str, batch_size: int, args, folder: Path) -> list[dict]:
    """The rows of one case: its variants, in turns."""
    first = Process("limit", case, batch_size, folder, args)
    rows = max(200, 20 * batch_size, round(first.ready["rate"] * args.seconds / 0.98))
    source = subset(args.data, rows, folder)
    processes = [first] + [Process(variant, case, batch_size, source, args) for variant in VARIANTS[1:]]
    for round_number in range(args.rounds):
        for process in processes[:: 1 if round_number % 2 else -1]:
            process.turn()
    results = []
    for process in processes:
        process.end()
        model, phase, _ = CASES[case]
        results.append(
            {
                "model": model,
                "phase": phase,
                "batch_size": batch_size,
                "device": device_name(),
                "variant": process.variant,
                "what": process.ready["what"],
                "images_per_second": round(statistics.median(process.rates), 1),
                "spread": [round(min(process.rates), 1), round(max(process.rates), 1)],
                # Each round's own ratio: a machine that was slow for one was slow for the other.
                "of_limit": round(statistics.median(map(lambda a, b: a / b, process.rates, first.rates)), 3),
                "ours_to_this": round(statistics.median(map(lambda a, b: a / b, processes[1].rates, process.rates)), 2),
            }
        )
    return results


def device_name() -> str:
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()} CPU cores"


def conditions() -> dict:
    from importlib.metadata import version

    names = ("torch", "torchvision", "timm", "accelerate", "datasets")
    return {
        "device": device_name(),
        "machine": platform.machine(),
        "system": platform.system(),
        "python": platform.python_version(),
        **{name: version(name) for name in names},
    }


def plot(rows: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    groups = list(dict.fromkeys((row["model"], row["phase"], row["batch_size"]) for row in rows))
    figure, axes = plt.subplots(figsize=(2 + 1.6 * len(groups), 4.5), layout="constrained")
    for number, variant in enumerate(VARIANTS):
        heights = [
            next(row["of_limit"] for row in rows if row["variant"] == variant and group == key(row)) for group in groups
        ]
        places = [place + (number - 2) * 0.16 for place in range(len(groups))]
        bars = axes.bar(places, heights, 0.15, label=variant)
        axes.bar_label(bars, fmt="%.2f", fontsize=7)
    axes.set_xticks(range(len(groups)), [f"{model}\n{phase}, batch {size}" for model, phase, size in groups])
    axes.set_ylabel("images per second, as a share of the limit")
    axes.set_title(f"Training rate on {rows[0]['device']}")
    axes.legend(ncols=len(VARIANTS), loc="upper center", bbox_to_anchor=(0.5, -0.12))
    figure.savefig(path, dpi=130)


def key(row: dict) -> tuple:
    return row["model"], row["phase"], row["batch_size"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), help="models and phases [all]")
    parser.add_argument("--batch_sizes", nargs="+", type=int, default=[64, 512], help="images a step [64 512]")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each variant [5]")
    parser.add_argument("--seconds", type=float, default=8.0, help="length of a turn at the limit's rate [8]")
    parser.add_argument("--data", default="embedded", help="32x32 images: folder of parquet, or embedded [embedded]")
    parser.add_argument("--compile", action="store_true", help="let the limit try torch.compile, too")
    parser.add_argument(
        "--output", type=Path, default=Path("throughput"), help="name of the .json and .png [throughput]"
    )
    parser.add_argument("--measure", choices=VARIANTS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        args.batch_size = args.batch_sizes[0]
        os.dup2(2, 1)
        import torch

        import data

        torch.set_num_threads(data.cores_per_process())
        for value in globals()[args.measure](args.cases[0], args):
            take_turn(value)
        return

    said = conditions()
    print(", ".join(f"{name} {value}" for name, value in said.items()), flush=True)
    print(f"{'':36s}{'images/s':>9s}  {'spread':16s}{'of limit':>8s}  ours is")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for case, batch_size in itertools.product(args.cases, args.batch_sizes):
            for row in measure(case, batch_size, args, Path(folder)):
                rows.append(row)
                spread = f"({row['spread'][0]:.0f} to {row['spread'][1]:.0f})"
                print(
                    f"{row['model']:11s}{row['phase']:9s}{batch_size:4d}  {row['variant']:9s}"
                    f"{row['images_per_second']:10.0f}  {spread:16s}{row['of_limit']:8.2f}  "
                    f"{row['ours_to_this']:6.2f} x  {row['what']}",
                    flush=True,
                )
            args.output.with_suffix(".json").write_text(json.dumps({"conditions": said, "rows": rows}, indent=1) + "\n")
            plot(rows, args.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
