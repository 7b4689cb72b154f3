"""What a patch is: a function that puts something else in the place of a module's attribute, known by its name."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # what is patched

from recipe import PATCHED

PATCHES = {}  # by name


def mark(patches) -> str:
    """What is put behind the recipe's name in a run's config.yaml, so that it tells what was patched."""
    return PATCHED + ".".join(patches) if patches else ""


def named(function):
    PATCHES[function.__name__] = function
    return function


def patch(module, name: str, make) -> None:
    """Put what `make` makes of it in the place of a module's attribute, which has to be there."""
    setattr(module, name, make(getattr(module, name)))
