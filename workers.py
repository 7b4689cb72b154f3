"""A loader's workers and signals: training still needs their batches to finish its step."""

import signal

GRACE = 120  # seconds that a worker lives on after SIGTERM: several processes may take 20 more steps


def outlive_signals(_worker: int | None = None) -> None:
    """In a worker: survive a signal to the whole process group. Also for loaders' `worker_init_fn`."""
    for name in ("SIGINT", "SIGUSR1", "SIGHUP", "SIGBREAK"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    if hasattr(signal, "alarm"):
        signal.signal(signal.SIGTERM, _live_on)


def _live_on(*_) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # whoever asks a second time means it, as torch does when it closes
    signal.alarm(GRACE)
