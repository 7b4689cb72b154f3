"""A run's folder: made once, owned by one process at a time, resumed under the same configuration."""

import contextlib
import dataclasses
import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from accelerate import Accelerator
from filelock import FileLock, Timeout

import launch
import sharing
import sources
from checkpoint import begun
from config import Config
from errors import USAGE, Interrupted, UserError
from files import write_whole
from processes import on_main, raised_on_all
from recipe import check, read_yaml, script_of

# Options a resumed run may change; the others have shaped the weights. Phases that have not begun are free, too.
FREE = (
    "checkpoint.",
    "clip_norm",
    "cuda_graphs",
    "data.keep_mb",
    "data.micro_batch_size",
    "data.test_split",
    "data.workers",
    "output_dir",
    "profile",
    "push_to_hub",
    "run_name",
    "timeout_minutes",
    "tracking",
)


@contextlib.contextmanager
def opened(accelerator: Accelerator, config: Config, resume: Path | None) -> Iterator[Path]:
    """The run's folder, with its config.yaml, locked until the context ends or its owner dies.

    If a new run ends before its first epoch or checkpoint, its folder is removed; an interrupted one is kept, to be
    resumed. Every process calls this.

    Raises:
        UserError: a new run's folder exists, or can't be made or seen; or another process holds it.
    """
    name = config.run_name or f"{config.recipe}-{time.strftime('%Y%m%d-%H%M%S')}"
    run = resume or Path(on_main(lambda: str(config.runs_folder() / name)))
    lock = FileLock(run / "checkpoints" / ".lock", blocking=False)
    # Others don't look yet: their machine would remember for half a minute that a shared folder is not there.
    folder_made = accelerator.is_main_process and not run.parent.exists()
    if not resume:
        on_main(lambda: _make(run, config))
    try:
        on_main(lambda: _take(lock, run))
        with raised_on_all():
            if not (run / "config.yaml").is_file():
                raise UserError(f"output_dir: {run} can't be seen from every machine of this run; share the folder")
        yield run
    except Interrupted:  # keep the folder to resume, even without a checkpoint
        raise
    except BaseException:
        if accelerator.is_main_process and not resume and not begun(run):
            lock.release()  # Windows removes no folder with an open file in it
            shutil.rmtree(run, ignore_errors=True)
            if folder_made:
                with contextlib.suppress(OSError):  # another run has begun in it
                    run.parent.rmdir()
        raise
    finally:
        lock.release()


def settled(accelerator: Accelerator, config: Config) -> Config:
    """A new run's configuration, with its environment, whether data are streamed, and a hub dataset's commit."""
    revision = on_main(lambda: sources.commit(config.data))
    data = dataclasses.replace(config.data, streaming=config.data.streams, revision=revision)
    return dataclasses.replace(config, data=data, environment=launch.environment(accelerator))


def _make(run: Path, config: Config) -> None:
    """Make the folder with its config.yaml in it, or nothing at all."""
    unfinished = run.with_name(f".{run.name}.{os.getpid()}")
    try:
        (unfinished / "checkpoints").mkdir(parents=True)
        write_whole(unfinished / "config.yaml", _to_run_again(config))
        os.rename(unfinished, run)
    except OSError as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        if os.path.lexists(run):
            raise UserError(f"{run} exists: go on with --resume {run}, or choose another --run_name") from None
        raise UserError(f"output_dir: {run} can't be made: {error.strerror}") from error


def _take(lock: FileLock, run: Path) -> None:
    try:
        lock.acquire()
    except Timeout:
        raise UserError(f"{run} is being trained by another process, which has it locked") from None
    except OSError as error:
        raise UserError(f"{run} can't be locked: {error.strerror}") from error


def check_changes(accelerator: Accelerator, config: Config, run: Path, phases_begun: int) -> Config:
    """Compare a resumed run's configuration with the one it was started with; print changes.

    Args:
        phases_begun: how many; the phases after them may change.

    Returns:
        The configuration to use, and to `record` once all of it is known to be valid.

    Raises:
        UserError: a value that has shaped the weights differs; the message names both values.
    """
    path = run / "config.yaml"
    before = check(read_yaml(path), str(path))
    before = dataclasses.replace(before, data=dataclasses.replace(before.data, streaming=before.data.streams))
    notes = launch.check_same(before.environment, accelerator)
    micro = config.data.micro_batch_size
    if micro == "auto":  # a recipe may say so again: keep what the run has found, if it has
        micro = before.data.micro_batch_size or micro
    revision = config.data.commit or before.data.revision or config.data.revision  # a branch may have moved
    data = dataclasses.replace(config.data, streaming=config.data.streams, micro_batch_size=micro, revision=revision)
    if script_of(config.recipe) != script_of(before.recipe):
        started, now = (" ".join(script_of(it.recipe)).removesuffix(" --") for it in (before, config))
        raise UserError(f"--resume: {run} was started with {started}, and can't go on with {now}", USAGE)
    config = dataclasses.replace(config, data=data, environment=before.environment, recipe=before.recipe)

    names = list(before.phases)[:phases_begun]
    if names != list(config.phases)[:phases_begun]:
        raise UserError(
            f"--resume: {', '.join(names)} have begun, but the phases now are {', '.join(config.phases)}", USAGE
        )
    old, new = _flat(dataclasses.asdict(before)), _flat(dataclasses.asdict(config))
    for field in sorted(old.keys() | new.keys()):
        was, now = old.get(field), new.get(field)
        if was == now or field.startswith("environment."):
            continue
        section, _, rest = field.partition(".")
        ordering = field == "data.keep_mb" and config.data.streaming  # kept rows are shuffled fully
        free = field.startswith(FREE) and not ordering
        free = free or (field == "data.on_corrupt" and now == "skip")  # so far there was nothing to skip
        free = free or (section == "phases" and rest.split(".")[0] not in names)
        if not free:
            why = " (of a stream it decides the order)" if ordering else ""
            raise UserError(
                f"--resume: {field} was {json.dumps(was)} and can't become {json.dumps(now)} in mid-run{why}; leave it "
                "out, or start a new run",
                USAGE,
            )
        if field not in ("output_dir", "push_to_hub", "run_name"):
            notes.append(f"{field} changes from {json.dumps(was)} to {json.dumps(now)}")
    for note in notes:
        accelerator.print(f"resumed: {note}")
    if accelerator.is_main_process:
        sharing.card_of(run).unlink(missing_ok=True)  # from an earlier end: best/ may change
    return config


def record(config: Config, run: Path, **settled) -> Config:
    """Write the configuration into the run folder; `settled` replaces values of its data section.

    Raises:
        UserError: it can't be written.
    """
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, **settled))
    on_main(lambda: _write(config, run))
    return config


def _write(config: Config, run: Path) -> None:
    try:
        write_whole(run / "config.yaml", _to_run_again(config))
    except OSError as error:
        raise UserError(f"{run}/config.yaml can't be written: {error.strerror}") from error


def _to_run_again(config: Config) -> str:
    """The configuration as recorded: run unchanged, it makes another folder and uploads nothing."""
    return dataclasses.replace(config, run_name=None, push_to_hub=None).to_yaml()


def _flat(tree: dict, prefix: str = "") -> dict:
    """{"data": {"fold": 0}} as {"data.fold": 0}."""
    flat = {}
    for name, value in tree.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat
