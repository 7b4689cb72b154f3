"""Patches: functions, registered by name, that replace attributes of modules."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # to find what is patched

from recipe import PATCHED

PATCHES = {}  # by name


def mark(patches) -> str:
    """The suffix of the recipe's name in a run's config.yaml that records its patches."""
    return PATCHED + ".".join(patches) if patches else ""


def named(function):
    PATCHES[function.__name__] = function
    return function


def patch(module, name: str, make) -> None:
    """Replace a module's attribute, which must exist, by make(attribute)."""
    setattr(module, name, make(getattr(module, name)))
