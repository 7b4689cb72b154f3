"""A look at where the time of a step goes."""

from collections.abc import Iterator
from pathlib import Path

from torch.profiler import profile, schedule

WARM_UP = 3  # steps that are left out: the first ones allocate and choose algorithms


def traced(steps: Iterator, count: int, path: Path) -> Iterator:
    """Pass an epoch's steps on, and write a trace of `count` of them, which Perfetto and Chrome open.

    The trace holds fewer if the epoch is shorter; there is none if it ends before the warm-up does. Says where it is.

    Args:
        path: the trace's file, NAME.json.gz; its folder is made.
    """
    path.parent.mkdir(exist_ok=True)

    def write(profiler):
        profiler.export_chrome_trace(str(path))
        print(f"profile: {path}", flush=True)

    plan = schedule(wait=WARM_UP - 1, warmup=1, active=count, repeat=1)
    with profile(schedule=plan, on_trace_ready=write) as profiler:
        for step in steps:
            yield step
            profiler.step()
    if not path.exists():
        print(f"profile: none, as an epoch has no more than the {WARM_UP} steps that warm up", flush=True)
