"""Where a run's metrics go (history.jsonl, W&B if wanted, the console), and whether what was trained is finite."""

import contextlib
import dataclasses
import json
import math
import os
import shlex
import signal
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NoReturn

import torch
from accelerate import Accelerator
from torch import nn
from tqdm import tqdm

import checkpoint
from config import Config
from engine import Step
from errors import UserError, first_line
from files import write_whole
from launch import peak_memory
from phases import RunState
from processes import no_bar, on_main

PROJECT = "phases"  # W&B's, unless WANDB_PROJECT names another
WANDB_TIMEOUT = 15  # seconds W&B may take to connect before the run continues offline
WANDB_PATIENCE = 60  # seconds a finished run waits for W&B to finish its uploads
READ_EVERY = 20  # steps between reads of the loss; each waits for the device


class Tracking:
    """Records one run's metrics; a context manager. Every process calls it; the main one writes.

    Args:
        state: where the run is. Later epochs are removed from history.jsonl, since they will be trained again, and W&B
            continues under the same id.

    Raises:
        UserError: history.jsonl can't be read, lacks finished epochs, or has epochs while there is no checkpoint.
    """

    def __init__(self, accelerator: Accelerator, config: Config, run: Path, state: RunState):
        self.accelerator = accelerator
        self.history = run / "history.jsonl"
        on_main(lambda: _forget_later_epochs(self.history, state))
        self.last: tuple[Step, str, int] | None = None  # the newest step, its epoch's title, its number in it
        self.images_per_second: float | None = None  # training speed, newest epoch
        self.batch_size = config.data.batch_size
        self.phases = {name: phase.epochs for name, phase in config.phases.items()}
        self.tracker_works = config.tracking == "wandb" and _start_wandb(accelerator, config, run, state.tracker_id)

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        if self.accelerator.trackers and self.accelerator.is_main_process:
            import wandb

            # That takes a while, and a launcher ends what is left of a run soon after one process has failed.
            before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
            self._tell_tracker(partial(wandb.finish, exit_code=int(kind is not None)))
            with contextlib.suppress(Exception, SystemExit):  # if the service is gone; without it W&B retries at exit
                wandb.teardown()
            signal.signal(signal.SIGTERM, before)
        self.accelerator.trackers.clear()

    def watch(self, steps: Iterator[Step], title: str, images: int | None, made: int = 0) -> Iterator[Step]:
        """Yield an epoch's steps, with a progress bar on a terminal (`images` is its length, None if unknown).

        Args:
            made: steps of this epoch made before the run was resumed.

        Raises:
            UserError: the loss is no longer finite.
        """
        before, trained, began = made * self.batch_size, 0, time.perf_counter()
        with tqdm(total=images, initial=before, desc=title, unit=" images", leave=False, disable=no_bar()) as bar:
            for number, step in enumerate(steps, start=made + 1):
                trained += step.images
                self.last = (step, title, number)
                bar.update(step.images)
                if number % READ_EVERY == 1:
                    self.check_finite()
                    memory = {key: f"{value:,}" for key, value in peak_memory(self.accelerator).items()}
                    bar.set_postfix(loss=f"{step.loss.item():.3f}", top1=f"{step.top1.item():.1%}", **memory)
                yield step
        self.check_finite()  # waits for the device, on which the last steps may only be queued
        # The rest of a resumed epoch tells nothing: workers start in it, and a stream is read again from its beginning.
        self.images_per_second = None if made else trained / (time.perf_counter() - began)

    def check_finite(self) -> None:
        """Wait for the device; UserError if the loss became non-finite in some step of this epoch."""
        if self.last is None:
            return
        step, title, number = self.last
        if unapplied := int(step.unapplied.item()):
            self._diverged(
                f"the loss is not finite in {title}, step {number - unapplied + 1}: no update was applied from there"
            )

    def check_validated(self, loss: float, title: str) -> None:
        """UserError if an epoch's validation loss is not finite, as when the last update made the weights diverge."""
        if not math.isfinite(loss):
            self._diverged(f"the validation loss is not finite after {title}, whose weights are not kept")

    def check_savable(self, model: nn.Module, title: str) -> None:
        """Wait for the device; UserError if the loss was not finite, or the last update left weights that are not."""
        self.check_finite()
        if not torch.stack([parameter.isfinite().all() for parameter in model.parameters()]).all():
            self._diverged(f"weights are no longer finite in {title}, and are not kept")

    def _diverged(self, what: str) -> NoReturn:
        ways = "again with --clip_norm 1 or a lower lr"
        if checkpoint.begun(self.history.parent):
            ways = (
                f"--resume {self.history.parent} --clip_norm 1, or with a lower lr for this phase if no checkpoint was "
                "written in it; or a new run"
            )
        raise UserError(f"{what}. Try {ways}", shared=True)

    def epoch(
        self, phase: str, state: RunState, lr: float, trained: dict, validated: dict, seconds: float, best: bool
    ) -> None:
        """Record a finished epoch as a row of history.jsonl, and print its line.

        Args:
            state: the run's, this epoch included.
            lr: its learning rate.
            trained, validated: `loss`, `top1`, `top5` and, if there were any, the number of `corrupt` images.
            seconds: its duration, with validation.
        """
        counts = {"epoch": state.epoch, "phase_epoch": state.phase_epoch, "step": state.step}
        row = {"phase": phase} | counts | {"lr": lr}
        row |= {f"train_{key}": value for key, value in trained.items()}
        row |= {f"val_{key}": value for key, value in validated.items()}
        row |= {"seconds": seconds, "images_per_second": self.images_per_second}
        # Of this phase, unless it stops early: how long later phases' epochs take is not known yet.
        row["seconds_left"] = 0 if state.stopped else (self.phases[phase] - state.phase_epoch) * seconds
        row |= peak_memory(self.accelerator)
        for what, figures in (("training", trained), ("validation", validated)):
            if corrupt := figures.get("corrupt"):
                self.accelerator.print(
                    f"phase {phase}, epoch {state.epoch}: {corrupt} {what} images can't be decoded", file=sys.stderr
                )
        if self.accelerator.is_main_process:
            with self.history.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
                file.flush()
                os.fsync(file.fileno())
        now = {"wandb": {"commit": True}}  # otherwise W&B shows an epoch when the next one ends
        self._tell_tracker(lambda: self.accelerator.log(row, step=row["epoch"], log_kwargs=now))
        left = _duration(row["seconds_left"])
        left = f", about {left} of {row['phase']} left" if left else ""
        val = "no validation"
        if row["val_loss"] is not None:
            val = f"val loss {row['val_loss']:.3f} top1 {row['val_top1']:6.2%} top5 {row['val_top5']:6.2%}"
        rate = "-" if row["images_per_second"] is None else f"{row['images_per_second']:.0f}"
        self.accelerator.print(
            f"epoch {row['epoch']:3d}/{sum(self.phases.values())} {row['phase']:<9s} lr {row['lr']:.1e} | "
            f"train loss {row['train_loss']:.3f} top1 {row['train_top1']:6.2%} | "
            f"{val} | "
            f"{row['seconds']:.1f} s, {rate} images/s"
            f"{left}{'  best' if best and row['val_loss'] is not None else ''}",
            flush=True,
        )

    def finish(self, summary: dict) -> None:
        """Write summary.json and hand it to the tracker."""
        if self.accelerator.is_main_process:
            write_whole(self.history.with_name("summary.json"), json.dumps(summary, indent=1) + "\n")
        figures = {key: value for key, value in summary.items() if isinstance(value, (int, float))}
        if self.accelerator.is_main_process:  # not logged, as that would make one more epoch of them
            self._tell_tracker(lambda: self.accelerator.get_tracker("wandb", unwrap=True).summary.update(figures))

    def _tell_tracker(self, tell) -> None:
        """Call the tracker. If it dies, say so once and train on without it."""
        if not self.tracker_works:
            return
        try:
            tell()
        except Exception as error:  # whatever W&B raises once its service is gone
            self.tracker_works = False
            print(f"W&B stopped working ({first_line(error)}): training continues; see {self.history}", file=sys.stderr)


def _forget_later_epochs(history: Path, state: RunState) -> None:
    """Truncate history.jsonl to the epochs that are kept."""
    try:
        lines = history.read_text(encoding="utf-8").splitlines() if history.exists() else []
    except (OSError, ValueError) as error:
        raise UserError(f"{history} can't be read ({first_line(error)}); restore it") from error
    if not state.step and len(lines) > 1:  # a run killed before its first checkpoint leaves one
        raise UserError(
            f"{history} holds {len(lines)} epochs, but there is no checkpoint to continue from: restore checkpoints/, "
            "or start a new run"
        )
    if len(lines) < state.epoch:
        raise UserError(f"{history} holds {len(lines)} epochs, but {state.epoch} were finished")
    write_whole(history, "".join(f"{line}\n" for line in lines[: state.epoch]))


def _duration(seconds: float) -> str:
    """Human-readable: 40 s, 12 min, 3.5 h; empty for 0."""
    if seconds < 90:
        return f"{seconds:.0f} s" if seconds else ""
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _start_wandb(accelerator: Accelerator, config: Config, run: Path, tracker_id: str) -> bool:
    """Start W&B online if there is a key and it answers, otherwise offline, with a line that says how to sync.

    Returns:
        Whether it works.
    """
    import wandb

    settings = wandb.Settings(
        init_timeout=WANDB_TIMEOUT, finish_timeout=WANDB_PATIENCE, finish_timeout_raises=True, silent=True
    )
    options = {"name": run.name, "dir": str(run), "settings": settings, "id": tracker_id, "resume": "allow"}
    values = json.loads(json.dumps(dataclasses.asdict(config)))
    here = shlex.quote(run.as_posix())

    def start():
        project = os.environ.get("WANDB_PROJECT") or PROJECT
        accelerator.init_trackers(project, config=values, init_kwargs={"wandb": options})
        if accelerator.is_main_process and not wandb.run.offline and wandb.run.url:  # which warns if asked offline
            print(f"W&B: {wandb.run.url}")

    def go_offline(why):
        settings.mode = "offline"
        if accelerator.is_main_process:
            print(f"W&B: {why}: offline. To upload later: wandb sync {here}/wandb/offline-run-*", file=sys.stderr)

    if accelerator.is_main_process and not _has_key():
        go_offline("there is no API key")
    try:
        start()
        return True
    except Exception as error:  # CommError, UsageError, AuthenticationError and others
        go_offline(f"it can't be reached ({first_line(error)})")
    accelerator.trackers.clear()  # the half-started one would raise again when closed
    with contextlib.suppress(Exception, SystemExit):  # it exits if its service has failed
        wandb.teardown()
    try:
        start()
        return True
    except Exception as error:  # its service can't be started at all
        accelerator.trackers.clear()
        if accelerator.is_main_process:
            print(f"W&B can't be started ({first_line(error)}): training goes on without it", file=sys.stderr)
        return False


def _has_key() -> bool:
    """Whether W&B will find a key, in the environment or the files that it reads; also true if it needs none."""
    import wandb

    try:
        settings = wandb.setup(wandb.Settings(silent=True)).settings
        return "WANDB_MODE" in os.environ or settings.mode != "online" or wandb.login(prompt=False, verify=False)
    except Exception:  # a key that can't be one, a service that can't be started: starting says so
        return True
