"""How fast is the augmentation, batched on the device, beside torchvision's on PIL images one by one?

    python benchmarks/augment.py            # prints both rates and their ratio

Both do the report's augmentation and normalisation on the same 32x32 images, alternately, on as many threads as torch
takes for itself (torchvision's way uses one core; a loader would run one such worker per core). Absolute rates depend
on the machine; the ratio of medians, measured side by side, is what counts.
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

    source = data.load(DataConfig(source="embedded", embedded_rows=args.batch_size * 4))
    rows = [source.train[i % len(source.train)] for i in range(args.batch_size)]
    images = [decoding.decode(row[source.image]) for row in rows]
    batch = decoding.Collate(source.image, source.label, len(source.class_names), source.size, None)(rows)["image"]
    config = check({"phases": {"only": {"modules": "all", "epochs": 1, "lr": 1}}}, "benchmark")
    cfg = {"mean": CIFAR100_MEAN, "std": CIFAR100_STD}
    ours, _ = augment.build(config, cfg, torch.device("cpu"))
    theirs = usual_transforms(CIFAR100_MEAN, CIFAR100_STD)
    ways = {
        "batched, on the device": lambda: ours(batch),
        "torchvision, image by image": lambda: torch.stack([theirs(image) for image in images]),
    }
    rates = {name: [] for name in ways}
    for round_number in range(args.rounds + 1):
        for name, run in ways.items():
            began = time.perf_counter()
            for _ in range(args.batches):
                run()
            if round_number:  # the first warms up
                rates[name].append(args.batches * args.batch_size / (time.perf_counter() - began))
    medians = [statistics.median(values) for values in rates.values()]
    for name, values in rates.items():
        print(f"{name:<28s} {statistics.median(values):8.0f} images/s  ({min(values):.0f} to {max(values):.0f})")
    print(
        f"ratio of medians {medians[0] / medians[1]:.1f}, torch {torch.__version__}, {torch.get_num_threads()} threads"
    )


if __name__ == "__main__":
    main()
