"""How fast is the augmentation, batched on the device, against torchvision's on single PIL images?

    python benchmarks/augment.py            # prints the rates and their ratios to torchvision's

Runs the report's augmentation both ways, and AugMix batched, each with normalisation, alternately on the same 32x32
images, with torch's default number of threads (torchvision's way uses one core; a loader would run one such worker per
core). Absolute rates depend on the machine; what counts are the ratios of medians, measured side by side.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from turns import positive


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=positive, default=7, help="alternations [7]")
    parser.add_argument("--batch_size", type=positive, default=64, help="images a batch [64]")
    parser.add_argument("--batches", type=positive, default=10, help="batches a round [10]")
    args = parser.parse_args()

    import torch
    from loops import usual_transforms

    import augment
    import data
    import decoding
    from config import DataConfig
    from models import CIFAR100_MEAN, CIFAR100_STD
    from recipe import check

    source = data.load(DataConfig(source="embedded", embedded_rows=max(200, args.batch_size)))
    rows = [source.train[i % len(source.train)] for i in range(args.batch_size)]
    images = [decoding.decode(row[source.image]) for row in rows]
    batch = decoding.Collate(source.image, source.label, len(source.class_names), source.size, None)(rows)["image"]
    cfg = {"mean": CIFAR100_MEAN, "std": CIFAR100_STD}

    def ours(policy):
        phases = {"only": {"modules": "all", "epochs": 1, "lr": 1}}
        config = check({"phases": phases, "augment": {"policy": policy}}, "benchmark")
        transform, _ = augment.build(config, cfg, torch.device("cpu"))
        return lambda: transform(batch)

    theirs = usual_transforms(CIFAR100_MEAN, CIFAR100_STD)
    ways = {
        "torchvision, image by image": lambda: torch.stack([theirs(image) for image in images]),
        "batched, on the device": ours("report"),
        "AugMix, batched": ours("augmix"),
    }
    rates = {name: [] for name in ways}
    for round_number in range(args.rounds + 1):
        for name, run in ways.items():
            began = time.perf_counter()
            for _ in range(args.batches):
                run()
            if round_number:  # the first is a warm-up
                rates[name].append(args.batches * args.batch_size / (time.perf_counter() - began))
    usual = statistics.median(rates["torchvision, image by image"])
    for name, values in rates.items():
        median = statistics.median(values)
        spread = f"({min(values):.0f} to {max(values):.0f})"
        print(f"{name:<28s} {median:8.0f} images/s  {spread:<18s} {median / usual:5.1f} x torchvision's")
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")


if __name__ == "__main__":
    main()
