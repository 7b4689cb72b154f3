"""From a recipe to a checked configuration: YAML read with suspicion, single values replaced, mistakes explained.

A recipe (YAML) states a run's values; the command line overrides single ones (`--phases.finetune.lr 3e-5`). Both are
first merged into one tree of plain values and then checked, so overriding one value of a phase leaves its others alone.
"""

import difflib
import re
import reprlib
import typing
from pathlib import Path

import yaml
from pydantic import TypeAdapter, ValidationError

from config import SECTIONS, Config, Environment, PhaseConfig
from errors import USAGE, UserError

RECIPES = Path(__file__).parent / "recipes"
DEFAULT_RECIPE = RECIPES / "resnet50.yaml"
PATCHED = ".."  # in a run's config.yaml, separates the recipe's name from patches (benchmarks/patches.py)
SHORT = reprlib.Repr()  # shortens values in messages
SHORT.maxstring = SHORT.maxother = 80


def script_of(recipe: str) -> list[str]:
    """The script and arguments that train a run whose config.yaml has this `recipe`."""
    patches = recipe.partition(PATCHED)[2]
    return ["benchmarks/patches.py", *patches.split("."), "--"] if patches else ["train.py"]


class _Loader(yaml.SafeLoader):
    """YAML for recipes: a key is text and comes once, and there are no aliases.

    By itself PyYAML silently takes the last of two equal keys, and aliases of aliases make a small file huge.
    """

    def resolve(self, kind, value, implicit):
        """Keep dates as text, and 010 and 1:30, which YAML 1.1 reads as 8 and 90: a field may then read 010 as ten."""
        tag = super().resolve(kind, value, implicit)
        misread = tag.endswith((":int", ":float")) and re.match(r"[-+]?0[0-7_]+$|.*:", value)
        return self.DEFAULT_SCALAR_TAG if misread or tag.endswith(":timestamp") else tag

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            raise _malformed(self.peek_event(), "aliases (*name) are not read: write the value out")
        return super().compose_node(parent, index)

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key, _ in node.value:
            if not key.tag.endswith((":str", ":merge")):
                raise _malformed(key, f"the key {key.value if key.id == 'scalar' else ''} is not text: quote it")
            if key.value in seen:
                raise _malformed(key, f"the key '{key.value}' is there twice")
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _malformed(node: yaml.Node | yaml.Event, problem: str) -> yaml.YAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)


def _read(text: str):
    """The plain values in a YAML text; YAMLError if it is malformed."""
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError:
        raise
    except Exception as error:  # PyYAML does not wrap what `!!int x` or ten thousand brackets raise
        raise yaml.YAMLError(f"{type(error).__name__}: {error}") from error


def read_yaml(path: Path) -> dict:
    """The tree of plain values in a YAML file; UserError names the file and, if it is malformed, the line."""
    try:
        tree = _read(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        known = sorted(recipe.stem for recipe in RECIPES.glob("*.yaml"))
        hint = nearest(path.stem, known) or f"recipes: {', '.join(known)}"
        raise UserError(f"--config: there is no file {path}; {hint}", USAGE) from None
    except UnicodeDecodeError:
        raise UserError(f"--config: {path} is not a text file in UTF-8", USAGE) from None
    except (OSError, ValueError) as error:
        raise UserError(f"--config: {path} can't be read: {error}", USAGE) from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}, line {mark.line + 1}" if mark else path
        raise UserError(f"{where}: not valid YAML ({getattr(error, 'problem', error)})", USAGE) from None
    if not isinstance(tree, dict):
        found = "nothing" if tree is None else type(tree).__name__
        raise UserError(f"{path}: expected 'key: value' lines, found {found}", USAGE)
    return tree


def check(tree: dict, origin: str) -> Config:
    """Parse and check a merged tree. UserError names each wrong field, its value and what is allowed."""
    try:
        return TypeAdapter(Config).validate_python(tree)
    except ValidationError as error:
        lines = [_explain(problem) for problem in error.errors()]
        more = f"; and {len(lines) - 5} more" if len(lines) > 5 else ""
        raise UserError(f"{origin}: " + "; ".join(lines[:5]) + more, USAGE) from None


def overridden(tree: dict, overrides: dict[str, str], path: Path) -> Config:
    """The tree of a file with single values replaced (`{"phases.finetune.lr": "3e-5"}`), checked.

    A subset and a revision are those of the file's own data.source: they go with it. So does, in a run's config.yaml,
    what was settled for it: whether it is streamed.
    """
    data = tree.get("data")
    if isinstance(data, dict) and overrides.get("data.source", data.get("source")) != data.get("source"):
        its_own = ("subset", "revision", "streaming") if tree.get("environment") else ("subset", "revision")
        tree = tree | {"data": {name: data[name] for name in data if name not in its_own}}
    for dotted, text in overrides.items():
        _set(tree, dotted, text)
    return check(tree, f"{path} and command line" if overrides else str(path))


def _set(tree: dict, dotted: str, text: str):
    """Put one override into the tree; its text is read as YAML, so `null`, `true` and `[a, b]` work."""
    *parents, name = dotted.split(".")
    for parent in parents:
        if tree.get(parent) is None:
            tree[parent] = {}
        tree = tree[parent]
        if not isinstance(tree, dict):
            return  # which is an error of its own
    field = _fields_at(dotted.split(".")[:-1])[name]
    try:
        # Text stays text: a run may be called 2026-11-23, or no.
        tree[name] = text if field.annotation in (str, str | None) and text != "null" else _read(text)
    except yaml.YAMLError:
        tree[name] = text


def _explain(problem: dict) -> str:
    """One pydantic error as one sentence in this project's words."""
    location = [str(part) for part in problem["loc"] if part != "[key]"]
    if not location and problem["type"] != "value_error":  # which may concern the whole tree
        location = ["?"]  # the key is itself called [key], and was dropped
    field, value = ".".join(location), problem["input"]
    fields = _fields_at(location[:-1])
    if problem["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        hint = nearest(location[-1], list(fields)) or f"allowed: {', '.join(fields)}"
        return f"there is no {field}; {hint}"
    if problem["type"] in ("missing", "missing_argument"):
        return f"{field} is missing"
    if problem["type"] == "literal_error":
        allowed = typing.get_args(fields[location[-1]].annotation)
        hint = (nearest(value, list(allowed)) if isinstance(value, str) else "") or "allowed"
        return f"{field}: {quoted(value)} is not known; {hint} ({', '.join(allowed)})"
    if problem["type"] == "string_pattern_mismatch":
        signs = "_ -" if location[0] == "phases" else "_ . -"
        return f"{field}: {quoted(value)} must be a plain name (letters, digits, {signs}, no slash)"
    message = problem["msg"].removeprefix("Value error, ").replace("Input should", "should")
    message = re.sub(r" or an instance of \w+|^String (?=should)", "", message)
    return (f"{field}: " if field else "") + message + ("" if isinstance(value, dict) else f", not {quoted(value)}")


def _fields_at(location: list[str]) -> dict:
    """The fields of the section that an error's location lies in."""
    if not location:
        return Config.__pydantic_fields__
    sections = SECTIONS | {"environment": Environment}
    return (PhaseConfig if location[0] == "phases" else sections.get(location[0], Config)).__pydantic_fields__


def nearest(word: str, known: list[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]}?" if close else ""


def quoted(value) -> str:
    """A value as messages show it, cut if it is long."""
    try:
        return SHORT.repr(value)
    except ValueError:  # Python refuses to print an integer of thousands of digits
        return "a number of thousands of digits"
