"""The command line of train.py, and what other commands share with it.

Each option is a field of `config.py`, with its help. No torch here: `--help` must answer at once.
"""

import argparse
import os
import re
import sys
import typing
from pathlib import Path
from typing import Literal

from pydantic_core import PydanticUndefined

from config import SECTIONS, Config, DataConfig, PhaseConfig
from errors import USAGE, UserError
from recipe import DEFAULT_RECIPE, nearest, overridden, quoted, read_yaml, script_of
from text import plain


def parse(argv: list[str] | None = None, patched: bool = False) -> tuple[Config, Path | None]:
    """The command line of train.py as (configuration, run folder to resume or None).

    A resumed run's recipe is its own config.yaml, unless --config names one; `runs.check_changes` judges differences
    later. `--help` prints the options with the chosen recipe's values as defaults and exits.

    Args:
        patched: whether benchmarks/patches.py runs this, so that the configuration may be a patched run's.

    Raises:
        UserError: an option or value does not exist (the nearest valid one is named) or is out of range, or the
            configuration is a patched run's.
    """
    argv = sys.argv[1:] if argv is None else argv
    first = QuietParser(add_help=False, allow_abbrev=False)
    for name in ("--config", "--run_name", "--output_dir"):
        first.add_argument(name)
    first.add_argument("--resume", nargs="?", const="")
    chosen, _ = first.parse_known_args(argv)

    path = expanded(chosen.config) if chosen.config else DEFAULT_RECIPE
    run = None if chosen.resume is None else _run_to_resume(chosen, path)
    if run and not chosen.config:
        path = run / "config.yaml"
    tree = read_yaml(path)
    tree.setdefault("recipe", _recipe_name(path))

    overrides = vars(_parser(tree, path).parse_args(argv))
    for name in ("config", "resume"):
        overrides.pop(name, None)
    config = overridden(tree, overrides, path)
    script = " ".join(script_of(config.recipe))
    if not patched and script != "train.py":
        raise UserError(f"{path} belongs to a run with patched training: continue it with {script} instead of train.py")
    return config, run


def expanded(text: str) -> Path:
    """A path as it was typed, with ~ for the home, which Windows's shells leave to the command."""
    path = os.path.expanduser(text)
    if path.startswith("~"):
        raise UserError(f"{text}: nobody here has such a home; a file of that name would be ./{text}", USAGE)
    return Path(path)


def _run_to_resume(chosen: argparse.Namespace, recipe: Path) -> Path:
    """The run folder that --resume means: its own value, --run_name's, or the recipe's newest that has not ended."""
    if chosen.resume and chosen.run_name:
        raise UserError("--resume: give a run folder or --run_name, not both", USAGE)
    tree = read_yaml(recipe)
    output_dir = expanded(str(chosen.output_dir or tree.get("output_dir") or Config.output_dir))
    name = str(tree.get("recipe") or _recipe_name(recipe))
    if chosen.resume:
        run = expanded(chosen.resume)
    elif chosen.run_name:
        run = output_dir / chosen.run_name
    else:
        # Unfinished runs come first, then those with a checkpoint: a newer one without has nothing to resume.
        known = sorted(
            output_dir.glob("*/config.yaml"),
            key=lambda path: (
                not (path.parent / "summary.json").exists(),
                any(path.parent.glob("checkpoints/[0-9]*")),
                path.stat().st_mtime,
            ),
        )
        run = next((path.parent for path in reversed(known) if _recorded_recipe(path) == name), None)
        if run is None:
            raise UserError(f"--resume: {output_dir} holds no run of the recipe {name}; name one: --resume RUN", USAGE)
    if not os.path.isfile(run / "config.yaml"):  # pathlib's raises if a name is too long
        raise UserError(f"--resume: {run} is not a run folder (it has no config.yaml)", USAGE)
    return run


def _recorded_recipe(path: Path) -> str | None:
    """The recipe that a run's config.yaml names; None, and a line on stderr, if it is damaged."""
    try:
        return read_yaml(path).get("recipe")
    except UserError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"skipped: {error}", file=sys.stderr)
        return None


def _recipe_name(path: Path) -> str:
    name = re.sub(r"[^\w.-]+", "-", path.stem).lstrip(".-")[:100] or "run"
    return re.sub(r"\.{2,}", ".", name)  # two dots mark patched runs (recipe.PATCHED)


class QuietParser(argparse.ArgumentParser):
    """Raises its errors as one-line `UserError`s."""

    def error(self, message):
        raise UserError(message, USAGE)


class Parser(QuietParser):
    """Answers an unknown option with the nearest known one."""

    def parse_args(self, argv):
        values, unknown = self.parse_known_args(argv)
        if unknown:
            known = [option for action in self._actions for option in action.option_strings]
            name = unknown[0].split("=")[0]
            hint = nearest(name, known) or f"see python {self.prog} --help"
            raise UserError(f"there is no option {name}; {hint}", USAGE)
        return values


def _parser(tree: dict, path: Path) -> Parser:
    """An option for each field, and for each field of each phase that the recipe names."""
    parser = Parser(
        prog="train.py",
        usage="accelerate launch train.py [--config FILE] [--OPTION VALUE ...]",
        allow_abbrev=False,
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=34, width=110),
        argument_default=argparse.SUPPRESS,
        description="Train an image classifier in phases. Without options: the report's Part 3, a pretrained\n"
        "ResNet-50 fine-tuned on CIFAR-100, first its head, then its last two stages.",
        epilog="examples:\n"
        "  accelerate launch train.py\n"
        "  accelerate launch --mixed_precision bf16 train.py --config recipes/deep_cnn.yaml\n"
        "  accelerate launch train.py --data.source ~/photos --data.image_size 224 --phases.finetune.lr 3e-5\n"
        f"\nDefaults shown are those of {path.name}; --config FILE --help shows another recipe's.\n"
        "Precision, devices and processes are set through Accelerate: accelerate launch --help.",
    )
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help="recipe to start from (default: recipes/resnet50.yaml)"
    )
    parser.add_argument(
        "--resume",
        nargs="?",
        metavar="RUN",
        help="go on from a run folder's newest checkpoint (default: the folder of --run_name, or this recipe's newest "
        "that has not ended)",
    )
    for name, cls in {"run": Config, **SECTIONS}.items():
        values = tree if name == "run" else tree.get(name)
        _add_group(parser, name, "" if name == "run" else f"{name}.", cls, values)
    phases = tree.get("phases")
    for name, values in (phases if isinstance(phases, dict) else {}).items():
        _add_group(parser, f"phase '{name}'", f"phases.{name}.", PhaseConfig, values)
    return parser


def add_data_options(parser: Parser, names: tuple[str, ...], title: str, about: str) -> None:
    """Add options for some fields of the data section; they have no value unless given."""
    group = parser.add_argument_group(title, about)
    for name in names:
        field = DataConfig.__pydantic_fields__[name]
        metavar, text = _metavar(field.annotation), field.description.replace("%", "%%")
        group.add_argument(f"--data.{name}", default=argparse.SUPPRESS, metavar=metavar, help=text)


def _add_group(parser, title, prefix, cls, values):
    group = parser.add_argument_group(title, None if cls is Config else cls.__doc__)
    values = values if isinstance(values, dict) else {}
    for name, field in cls.__pydantic_fields__.items():
        if field.description is None:  # a section, or a recorded fact
            continue
        default = values.get(name, field.default)
        text = field.description
        if "(default" not in text or values.get(name) is not None:
            text += " (required)" if default is PydanticUndefined else f" [{_show(default)}]"
        dotted = f"{prefix}{name}"  # as `dest`, too: by itself argparse turns the hyphen of a phase's name into _
        group.add_argument(f"--{dotted}", dest=dotted, metavar=_metavar(field.annotation), help=text.replace("%", "%%"))


def _show(value) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, (list, tuple)):
        return ",".join(map(_show, value))
    return plain(value) if isinstance(value, str) else quoted(value)


def _metavar(annotation) -> str:
    options = [option for option in (typing.get_args(annotation) or (annotation,)) if option is not type(None)]
    if typing.get_origin(annotation) is Literal:
        return "|".join(options)
    if typing.get_origin(annotation) is tuple:
        return "NAMES"
    if "auto" in typing.get_args(options[-1]):
        return "INT|auto"
    return {bool: "true|false", int: "INT", float: "FLOAT"}.get(options[0], "TEXT")
