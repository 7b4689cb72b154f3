"""The only reader and writer of what a run must not lose: checkpoints to resume from, and the best weights.

A checkpoint is Accelerate's (model, optimizer, scaler, random states) plus the run's own state as JSON, which is read
first: it says which phase to rebuild before the rest can be loaded into it. Nothing here unpickles foreign objects.
"""

import json
import os
import shutil
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import load as load_safely
from safetensors.torch import load_file
from timm.models import save_for_hf
from torch import nn

from errors import UserError
from phases import RunState

KEEP = 2  # the newest, and the one before


def save(accelerator: Accelerator, state: RunState, run: Path) -> None:
    """Write runs/NAME/checkpoints/EPOCH whole, then prune older ones. Called by every process."""
    folder = run / "checkpoints"
    target, unfinished = folder / f"{state.epoch:05d}", folder / "unfinished"
    if accelerator.is_main_process:
        shutil.rmtree(unfinished, ignore_errors=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(unfinished))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        (unfinished / "state.json").write_text(json.dumps(state.state_dict(), indent=1), encoding="utf-8")
        shutil.rmtree(target, ignore_errors=True)
        os.replace(unfinished, target)
        for old in _finished(run)[:-KEEP]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()


def newest(run: Path) -> tuple[Path, RunState]:
    """The newest checkpoint of a run folder and the state in it; UserError if there is none."""
    if (run / "summary.json").exists():
        raise UserError(f"--resume: {run} is finished (it has a summary.json)")
    finished = _finished(run)
    if not finished:
        raise UserError(
            f"--resume: {run} has no checkpoint yet (one is written at the end of each epoch); start afresh"
        )
    return finished[-1], RunState(**json.loads((finished[-1] / "state.json").read_text(encoding="utf-8")))


def restore(accelerator: Accelerator, path: Path) -> None:
    """Load a checkpoint into what has been prepared, which must be of the checkpoint's phase.

    Raises:
        UserError: this process's random state can't be restored (Accelerate would go on without it).
    """
    accelerator.load_state(str(path))
    states = path / f"random_states_{accelerator.process_index}.pkl"
    if not states.is_file() or not torch.equal(load_safely(states)["torch_manual_seed"], torch.get_rng_state()):
        raise UserError(
            f"--resume: {path} has no random state for process {accelerator.process_index}: resume with as many "
            "processes as the run was started with"
        )


def _finished(run: Path) -> list[Path]:
    return sorted(path.parent for path in (run / "checkpoints").glob("[0-9]*/state.json"))


def save_best(model: nn.Module, run: Path) -> None:
    """Write the unwrapped model to runs/NAME/best, so that timm loads it: weights, architecture, normalisation."""
    best, unfinished = run / "best", run / "best.unfinished"
    cfg = dict(model.pretrained_cfg)
    label_names = cfg.pop("label_names")
    arguments = {"img_size": list(cfg["input_size"][1:])} if cfg.get("fixed_input_size") else None
    save_for_hf(
        model,
        str(unfinished),
        model_config={"label_names": label_names, "pretrained_cfg": cfg},
        model_args=arguments,
        safe_serialization=True,
    )
    best.mkdir(exist_ok=True)
    for name in ("config.json", "model.safetensors"):  # each appears whole or not at all
        os.replace(unfinished / name, best / name)
    unfinished.rmdir()


def load_best(model: nn.Module, run: Path) -> None:
    """Put the best weights into the unwrapped model."""
    model.load_state_dict(load_file(run / "best" / "model.safetensors"))
