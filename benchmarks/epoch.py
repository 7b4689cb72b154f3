"""Where do the seconds of an epoch go: training, validation, metrics, best weights, checkpoint?

    python benchmarks/epoch.py --data CIFAR100                            # prints a table, writes epoch.json
    python benchmarks/epoch.py --data CIFAR100 --cases deep_cnn --epochs 5

train.py trains with a fifth of the rows held out for validation. It is made to believe that each epoch is the best so
far, so that each writes its best weights. The first epoch warms up; the table has the medians of the others. `rest` is
what has no name of its own: the history, starting a new pass over the loader.
"""

import argparse
import dataclasses
import statistics
import tempfile
import time

import loops
import turns
from loops import CASES
from patching import patch

from errors import reported

PARTS = ("validation", "metrics", "best weights", "checkpoint")
ALL = ("deep_cnn", "resnet50:head", "resnet50:finetune")


def seconds_of(case: str, args, folder: str) -> list[dict[str, float]]:
    """The seconds of each epoch by part: training, PARTS, the rest, and the whole."""
    import checkpoint
    import metrics
    import train

    spent, running = dict.fromkeys(("training", *PARTS), 0.0), []
    ends, epochs = [time.perf_counter()], []

    def timed(name):
        def make(function):
            def call(*arguments):
                if running:  # validation's metrics are validation
                    return function(*arguments)
                running.append(name)
                began = time.perf_counter()
                result = function(*arguments)
                spent[running.pop()] += time.perf_counter() - began
                return result

            return call

        return make

    patch(train, "validate", timed("validation"))
    patch(metrics.Classification, "compute", timed("metrics"))
    patch(checkpoint, "save_best", timed("best weights"))
    patch(checkpoint.Checkpoints, "save", timed("checkpoint"))
    validated = iter(range(1, 10**6))
    patch(train, "validate", lambda real: lambda *rest: real(*rest) | {"top1": 1 - 1 / next(validated)})

    class Watching(train.Tracking):
        def watch(self, *rest):
            began = time.perf_counter()
            yield from super().watch(*rest)
            spent["training"] += time.perf_counter() - began

    class Saving(checkpoint.Checkpoints):
        def save(self, *rest):  # the last thing in an epoch
            super().save(*rest)
            ends.append(time.perf_counter())
            whole = ends[-1] - ends[-2]
            epochs.append(spent | {"rest": whole - sum(spent.values()), "whole": whole})
            spent.update(dict.fromkeys(spent, 0.0))

    train.Tracking, checkpoint.Checkpoints = Watching, Saving
    config = loops.config_of(case, args.data, args.batch_size, folder, data={"folds": 5})
    phases = {name: dataclasses.replace(phase, epochs=args.epochs + 1) for name, phase in config.phases.items()}
    train.train(dataclasses.replace(config, phases=phases))
    return epochs[1:]


def child(args) -> None:
    with tempfile.TemporaryDirectory() as folder:
        turns.answer(lambda: seconds_of(args.measure, args, folder))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(ALL), help="models and phases [all but one]")
    parser.add_argument("--batch_size", type=turns.positive, default=64, help="images a step [64]")
    parser.add_argument("--epochs", type=turns.positive, default=3, help="epochs that count [3]")
    turns.add_options(parser, "epoch")
    parser.add_argument("--measure", choices=CASES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    turns.prepare()
    if args.measure:
        return child(args)

    said, rows = turns.conditions(), []
    turns.tell(said)
    for case in args.cases:
        options = ["--data", args.data, "--batch_size", args.batch_size, "--epochs", args.epochs]
        process = turns.Process(case, *options)
        epochs = [process.ready] + [process.turn() for _ in range(args.epochs - 1)]
        process.end()
        row = {name: round(statistics.median(epoch[name] for epoch in epochs), 3) for name in epochs[0]}
        rows.append({"case": case, "batch_size": args.batch_size, "epochs": args.epochs} | row)
        print(f"{case:19s}" + "  ".join(f"{name} {value:.2f} s" for name, value in row.items()), flush=True)
        turns.save(args.output, said, rows)


if __name__ == "__main__":
    with reported():
        main()
