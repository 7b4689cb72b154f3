"""How a run's processes agree, and how much of its machine each of them may use."""

import contextlib
import math
import os
from collections.abc import Callable
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import gather_object

from errors import UserError

AGREE_EVERY = 20  # steps between two questions that several processes have to agree on, such as a signal
CPU_MAX = Path("/sys/fs/cgroup/cpu.max")  # as a container sees its own


@contextlib.contextmanager
def raised_on_all():
    """Around work that one process may fail at: a `UserError` on one process is raised on all.

    Nothing inside may wait for the other processes.
    """
    error = None
    try:
        yield
    except UserError as raised:
        error = raised
    failed = next((one for one in gather_object([error]) if one), None)
    if failed:
        raise UserError(str(failed), failed.exit_code, shared=True) from error


def max_over_processes(accelerator: Accelerator, value):
    """The maximum over all processes, on each. Waits for them, so don't call it every step."""
    return value if accelerator.num_processes == 1 else max(gather_object([value]))


def world_size() -> int:
    """How many processes the run has, also before there is an Accelerator."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """This process's number among them."""
    return int(os.environ.get("RANK", "0"))


def on_main(work: Callable):
    """Run `work` on the main process; every process returns its result, or raises its `UserError`.

    Needs an Accelerator, unless there is only one process.
    """
    return on_all(lambda: work() if is_main() else None)[0]


def on_all(work: Callable) -> list:
    """Run `work` on every process; each returns all results, in order of rank, or raises the first `UserError`.

    Needs an Accelerator, unless there is only one process.
    """
    if world_size() == 1:
        return [work()]
    value = error = None
    try:
        value = work()
    except UserError as raised:
        error = str(raised), raised.exit_code
    results = gather_object([(value, error)])
    failed = next((error for _, error in results if error), None)
    if failed:
        raise UserError(*failed, shared=True)
    return [value for value, _ in results]


def is_main() -> bool:
    """Whether this is the process that reads streams, writes files and prints."""
    return rank() == 0


def no_bar() -> bool | None:
    """tqdm's `disable`: only the main process shows progress, and only on a terminal (what None means)."""
    return None if is_main() else True


def cores_per_process() -> int:
    """CPU cores this process may use: the lower of affinity and container quota, divided among siblings."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    cores = min(cores, _quota())
    return max(1, int(cores) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def _quota() -> float:
    """CPU time, in cores, that Linux's control group (version 2) grants, as after `docker run --cpus 2`."""
    try:
        quota, period = CPU_MAX.read_text().split()
        return int(quota) / int(period)
    except (OSError, ValueError):  # there is none, or it is "max"
        return math.inf
