"""Where a run's figures go: history.jsonl always, W&B if wanted, one line per epoch on the console."""

import dataclasses
import json
import netrc
import os
import sys
from pathlib import Path
from urllib.parse import urlparse

from accelerate import Accelerator

from config import Config

PROJECT = "phases"
WANDB_TIMEOUT = 15  # seconds that wandb may take to connect before the run goes on offline


class Tracking:
    """The figures' way out of one run. Every process may call it; the main one writes.

    Args:
        resumed_epochs: epochs of history.jsonl to keep; later ones will be trained again.
    """

    def __init__(self, accelerator: Accelerator, config: Config, run: Path, resumed_epochs: int = 0):
        self.accelerator = accelerator
        self.history = run / "history.jsonl"
        if accelerator.is_main_process:
            lines = self.history.read_text(encoding="utf-8").splitlines() if self.history.exists() else []
            self.history.write_text("".join(f"{line}\n" for line in lines[:resumed_epochs]), encoding="utf-8")
        self.wandb = config.tracking == "wandb"
        if self.wandb and accelerator.is_main_process:
            _start_wandb(accelerator, config, run)

    def epoch(self, row: dict, best: bool, total: int) -> None:
        """Record one finished epoch (history.jsonl's columns) and print its line."""
        if not self.accelerator.is_main_process:
            return
        with self.history.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())
        if self.wandb:
            self.accelerator.log(row, step=row["epoch"])
        print(
            f"epoch {row['epoch']:3d}/{total} {row['phase']:<9s} lr {row['lr']:.1e} | "
            f"train loss {row['train_loss']:.3f} top1 {row['train_top1']:6.2%} | "
            f"val loss {row['val_loss']:.3f} top1 {row['val_top1']:6.2%} top5 {row['val_top5']:6.2%} | "
            f"{row['seconds']:.1f} s, {row['images_per_second']:.0f} images/s{'  best' if best else ''}",
            flush=True,
        )

    def finish(self, summary: dict) -> None:
        """Hand the test figures to the tracker and close it."""
        if self.wandb and self.accelerator.is_main_process:
            tracker = self.accelerator.get_tracker("wandb", unwrap=True)
            tracker.summary.update(summary)
            self.accelerator.end_training()


def _start_wandb(accelerator: Accelerator, config: Config, run: Path) -> None:
    """Start W&B online if there is a key and an answer, otherwise offline, with one line that says how to sync."""
    import wandb

    settings = {"name": run.name, "dir": str(run), "settings": wandb.Settings(init_timeout=WANDB_TIMEOUT, silent=True)}
    values = json.loads(json.dumps(dataclasses.asdict(config)))
    if "WANDB_MODE" not in os.environ and not _has_key():
        os.environ["WANDB_MODE"] = "offline"
        _say_offline("there is no API key", run)
    try:
        accelerator.init_trackers(PROJECT, config=values, init_kwargs={"wandb": settings})
    except Exception as error:  # wandb raises CommError, UsageError, AuthenticationError and more here
        os.environ["WANDB_MODE"] = "offline"
        _say_offline(f"it can't be reached ({(str(error) or type(error).__name__).splitlines()[0]})", run)
        wandb.teardown()
        accelerator.init_trackers(PROJECT, config=values, init_kwargs={"wandb": settings})


def _say_offline(why: str, run: Path) -> None:
    print(f"W&B: {why}, so this run is kept offline; later: wandb sync {run}/wandb/offline-run-*", file=sys.stderr)


def _has_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    try:
        return netrc.netrc().authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False
