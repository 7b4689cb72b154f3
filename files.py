"""Files that are written whole or not at all, whatever happens."""

import hashlib
import os
import time
from pathlib import Path

PATIENCE = 10 if os.name == "nt" else 0  # seconds


def digest(path: Path) -> str:
    """A file's SHA-256, as 64 hexadecimal digits; OSError if it can't be read."""
    sha256 = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            sha256.update(block)
    return sha256.hexdigest()


def to_disk(path: Path) -> None:
    """Flush a file or, where the system can, a folder's entries."""
    if path.is_dir() and os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace(source: Path, target: Path) -> None:
    """`os.replace`, which on Windows waits a while for programs that have a file open, as virus scanners have."""
    give_up = time.monotonic() + PATIENCE
    while True:
        try:
            return os.replace(source, target)
        except PermissionError:
            if time.monotonic() >= give_up:
                raise
            time.sleep(0.1)


def write_whole(path: Path, text: str) -> None:
    """Replace a text file's content: whatever happens, the file holds the old or the new."""
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        unfinished.write_text(text, encoding="utf-8")
        to_disk(unfinished)
        replace(unfinished, path)
    except Exception:
        unfinished.unlink(missing_ok=True)
        raise
    to_disk(path.parent)
