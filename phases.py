"""The rules of a phase: optimizer, learning-rate schedule, early stopping; and the run's state, which outlives it."""

import math
import uuid
import warnings
from dataclasses import asdict, dataclass, field

import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau

from config import PhaseConfig


def cosine(epoch: int, epochs: int) -> float:
    """Learning-rate factor in epoch `epoch` (from 0) of `epochs`: 1 at first, falling to 0 after the last.

    Loshchilov & Hutter, SGDR (2017), without restarts.
    """
    return 0.5 * (1 + math.cos(math.pi * epoch / epochs))


def make_optimizer(phase: PhaseConfig, model: nn.Module) -> Optimizer:
    """A new optimizer over the parameters that train in this phase."""
    training = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # A flag on the device makes fused optimizers skip a step (engine.py: after a non-finite loss).
    options = {"lr": phase.lr, "weight_decay": phase.weight_decay, "fused": True}
    if phase.optimizer == "sgd":
        optimizer = SGD(training, momentum=phase.momentum, **options)
        if phase.momentum:  # torch leaves the buffer uninitialised if the first step is skipped
            for parameter in training:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        return optimizer
    return {"adam": Adam, "adamw": AdamW}[phase.optimizer](training, **options)


class Schedule:
    """Sets the learning rate once per epoch. Never given to `accelerator.prepare`, which would step it per process."""

    def __init__(self, optimizer: Optimizer, phase: PhaseConfig):
        if phase.schedule == "plateau":
            self.scheduler = ReduceLROnPlateau(
                optimizer, mode="max", factor=0.1, patience=5, threshold=0.0, threshold_mode="abs"
            )
        elif phase.schedule == "cosine":
            self.scheduler = LambdaLR(optimizer, lambda epoch: cosine(epoch, phase.epochs))
        else:
            self.scheduler = LambdaLR(optimizer, lambda epoch: 1.0)
        self.wants_metric = phase.schedule == "plateau"

    def step(self, top1: float | None) -> None:
        """End an epoch that reached this validation top-1 (the same on every process; None: no validation)."""
        with warnings.catch_warnings():  # torch warns of a missing step if a run resumed at an epoch's end
            warnings.filterwarnings("ignore", message="Detected call of")
            self.scheduler.step(top1) if self.wants_metric else self.scheduler.step()

    def state_dict(self) -> dict:
        """Plain values, fit for JSON."""
        return {key: value for key, value in self.scheduler.state_dict().items() if key != "lr_lambdas"}

    def load_state_dict(self, state: dict) -> None:
        self.scheduler.load_state_dict(state | ({} if self.wants_metric else {"lr_lambdas": [None]}))


@dataclass
class EarlyStopping:
    """Counts epochs without gain in validation top-1. A tie is no gain. Starts afresh in each phase.

    Args:
        patience: stop after this many epochs in a row without gain; None: never.
    """

    patience: int | None
    best: float | None = None
    bad_epochs: int = 0

    def step(self, top1: float | None) -> bool:
        """Record an epoch's validation top-1; return whether to stop the phase. Without validation: never."""
        if self.best is None or top1 > self.best:
            self.best, self.bad_epochs = top1, 0
        else:
            self.bad_epochs += 1
        return self.patience is not None and self.bad_epochs >= self.patience


@dataclass
class RunState:
    """Where a run is. Plain values, kept as JSON in each checkpoint."""

    phase: int = 0  # index of the current phase
    phase_epoch: int = 0  # epochs finished in it
    stopped: bool = False  # early
    epoch: int = 0  # epochs finished in all
    epoch_step: int = 0  # optimizer steps in the current epoch: the position in the data
    epoch_seconds: float = 0.0  # that epoch's, up to its last step
    step: int = 0  # optimizer steps in all
    best_top1: float | None = None  # over the whole run, like the weights in best/
    best_epoch: int | None = None
    minutes: float = 0.0  # of training and validation so far
    schedule: dict = field(default_factory=dict)
    early_stopping: dict = field(default_factory=dict)
    tracker_id: str = field(default_factory=lambda: uuid.uuid4().hex, compare=False)  # W&B's name for the run

    def end_step(self, seconds: float) -> None:
        """Count an optimizer step; `seconds` are the epoch's so far."""
        self.epoch_seconds = seconds
        self.epoch_step += 1
        self.step += 1

    def end_epoch(self, top1: float | None, seconds: float, schedule: Schedule, stopping: EarlyStopping) -> bool:
        """Record an epoch, its validation top-1, and where its schedule and early stopping are now.

        Returns:
            Whether it is the run's best so far (a tie is not; without validation the newest is).
        """
        self.epoch += 1
        self.phase_epoch += 1
        self.epoch_step, self.epoch_seconds = 0, 0.0
        self.minutes += seconds / 60
        self.schedule, self.early_stopping = schedule.state_dict(), asdict(stopping)
        if self.best_top1 is not None and top1 <= self.best_top1:
            return False
        self.best_top1, self.best_epoch = top1, self.epoch
        return True

    def begin_phase(self, index: int) -> None:
        self.phase, self.phase_epoch, self.stopped = index, 0, False
        self.schedule, self.early_stopping = {}, {}

    def state_dict(self) -> dict:
        return asdict(self)
