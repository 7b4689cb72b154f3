"""What does each lever of speed bring, alone?

    python benchmarks/levers.py --data CIFAR100                           # prints a table, writes levers.json
    python benchmarks/levers.py --cases resnet50:head --levers folding

A lever's figure is the rate of train.py with it over the rate without it, all else being as it is by default, in bf16:
1.50 means that it makes an epoch's training half as fast again. What train.py has is taken out for this, by patches of
this script, and what it has not is put in ("not used"). Whole epochs, taking turns; the median of the rounds' ratios.
"""

import argparse
import tempfile
from pathlib import Path

import loops
import turns

from errors import told

# ---- patches: train.py as it is, but for one thing ------------------------------------------------------------------


def patch(module, name: str, make) -> None:
    """Put what `make` makes of it in the place of a module's attribute, which has to be there."""
    setattr(module, name, make(getattr(module, name)))


def unfolded():
    import folding

    patch(folding, "fold", lambda _: lambda *_: 0)


def all_in_training_mode():
    """Batch norms of frozen layers look at the batch, as under a bare model.train()."""
    import engine

    patch(engine, "train_mode", lambda _: lambda model: model.train())


def contiguous():
    """Images as weights."""
    import torch

    patch(torch, "channels_last", lambda _: torch.contiguous_format)


def weights_channels_last():
    """Weights as images."""
    import torch

    import launch

    patch(launch, "in_its_layout", lambda _: lambda model, _: model.to(memory_format=torch.channels_last))


def unfused():
    import phases

    def make(real):
        class Unfused(real):
            found_inf = property(lambda self: None, lambda self, value: None)  # only fused ones may be told

            def __init__(self, parameters, fused, **options):
                super().__init__(parameters, **options)

        return Unfused

    for name in ("Adam", "AdamW", "SGD"):
        patch(phases, name, make)


def unaugmented():
    import augment

    patch(augment, "ReportAugment", lambda _: augment.Normalize)


def read_in_each_step():
    """Loss and accuracy as Python numbers after each step."""
    from metrics import Classification

    def reading(add):
        def read_and_add(self, losses, classes, labels):
            losses.mean().item(), (classes[:, 0] == labels).sum().item()
            add(self, losses, classes, labels)

        return read_and_add

    patch(Classification, "add", reading)


def one_thread():
    """What accelerate launch sets a CPU training to."""
    import launch

    patch(launch, "cores_per_process", lambda _: lambda: 1)


def glibc_as_it_is():
    import launch

    patch(launch, "_keep_memory", lambda _: lambda: None)


def no_grad_trunk():
    """ResNet's frozen beginning under an explicit no_grad."""
    import torch
    from timm.models.resnet import ResNet

    def forward_features(self, images):
        stages = (self.conv1, self.bn1, self.act1, self.maxpool, self.layer1, self.layer2, self.layer3, self.layer4)
        for stage in stages:
            frozen = not any(parameter.requires_grad for parameter in stage.parameters())
            with torch.set_grad_enabled(not frozen and torch.is_grad_enabled()):
                images = stage(images)
        return images

    patch(ResNet, "forward_features", lambda _: forward_features)


def compiled():
    import folding

    def compiling(fold):
        def fold_and_compile(model, *rest):
            count = fold(model, *rest)
            model.compile()
            return count

        return fold_and_compile

    patch(folding, "fold", compiling)


def nothing():
    """Patches nothing: the process is told otherwise what to do."""


FROZEN = ("resnet50:head", "resnet50:finetune")
ALL = ("deep_cnn", *FROZEN)
LEVERS = {  # patches with the lever, patches without it, the cases to measure it for
    "bf16": ([], ["fp32"], ALL),
    "images_channels_last": ([], ["contiguous"], ALL),
    "weights_contiguous": ([], ["weights_channels_last"], ALL),
    "frozen_in_eval_mode": (["unfolded"], ["unfolded", "all_in_training_mode"], FROZEN),
    "folding": ([], ["unfolded"], FROZEN),
    "decoded_once": ([], ["decoding"], ALL),
    "glibc_keeps_memory": ([], ["glibc_as_it_is"], ALL),
    "thread_per_core": ([], ["one_thread"], ALL),
    "fused_optimizer": ([], ["unfused"], ALL),
    "figures_on_device": ([], ["read_in_each_step"], ("deep_cnn", "resnet50:head")),
    "no_augmentation": (["unaugmented"], [], ALL),
    "no_grad_trunk": (["no_grad_trunk"], [], FROZEN),
    "compile": (["compiled"], [], ALL),
}
NOT_USED = ("no_augmentation", "no_grad_trunk", "compile")
fp32 = decoding = nothing  # by the launcher's precision, and by an option


# ---- measuring ------------------------------------------------------------------------------------------------------


def child(args) -> None:
    patches = args.measure.split(",")
    for name in filter(None, patches):
        globals()[name]()
    keep = {"keep_mb": 0} if "decoding" in patches else {}
    with tempfile.TemporaryDirectory() as folder:
        config = loops.config_of(args.cases[0], args.data, args.batch_size, folder, data=keep)
        turns.answer(lambda: loops.ours(config))


def measure(case: str, args, folder: Path) -> list[dict]:
    def start(patches, source):
        options = ["--cases", case, "--data", source, "--batch_size", args.batch_size]
        return turns.Process(",".join(patches), *options, precision="no" if "fp32" in patches else "bf16")

    # First a guess at the rate, which says how many rows a turn takes.
    source = turns.subset(args.data, 20 * args.batch_size, folder)
    guess = start([], source)
    guess.turn()
    rate = guess.turn()
    guess.end()
    source = turns.subset(args.data, max(10 * args.batch_size, round(rate * args.seconds)), folder)
    default, results = start([], source), []
    for name in args.levers:
        with_it, without, cases = LEVERS[name]
        if case not in cases:
            continue
        pair = [start(patches, source) if patches else default for patches in (with_it, without)]
        turns.alternate(pair, args.rounds)
        ratios = sorted(one / two for one, two in zip(pair[0].values, pair[1].values, strict=True))
        results.append(
            {
                "lever": name,
                "case": case,
                "batch_size": args.batch_size,
                "ratio": round(turns.ratio(*pair), 3),
                "spread": [round(ratios[0], 3), round(ratios[-1], 3)],
            }
        )
        row = results[-1]
        used = "not used" if name in NOT_USED else ""
        print(f"{name:22s}{used:10s}{case:19s}{row['ratio']:6.2f} x  ({ratios[0]:.2f} to {ratios[-1]:.2f})", flush=True)
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
    parser.add_argument("--seconds", type=float, default=4.0, help="length of a turn at train.py's rate [4]")
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
    with told():
        main()
