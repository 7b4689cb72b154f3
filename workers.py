"""A loader's workers and signals: training still needs their batches to finish its step."""

import signal

GRACE = 120  # seconds that a worker lives on after SIGTERM: several processes may take 20 more steps


def outlive_signals(_worker: int | None = None) -> None:
    """In a worker: survive a signal to the whole process group. Also for loaders' `worker_init_fn`."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "SIGUSR1"):
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, _live_on)


def _live_on(*_) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # whoever asks a second time means it, as torch does when it closes
    signal.alarm(GRACE)
