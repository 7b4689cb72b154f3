"""The command line of predict.py: which images, which figures, and the run's configuration for them. No torch."""

import argparse
import dataclasses
import os

from commandline import Parser, add_data_options, expanded
from config import Config, hub_id
from errors import USAGE, UserError
from recipe import overridden, read_yaml

WHICH_DATA = ("source", "subset", "revision", "train_split", "test_split", "image", "label")
HOW_READ = ("streaming", "keep_mb", "on_corrupt", "workers", "batch_size", "micro_batch_size")


def parse(argv: list[str] | None = None, description: str = "") -> tuple[argparse.Namespace, Config]:
    """The command line, and the run's configuration with the requested data.

    Args:
        description: what --help begins with.

    Raises:
        UserError: the folder is not a run with trained weights, or an option is unknown, invalid or out of place.
    """
    parser = Parser(
        prog="predict.py",
        usage="python predict.py RUN [--OPTION VALUE ...]",
        description=description,
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=34, width=110),
        allow_abbrev=False,
    )
    parser.add_argument(
        "run", type=expanded, metavar="RUN", help="run folder, finished or not, with best/ and config.yaml"
    )
    group = parser.add_argument_group("what to predict", "one of these; without any, --split test")
    what = group.add_mutually_exclusive_group()
    what.add_argument("--split", choices=("test", "validation"), help="a split of the run's data")
    what.add_argument("--images", type=expanded, metavar="DIR", help="image files without labels, subfolders included")
    what.add_argument(
        "--robustness",
        action="store_true",
        help="the test split under the 19 corruptions of Hendrycks & Dietterich (2019), made here: not comparable with "
        "figures on the published files",
    )
    what.add_argument(
        "--cifar100c",
        type=expanded,
        metavar="DIR",
        help="the official CIFAR-100-C: 19 .npy files named after their corruptions, and labels.npy",
    )
    what.add_argument(
        "--ood",
        type=expanded,
        metavar="DIR",
        help="the course's distortion00.npy to distortion18.npy: writes a submission of 950,000 rows",
    )
    what.add_argument(
        "--push_to_hub",
        type=_hub_id,
        metavar="ID",
        help="upload best/ with its model card as USER/MODEL, which becomes public unless your account says otherwise",
    )
    parser.add_argument(
        "--tta",
        choices=("flips", "shifts"),
        help="average the probabilities over views of each image. flips: itself and its mirror image; shifts: these, "
        "and both moved by a sixteenth of the side to the upper left and to the lower right (six views)",
    )
    parser.add_argument(
        "--limit",
        type=_positive,
        metavar="N",
        help="a quick look: only the first N images (of each severity); of class folders, N from all over them",
    )
    parser.add_argument("--seed", type=_seed, metavar="INT", help="seed of --robustness's corruptions [0]")
    parser.add_argument(
        "--output", type=expanded, metavar="FILE", help="where the CSV goes [RUN/predictions/NAME.csv, submission.csv]"
    )
    about = "Other data than the run's own, or another way to read them. Without these: as the run has them."
    add_data_options(parser, WHICH_DATA + HOW_READ, "data", about)
    args = parser.parse_args(argv)
    _check_together(args)
    path = args.run / "config.yaml"
    if not os.path.isfile(path):  # pathlib's raises if a name is too long or a folder unreadable
        raise UserError(f"{args.run} is not a run folder: it has no config.yaml", USAGE)
    for needed in ("best/config.json", "best/model.safetensors"):
        if not os.path.isfile(args.run / needed):
            raise UserError(
                f"{args.run} has no {needed}: the run has not finished an epoch, or lost its weights", USAGE
            )
    tree, overrides = read_yaml(path), {key: value for key, value in vars(args).items() if key.startswith("data.")}
    # Turn off augmentation, and mixing, which would reject a batch size of 1.
    config = overridden(tree | {"tracking": "none", "augment": {"policy": "none"}}, overrides, path)
    # The weights are the run's own, so only the data may have to come from the hub.
    return args, dataclasses.replace(config, model=dataclasses.replace(config.model, pretrained=False))


def _check_together(args: argparse.Namespace) -> None:
    """UserError if an option does not fit what is to be predicted."""
    if args.limit and (args.ood or args.push_to_hub):
        raise UserError("--limit: a submission or an upload must be complete", USAGE)
    if vars(args).get("data.micro_batch_size") == "auto":
        raise UserError("--data.micro_batch_size: only training tries out what fits; give a number here", USAGE)
    if args.output and (args.robustness or args.cifar100c or args.push_to_hub):
        raise UserError("--output: it names the CSV of predictions, and only accuracies are written here", USAGE)
    if args.seed is not None and not args.robustness:
        raise UserError("--seed: it is the seed of --robustness; nothing else here is random", USAGE)
    if args.tta and args.push_to_hub:
        raise UserError("--tta: an upload predicts nothing", USAGE)
    chosen = next((name for name in WHICH_DATA if f"data.{name}" in vars(args)), None)
    if chosen and (args.images or args.cifar100c or args.ood or args.push_to_hub):
        raise UserError(f"--data.{chosen}: it chooses labelled data, for --split and --robustness", USAGE)
    if args.output and (not args.output.name or os.path.isdir(args.output)):
        raise UserError(f"--output: {args.output} is a folder: name a file in it", USAGE)
    if args.output and os.path.exists(args.output) and not os.path.isfile(args.output):
        raise UserError(f"--output: {args.output} is not a regular file", USAGE)
    if args.images and not os.path.isdir(args.images):
        raise UserError(f"--images: there is no folder {args.images}", USAGE)


def _positive(text: str) -> int:
    return _at_least(1, text)


def _seed(text: str) -> int:
    return _at_least(0, text)


def _hub_id(text: str) -> str:
    try:
        return hub_id(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{error}, not {text}") from None


def _at_least(least: int, text: str) -> int:
    if not text.isdecimal() or len(text) > 15 or int(text) < least:  # JSON readers know no larger ones
        raise argparse.ArgumentTypeError(
            f"should be a whole number of at least {least}, of at most 15 digits, not {text}"
        )
    return int(text)
