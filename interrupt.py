"""Signals as requests to stop: noted at once, obeyed after a step, when a run can be saved.

They are SIGTERM, SIGINT (Ctrl-C), SIGUSR1 (of batch systems), SIGHUP (the terminal is closed) and Windows's
SIGBREAK (Ctrl-Break). A dead launcher counts as SIGTERM (Windows does not tell): `accelerate launch` passes no signal
on, and whoever kills it alone does not want training to continue unseen.
"""

import os
import signal
import sys
import time
from collections.abc import Iterator

from accelerate import Accelerator

from errors import Interrupted, give_up_stderr
from processes import AGREE_EVERY, max_over_processes

NAMES = ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP", "SIGBREAK")
SIGNALS = [getattr(signal, name) for name in NAMES if hasattr(signal, name)]
CHILD = getattr(signal, "SIGCHLD", None)
PATIENCE = 2  # seconds until processes ask one another again, if that is less than AGREE_EVERY steps
DOUBLED = 2  # seconds within which a second Ctrl-C is taken for the launcher's copy of the first


class Interrupt:
    """A context that notes the signals; `check` raises `Interrupted` once one has come.

    Args:
        resume_hint: what to do next, for the message.
    """

    def __init__(self, accelerator: Accelerator, resume_hint: str):
        self.accelerator, self.resume_hint = accelerator, resume_hint
        self.number, self.noted, self.checks = 0, 0.0, 0
        self.next_check, self.last_asked = 1, (0, time.monotonic())  # the check to ask the others at; the last such
        # Nobody sets these by hand, unlike ACCELERATE_MIXED_PRECISION.
        launched = "ACCELERATE_DYNAMO_BACKEND" in os.environ or "TORCHELASTIC_RUN_ID" in os.environ
        self.launcher = os.getppid() if launched else None

    def __enter__(self):
        noted = [number for number in SIGNALS if not _under_nohup(number)]
        self.before = {number: signal.signal(number, self._note) for number in noted}
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame) -> None:
        if not self.number:
            self.number, self.noted = number, time.monotonic()
            if self.accelerator.is_main_process:
                told = f"\n{signal.Signals(number).name}: finishing this step\n"
                try:
                    os.write(sys.__stderr__.fileno(), told.encode())
                except OSError:  # the terminal is closed, or `| tee` died of the same Ctrl-C
                    give_up_stderr()
        elif number == signal.SIGINT and time.monotonic() - self.noted > DOUBLED:
            raise KeyboardInterrupt

    def check(self) -> None:
        """Once per step, on every process: raise `Interrupted`, on all at the same step, if any got a signal."""
        if self.launcher and os.getppid() != self.launcher:
            self.number = self.number or signal.SIGTERM
        self.checks += 1
        if self.accelerator.num_processes > 1 and self.checks < self.next_check:
            return
        (before, then), now = self.last_asked, time.monotonic()
        # Without a signal, the slowest process's seconds per check, on all: so all ask again at the same check.
        number, seconds = max_over_processes(self.accelerator, (self.number, (now - then) / (self.checks - before)))
        self.last_asked = self.checks, now
        self.next_check = self.checks + max(1, min(AGREE_EVERY, int(PATIENCE / max(seconds, 1e-9))))
        if number:
            if CHILD:  # torch would raise the death of a loader's worker, which had the signal, too, in mid-save
                self.before[CHILD] = signal.signal(CHILD, signal.SIG_DFL)
            raise Interrupted(f"stopped by {signal.Signals(number).name}; {self.resume_hint}", number)

    def watch(self, batches) -> Iterator:
        """Yield batches, checking before each."""
        for batch in batches:
            self.check()
            yield batch


def _under_nohup(number: signal.Signals) -> bool:
    return number.name == "SIGHUP" and signal.getsignal(number) == signal.SIG_IGN
