"""Where a run's figures go: history.jsonl always, W&B if wanted, and the console."""

import dataclasses
import json
import math
import netrc
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlparse

from accelerate import Accelerator
from tqdm import tqdm

from config import Config
from engine import Step
from errors import UserError

PROJECT = "phases"  # W&B's project
WANDB_TIMEOUT = 15  # seconds that W&B may take to connect before the run goes on offline
READ_EVERY = 20  # steps between two looks at the loss: each one waits for the device


class Tracking:
    """The figures' way out of one run. Every process calls it; the main one writes.

    Args:
        epochs_done: epochs of history.jsonl to keep when a run is resumed; later ones will be trained again.
    """

    def __init__(self, accelerator: Accelerator, config: Config, run: Path, epochs_done: int = 0):
        self.accelerator = accelerator
        self.history = run / "history.jsonl"
        if accelerator.is_main_process:
            lines = self.history.read_text(encoding="utf-8").splitlines() if self.history.exists() else []
            self.history.write_text("".join(f"{line}\n" for line in lines[:epochs_done]), encoding="utf-8")
        if config.tracking == "wandb":
            _start_wandb(accelerator, config, run)

    def watch(self, steps: Iterator[Step], title: str, images: int | None) -> Iterator[Step]:
        """Pass an epoch's steps on, with a progress bar on a terminal (`images` is its length, None if unknown).

        Raises:
            UserError: the loss is no longer finite.
        """
        hidden = None if self.accelerator.is_main_process else True  # None: hidden unless on a terminal
        with tqdm(total=images, desc=title, unit=" images", leave=False, disable=hidden) as bar:
            for number, step in enumerate(steps, start=1):
                bar.update(step.images)
                if number % READ_EVERY == 1:
                    loss, top1 = step.loss.item(), step.top1.item()
                    bar.set_postfix(loss=f"{loss:.3f}", top1=f"{top1:.1%}")
                    check_finite(loss, f"{title}, step {number} or just before")
                yield step

    def epoch(self, row: dict, best: bool, total: int) -> None:
        """Record one finished epoch (a row of history.jsonl) and print its line."""
        if self.accelerator.is_main_process:
            with self.history.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
                file.flush()
                os.fsync(file.fileno())
        self.accelerator.log(row, step=row["epoch"])
        self.accelerator.print(
            f"epoch {row['epoch']:3d}/{total} {row['phase']:<9s} lr {row['lr']:.1e} | "
            f"train loss {row['train_loss']:.3f} top1 {row['train_top1']:6.2%} | "
            f"val loss {row['val_loss']:.3f} top1 {row['val_top1']:6.2%} top5 {row['val_top5']:6.2%} | "
            f"{row['seconds']:.1f} s, {row['images_per_second']:.0f} images/s{'  best' if best else ''}",
            flush=True,
        )

    def finish(self, summary: dict) -> None:
        """Write summary.json, hand it to the tracker, and close both."""
        if self.accelerator.is_main_process:
            path = self.history.with_name("summary.json")
            path.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
        self.accelerator.log({key: value for key, value in summary.items() if isinstance(value, (int, float))})
        self.accelerator.end_training()


def check_finite(loss: float, where: str) -> None:
    """UserError if the loss is no longer a number."""
    if not math.isfinite(loss):
        raise UserError(f"the loss became {loss} in {where}: lower the phase's lr, or clip gradients (--clip_norm 1)")


def _start_wandb(accelerator: Accelerator, config: Config, run: Path) -> None:
    """Start W&B online if there is a key and an answer, otherwise offline, with one line that says how to sync."""
    import wandb

    options = {"name": run.name, "dir": str(run), "settings": wandb.Settings(init_timeout=WANDB_TIMEOUT, silent=True)}
    values = json.loads(json.dumps(dataclasses.asdict(config)))

    def start():
        accelerator.init_trackers(PROJECT, config=values, init_kwargs={"wandb": options})

    def go_offline(why):
        os.environ["WANDB_MODE"] = "offline"
        if accelerator.is_main_process:
            print(f"W&B: {why}: offline. To upload later: wandb sync {run}/wandb/offline-run-*", file=sys.stderr)

    if "WANDB_MODE" not in os.environ and not _has_key():
        go_offline("there is no API key")
    try:
        start()
    except Exception as error:  # CommError, UsageError, AuthenticationError and others
        go_offline(f"it can't be reached ({(str(error).strip() or type(error).__name__).splitlines()[0]})")
        accelerator.trackers.clear()  # of the half-made one, whose end would raise another error
        wandb.teardown()
        start()


def _has_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    try:
        return netrc.netrc().authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False
