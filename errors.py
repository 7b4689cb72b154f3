"""The one kind of error a user is shown: a sentence that names what is wrong and the way on, never a traceback."""

import contextlib
import os
import select
import sys
import traceback

from text import plain

USAGE = 2  # the command or the configuration is wrong: nothing was started
RUN = 1  # the run itself failed: data, weights, the machine


class UserError(Exception):
    """A mistake that the user can mend, in one line.

    Args:
        exit_code: `USAGE` (2) or `RUN` (1).
        shared: every process of the run meets this very error, so that one voice is enough.
    """

    prefix = "error: "

    def __init__(self, message: str, exit_code: int = RUN, shared: bool = False):
        super().__init__(plain(message))
        self.exit_code, self.shared = exit_code, shared or exit_code == USAGE


class Interrupted(UserError):
    """The run was asked to stop by a signal. Its exit code is 128 + the signal's number, as a shell would give it."""

    prefix = ""

    def __init__(self, message: str, number: int):
        super().__init__(message, 128 + number, shared=True)


@contextlib.contextmanager
def reported():
    """Around a command: a `UserError` becomes one line on stderr and its exit code; Ctrl-C becomes 130.

    Letters that the terminal's encoding lacks are written as their numbers. Where the reader of the output has gone, as
    `| head` goes when it has seen enough, the command ends without a word with 141, as a shell would give it.
    """
    sys.excepthook = _unless_interrupted  # libraries are imported between two of these, which takes seconds
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr is by itself
    try:
        yield
        print(end="", flush=True)
    except UserError as error:
        rank = int(os.environ.get("RANK", "0"))
        if rank == 0 or not error.shared:
            # An error from a loader's worker arrives as text that ends with the original one, below its traceback.
            text = str(error).rpartition("UserError: ")[2].strip()
            print(f"[rank {rank}] " * (rank > 0) + error.prefix + text, file=sys.stderr, flush=True)
        # Loaders that the traceback holds would keep their workers alive until the very end of the interpreter.
        traceback.clear_frames(error.__traceback__)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        if not _output_is_unread():  # a run has other pipes
            raise
        # What is still to be written would fail once more at the interpreter's end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)


def _unless_interrupted(kind, error, trace) -> None:
    """Python's own way to show an error, but for Ctrl-C, whose exit code says enough."""
    if not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)


def _output_is_unread() -> bool:
    """Whether stdout is a pipe whose reader has gone."""
    try:
        poll = select.poll()
        poll.register(sys.stdout.fileno(), 0)  # errors are always told
        return bool(poll.poll(0))
    except (AttributeError, OSError):  # no such thing on this system; no stdout, or none of the system's
        return False


def first_line(error: Exception) -> str:
    """What a library's error says, without what follows its first line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
