"""What does each speed lever bring, alone?

    python benchmarks/levers.py --data CIFAR100                           # prints a table, writes levers.json
    python benchmarks/levers.py --cases resnet50:head --levers folding

A lever's figure is train.py's rate with it over its rate without it, all else at its default, in bf16 (fp32 where that
would be emulated): 1.50 means that it trains an epoch 1.5 times as fast. Patches (speed.py) take out what train.py has;
what it lacks is put in ("not used"). Both train whole epochs in turns; the figure is the median of the rounds' ratios.
GPU levers are left out on a CPU, CPU levers on a GPU, and those of bf16 where it would be emulated.
"""

import argparse
import tempfile
from pathlib import Path

import loops
import turns
from patches import PATCHES

from errors import reported

FROZEN = ("resnet50:head", "resnet50:finetune")
ALL = ("deep_cnn", *FROZEN)
LEVERS = {  # patches with the lever, patches without it, the cases to measure it for
    "bf16": (["bf16"], ["fp32"], ALL),
    "channels_last": ([], ["images_contiguous", "folded_contiguous"], ALL),
    "weights_contiguous": ([], ["weights_channels_last"], ALL),
    "frozen_in_eval_mode": (["unfolded"], ["drifting_batch_norm"], FROZEN),
    "folding": ([], ["unfolded"], FROZEN),
    "small_maps_as_products": ([], ["small_maps_convolved"], FROZEN),
    "packed_kernels": ([], ["kernels_not_packed"], FROZEN),
    "decoded_once": ([], ["decoding"], ALL),
    "decoded_ahead": (["decoding"], ["decoding", "no_workers"], ALL),
    "glibc_keeps_memory": ([], ["glibc_as_it_is"], ALL),
    "thread_per_core": ([], ["one_thread"], ALL),
    "fused_optimizer": ([], ["unfused"], ALL),
    "figures_on_device": ([], ["read_in_each_step"], ("deep_cnn", "resnet50:head")),
    "cuda_graphs": ([], ["launched"], ALL),
    "images_on_gpu": ([], ["images_in_memory"], ALL),
    "no_augmentation": (["unaugmented"], [], ALL),
    "no_grad_trunk": (["no_grad_trunk"], [], FROZEN),
    "compile": (["compiled"], ["launched"], ALL),
}
CPU_ONLY = (
    "glibc_keeps_memory",
    "thread_per_core",
    "weights_contiguous",
    "channels_last",  # graphs copy the images
    "small_maps_as_products",
    "packed_kernels",
)
BF16_ONLY = ("bf16", "packed_kernels")
GPU_ONLY = ("cuda_graphs", "images_on_gpu")
NOT_USED = ("no_augmentation", "no_grad_trunk", "compile")
PRECISIONS = {"bf16": "bf16", "fp32": "no"}
OPTIONS = {"decoding": {"keep_mb": 0}, "no_workers": {"workers": 0}}
OTHERWISE = (*PRECISIONS, *OPTIONS)  # no patches: the launcher's precision, and data options


# ---- measuring ------------------------------------------------------------------------------------------------------


def child(args) -> None:
    names = args.measure.split(",")
    for name in names:
        if name and name not in OTHERWISE:
            PATCHES[name]()
    options = {key: value for name in names for key, value in OPTIONS.get(name, {}).items()}
    with tempfile.TemporaryDirectory() as folder:
        config = loops.config_of(args.cases[0], args.data, args.batch_size, folder, data=options)
        turns.answer(lambda: loops.ours(config))


def measure(case: str, args, folder: Path) -> list[dict]:
    def start(patches, source):
        options = ["--cases", case, "--data", source, "--batch_size", args.batch_size]
        precision = next((PRECISIONS[name] for name in patches if name in PRECISIONS), None)
        return turns.Process(",".join(patches), *options, precision=precision)

    # Estimate the rate first: it decides how many rows a turn takes.
    source = turns.subset(args.data, 20 * args.batch_size, folder)
    guess = start([], source)
    guess.turn()
    rate = guess.turn()
    guess.end()
    source = turns.subset(args.data, max(10 * args.batch_size, round(rate * args.seconds)), folder)
    default, results = start([], source), []
    elsewhere = [*(CPU_ONLY if turns.on_gpu() else GPU_ONLY), *(BF16_ONLY if turns.fast_precision() == "no" else ())]
    for name in args.levers:
        with_it, without, cases = LEVERS[name]
        if case not in cases or name in elsewhere:
            print(f"{name:32s}{case:19s} left out: it does nothing {'here' if case in cases else 'for this case'}")
            continue
        pair = [start(patches, source) if patches else default for patches in (with_it, without)]
        turns.alternate(pair, args.rounds)
        ratio, spread = turns.ratio(*pair)
        row = {"lever": name, "case": case, "batch_size": args.batch_size, "ratio": ratio, "spread": spread}
        results.append(row)
        used = "not used" if name in NOT_USED else ""
        print(f"{name:22s}{used:10s}{case:19s}{ratio:6.2f} x  ({spread[0]:.2f} to {spread[1]:.2f})", flush=True)
        for process in pair:
            process.values.clear()
            if process is not default:
                process.end()
    default.end()
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=ALL, default=list(ALL), help="models and phases [all]")
    parser.add_argument("--levers", nargs="+", choices=LEVERS, default=list(LEVERS), help="which of them [all]")
    parser.add_argument("--batch_size", type=turns.positive, default=64, help="images a step [64]")
    parser.add_argument("--rounds", type=turns.positive, default=5, help="turns of each that count [5]")
    parser.add_argument("--seconds", type=turns.seconds, default=4.0, help="length of a turn at train.py's rate [4]")
    turns.add_options(parser, "levers")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    args = parser.parse_args()
    turns.prepare()
    if args.measure is not None:
        return child(args)

    said = turns.conditions()
    turns.tell(said)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for case in args.cases:
            rows += measure(case, args, Path(folder))
            turns.save(args.output, said, rows)


if __name__ == "__main__":
    with reported():
        main()
