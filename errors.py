"""The only kind of error a user sees: a sentence that says what is wrong and what to do, never a traceback."""

import contextlib
import os
import select
import sys
import traceback

from text import plain

USAGE = 2  # the command or the configuration is wrong: nothing was started
RUN = 1  # the run itself failed: data, weights, the machine


class UserError(Exception):
    """A mistake that the user can fix, in one line.

    Args:
        exit_code: `USAGE` (2) or `RUN` (1).
        shared: every process of the run has this same error, so only one reports it (of a wrong command, which may be
            wrong on one machine alone, one on each machine).
    """

    prefix = "error: "

    def __init__(self, message: str, exit_code: int = RUN, shared: bool = False):
        super().__init__(plain(message))
        self.exit_code, self.shared = exit_code, shared or exit_code == USAGE


class Interrupted(UserError):
    """A signal asked the run to stop. The exit code is 128 + the signal's number, as in a shell."""

    prefix = ""

    def __init__(self, message: str, number: int):
        super().__init__(message, 128 + number, shared=True)


@contextlib.contextmanager
def reported():
    """Around a command: a `UserError` becomes one line on stderr and its exit code; Ctrl-C becomes 130.

    Characters that the terminal's encoding lacks are escaped. If the reader of the output has gone, as `| head` goes
    when it has seen enough, the command ends silently with 141, as in a shell.
    """
    sys.excepthook = _unless_interrupted  # covers the imports between two of these, which take seconds
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # stderr's default
    try:
        yield
        print(end="", flush=True)
    except UserError as error:
        rank = int(os.environ.get("RANK", "0"))
        # What is wrong with a command may be so on this machine alone: a folder that it does not have.
        here = error.exit_code == USAGE and os.environ.get("LOCAL_RANK", "0") == "0"
        if rank == 0 or here or not error.shared:
            # An error from a loader's worker arrives as a traceback's text, with the original message at its end.
            text = str(error).rpartition("UserError: ")[2].strip()
            try:
                print(f"[rank {rank}] " * (rank > 0) + error.prefix + text, file=sys.stderr, flush=True)
            except OSError:  # the terminal is closed, or `2>&1 | tee` ended with the same Ctrl-C
                give_up_stderr()
        # Loaders that the traceback holds would keep their workers alive until the interpreter exits.
        traceback.clear_frames(error.__traceback__)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        if not _output_is_unread():  # another pipe broke
            raise
        _write_nowhere(sys.stdout)
        sys.exit(141)


def give_up_stderr() -> None:
    """Once a write to stderr has failed: drop what goes there, and to stdout if that is the same terminal or pipe."""
    lost = os.fstat(sys.__stderr__.fileno())
    for stream in (sys.__stdout__, sys.__stderr__):
        if stream and os.path.samestat(os.fstat(stream.fileno()), lost):
            _write_nowhere(stream)


def _write_nowhere(stream) -> None:
    """Drop what is left to be written: it would fail again, at the latest when the interpreter exits."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _unless_interrupted(kind, error, trace) -> None:
    """Python's own excepthook, but silent on Ctrl-C, whose exit code says enough."""
    if not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)


def _output_is_unread() -> bool:
    """Whether stdout is a pipe whose reader has gone."""
    try:
        poll = select.poll()
        poll.register(sys.stdout.fileno(), 0)  # errors need no flag
        return bool(poll.poll(0))
    except (AttributeError, OSError):  # no poll on this system; no stdout, or one without a descriptor
        return False


def first_line(error: Exception) -> str:
    """The first line of a library's error; its type if it has no text."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
