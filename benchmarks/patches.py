"""Run train.py with patches: experiments that are not options of it.

    accelerate launch benchmarks/patches.py drifting_batch_norm -- --config recipes/resnet50.yaml --seed 1

applies the patches named before `--`; train.py's options follow it. Patches put back the report's faults or add tricks
(experiments.py), or take out what makes training fast (speed.py). `python benchmarks/patches.py --list` lists them.
"""

import argparse
import dataclasses
import sys

from experiments import AUGMENTING, EXCLUSIVE
from patching import PATCHES, mark, patch

import hub
from commandline import parse
from config import PLAIN_NAME
from errors import USAGE, UserError, reported
from recipe import PATCHED


def main() -> None:
    own, rest = sys.argv[1:], []
    if "--" in own:
        own, rest = own[: own.index("--")], own[own.index("--") + 1 :]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("patches", nargs="*", metavar="PATCH", help="what to change; --list tells")
    parser.add_argument("--list", action="store_true", help="print the patches and end")
    args = parser.parse_args(own)
    if args.list:
        for name, function in PATCHES.items():
            print(f"{name:34s} {' '.join((function.__doc__ or '').split())}")
        return
    if not args.patches:
        parser.error("name a patch; --list tells which there are")
    if unknown := [name for name in args.patches if name not in PATCHES]:
        parser.error(f"there is no patch {unknown[0]}; --list tells which there are")
    for group in EXCLUSIVE:
        if len(both := [name for name in args.patches if name in group]) > 1:
            parser.error(f"{both[0]} and {both[1]} don't go together")
    config, resume = parse(rest, patched=True)
    recipe = config.recipe.partition(PATCHED)[0] + mark(args.patches)
    if len(recipe) > PLAIN_NAME["max_length"]:
        parser.error("the recipe's name, which records the patches, would be too long: name fewer")
    if resume and config.recipe != recipe:
        raise UserError(f"--resume: {resume} was started as {config.recipe}, not with these patches alone", USAGE)
    if resume and "ema" in args.patches:
        raise UserError(f"--resume: averaged weights are in no checkpoint; delete {resume} and start again", USAGE)
    if config.augment.policy != "report" and (lost := [name for name in args.patches if name in AUGMENTING]):
        raise UserError(f"{lost[0]} changes augment.policy report, not {config.augment.policy}", USAGE)
    hub.check(config, resume)
    import launch
    import train

    # The recipe's name in the run's config.yaml records the patches; the hint to resume must name them, too.
    script = " ".join(("benchmarks/patches.py", *args.patches, "--"))
    patch(launch, "resume_hint", lambda resume_hint: lambda *run: resume_hint(*run).replace("train.py", script, 1))
    for name in args.patches:
        PATCHES[name]()
    train.train(dataclasses.replace(config, recipe=recipe), resume)


if __name__ == "__main__":
    with reported():
        main()
