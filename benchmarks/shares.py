"""What shares of a step's time do its operations take, in traces of `train.py --profile N`?

    python benchmarks/shares.py runs/NAME/profile/finetune.json.gz ...    # a column for each trace

An operation's time excludes that of the operations it calls. Time between operations is spent in Python or waiting.
For CPU traces only: on a GPU, operations are only launched, and end later.
"""

import argparse
import gzip
import json
import sys
from collections import Counter, defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from errors import UserError, first_line, reported

BETWEEN = "between operations"
GROUPS = {  # by the first with a word in the operation's name
    BETWEEN: ("profilerstep",),
    "convolutions, backward": ("convolution_backward", "convolutionbackward"),
    "convolutions, forward": ("conv",),
    "batch norms": ("batch_norm", "batchnorm"),
    "optimizer": ("adam", "sgd", "optimizer"),
    "copies": ("copy", "contiguous", "clone"),
    "matrix products": ("mm", "linear"),  # linear layers, and on a CPU convolutions of small maps
    "pooling, ReLU": ("pool", "threshold", "relu", "clamp_min"),
    "augmentation's resampling": ("grid_sampl",),  # where pixels come from is arithmetic, and among the others
}


def group_of(operation: str) -> str:
    found = (name for name, words in GROUPS.items() if any(word in operation.lower() for word in words))
    return next(found, "other operations")


def shares(path: Path) -> tuple[float, int, Counter]:
    """A trace's milliseconds a step, steps, and the groups' shares of their time.

    Raises:
        UserError: it can't be read, or holds no steps.
    """
    try:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            events = json.load(file)["traceEvents"]
        events = [event for event in events if event.get("cat") in ("cpu_op", "user_annotation")]
        threads = defaultdict(list)
        for event in events:
            threads[event["tid"]].append((event["ts"], event["dur"], event["name"]))
    except (OSError, EOFError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not a trace that --profile wrote: {first_line(error)}") from error
    steps = [event["dur"] for event in events if event["name"].startswith("ProfilerStep")]
    if not steps:
        raise UserError(f"{path} holds no steps")
    own = Counter()
    for operations in threads.values():
        open_ones = []  # (end, name) of the next one's possible callers
        for start, length, name in sorted(operations, key=lambda it: (it[0], -it[1])):
            while open_ones and open_ones[-1][0] <= start:
                open_ones.pop()
            own[group_of(name)] += length
            if open_ones:
                own[group_of(open_ones[-1][1])] -= length
            open_ones.append((start + length, name))
    return sum(steps) / len(steps) / 1000, len(steps), Counter({name: took / own.total() for name, took in own.items()})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("traces", nargs="+", type=Path, metavar="TRACE", help="a run's profile/PHASE.json.gz")
    args = parser.parse_args()
    found = [shares(path) for path in args.traces]
    print(f"{'':30s}" + "".join(f"{path.name.split('.')[0][:12]:>14s}" for path in args.traces))
    print(f"{'milliseconds a step':30s}" + "".join(f"{milliseconds:14.1f}" for milliseconds, _, _ in found))
    print(f"{'steps':30s}" + "".join(f"{count:14d}" for _, count, _ in found))
    for name in [*(name for name in GROUPS if name != BETWEEN), "other operations", BETWEEN]:
        print(f"{name:30s}" + "".join(f"{by[name]:14.1%}" for _, _, by in found))


if __name__ == "__main__":
    with reported():
        main()
