"""The one kind of error a user is shown: a sentence that names what is wrong and the way on, never a traceback."""

import contextlib
import os
import re
import sys

USAGE = 2  # the command or the configuration is wrong: nothing was started
RUN = 1  # the run itself failed: data, weights, the machine


UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")  # line breaks, terminal codes, broken UTF-8
PASSWORD = re.compile(r"(?<=://)[^/\s]*@")  # user:password@ of a URL


class UserError(Exception):
    """A mistake that the user can mend, in one line. `exit_code` is `USAGE` (2) or `RUN` (1)."""

    def __init__(self, message: str, exit_code: int = RUN):
        super().__init__(plain(message))
        self.exit_code = exit_code


def plain(text: str) -> str:
    """Text for a terminal: on one line, without what terminals obey, without the passwords of URLs."""
    return PASSWORD.sub("", UNPRINTABLE.sub(" ", text))


@contextlib.contextmanager
def told():
    """Around a command: a `UserError` becomes one line on stderr and its exit code; Ctrl-C becomes 130."""
    try:
        yield
    except UserError as error:
        # Every process meets a wrong command line, and one voice is enough; later errors may be of one rank alone.
        rank = int(os.environ.get("RANK", "0"))
        if rank == 0 or error.exit_code != USAGE:
            # An error from a loader's worker arrives as text that ends with the original one, below its traceback.
            text = str(error).rpartition("UserError: ")[2].strip()
            print(f"[rank {rank}] error: {text}" if rank else f"error: {text}", file=sys.stderr, flush=True)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
