"""Profile where the time of a step goes."""

import gzip
import shutil
from collections.abc import Iterator
from pathlib import Path

from torch.profiler import profile, schedule

WARM_UP = 3  # first steps, left out: they allocate and choose algorithms


def traced(steps: Iterator, count: int, path: Path) -> Iterator:
    """Yield an epoch's steps, and write a trace of `count` of them, for Perfetto or Chrome.

    The trace holds fewer if the epoch is shorter; there is none if it ends during warm-up. Prints the path.

    Args:
        path: the trace's file, NAME.json.gz; its folder is made.
    """
    path.parent.mkdir(exist_ok=True)

    def write(profiler):
        plain = path.with_suffix("")  # packed here, as torch opens a file twice to do it, which Windows refuses
        profiler.export_chrome_trace(str(plain))
        with plain.open("rb") as trace, gzip.open(path, "wb") as packed:
            shutil.copyfileobj(trace, packed)
        plain.unlink()
        print(f"profile: {path}", flush=True)

    plan = schedule(wait=WARM_UP - 1, warmup=1, active=count, repeat=1)
    with profile(schedule=plan, on_trace_ready=write) as profiler:
        for step in steps:
            yield step
            profiler.step()
    if not path.exists():
        print(f"profile: none, as an epoch has no more than the {WARM_UP} steps that warm up", flush=True)
