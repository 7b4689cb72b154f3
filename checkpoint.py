"""What a run must not lose: checkpoints to resume from, and the best weights. Nothing else writes them.

A checkpoint holds Accelerate's state (model, optimizer, scaler, each process's random states), the epoch's metrics so
far, a copy of best/, and the run's own state as JSON, which is read first: it says which phase to rebuild before the
rest is loaded. It is written to a folder of another name, with a manifest of checksums, and renamed once all of it is
on disk; so a folder with a checkpoint's name is whole unless the disk failed, and then the one before is used. Nothing
here unpickles arbitrary objects.
"""

import json
import random
import re
import shutil
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from pickle import UnpicklingError

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import load as load_safely
from safetensors.torch import load_file, save_file
from timm.models import save_for_hf
from torch import Tensor, nn

from config import CheckpointConfig
from engine import bare
from errors import USAGE, UserError
from files import digest, replace, to_disk
from metrics import Classification
from phases import RunState
from processes import AGREE_EVERY, max_over_processes, on_main

BEST = ("config.json", "model.safetensors")  # the files of best/
NAME = r"\d{5,}-\d{9,}"  # of a checkpoint: epochs finished, steps made


class Checkpoints:
    """The checkpoints of one run. Every process calls every method.

    Args:
        facts: plain values kept in each checkpoint that must not change or that a resumed run can't get elsewhere.
        resumed: the checkpoint that the run goes on from, which is not written again.
    """

    def __init__(
        self, accelerator: Accelerator, config: CheckpointConfig, run: Path, facts: dict, resumed: "Saved | None" = None
    ):
        self.accelerator, self.config, self.run, self.facts = accelerator, config, run, facts
        # Accelerate drops all but one of the weights in a storage, such as an LSTM's on a GPU, and names them as the
        # wrapper does that it was launched with, DDP or torch.compile's.
        accelerator.register_save_state_pre_hook(self._name_and_part)
        self.saved_at = time.monotonic()
        self.saved = (resumed.state.epoch, resumed.state.step) if resumed else None

    def due(self, state: RunState) -> bool:
        """Whether to write a checkpoint after the step just made."""
        if self.config.every_steps and state.step % self.config.every_steps == 0:
            return True
        if not self.config.every_minutes or (self.accelerator.num_processes > 1 and state.step % AGREE_EVERY):
            return False
        return max_over_processes(self.accelerator, time.monotonic() - self.saved_at >= 60 * self.config.every_minutes)

    def save(self, state: RunState, metrics: Classification) -> None:
        """Write runs/NAME/checkpoints/EPOCH-STEP whole or not at all, then prune older ones."""
        if self.saved == (state.epoch, state.step):  # a signal came before another step was made
            return
        accelerator, folder = self.accelerator, self.run / "checkpoints"
        target, unfinished = folder / f"{state.epoch:05d}-{state.step:09d}", folder / "unfinished"
        if accelerator.is_main_process:
            shutil.rmtree(unfinished, ignore_errors=True)
        accelerator.wait_for_everyone()
        try:
            accelerator.save_state(str(unfinished))
            epoch = {name: part.cpu() for name, part in metrics.state_dict().items()}
            save_file(epoch, unfinished / f"epoch_{accelerator.process_index}.safetensors")
            accelerator.wait_for_everyone()
            if accelerator.is_main_process:
                # A run killed while it wrote its first best/ has only a part of it.
                if all((self.run / "best" / name).is_file() for name in BEST):
                    (unfinished / "best").mkdir()
                    for name in BEST:
                        shutil.copyfile(self.run / "best" / name, unfinished / "best" / name)
                text = json.dumps({"state": state.state_dict()} | self.facts, indent=1)
                (unfinished / "state.json").write_text(text, encoding="utf-8")
                _seal(unfinished)
                _remove(target)
                replace(unfinished, target)
                to_disk(folder)
                self._prune(target)
        except Exception:
            shutil.rmtree(unfinished, ignore_errors=True)  # useless, and the disk may be full
            raise
        accelerator.wait_for_everyone()
        self.saved_at, self.saved = time.monotonic(), (state.epoch, state.step)

    def _name_and_part(self, models: list[nn.Module], states: list[dict[str, Tensor]], _folder: str) -> None:
        (model,) = models
        states[:] = [bare(self.accelerator, model).state_dict()]
        _part(states[0])

    def _prune(self, newest: Path) -> None:
        folders = _folders(self.run)
        number = folders.index(newest) + 1
        # Newer ones are damaged, or hold steps that a resumed run repeats.
        for path in folders[: max(0, number - self.config.keep)] + folders[number:]:
            try:
                _remove(path)
            except OSError as error:  # on Windows it may be open somewhere; the next checkpoint tries again
                print(f"{path} can't be removed: {error.strerror}", file=sys.stderr)


def _remove(path: Path) -> None:
    """Remove a folder, or whatever somebody has put in its place."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@dataclass(frozen=True)
class Saved:
    """A checkpoint found to be whole."""

    path: Path
    state: RunState
    facts: dict

    def check_same(self, what: str, now: dict) -> None:
        """UserError if a section of the facts has changed; names the difference, with both values."""
        for name, before in self.facts[what].items():
            if before != now[name]:
                raise UserError(f"--resume: {what} have changed: {name} was {before}, and is {now[name]}", USAGE)


def newest(run: Path) -> Saved | None:
    """The newest whole checkpoint of a run folder; None if there is none yet. Damaged ones are named on stderr.

    Raises:
        UserError: the run is finished; or there are checkpoints, but all are damaged.
    """
    if (run / "summary.json").exists():
        raise UserError(
            f"--resume: {run} is finished (it has a summary.json); a new run can start from it: "
            f"--model.weights {run}/best",
            shared=True,
        )
    path = on_main(lambda: _newest_whole(run))
    if path is None:
        return None
    content = json.loads((path / "state.json").read_text(encoding="utf-8"))
    try:
        return Saved(path, RunState(**content.pop("state")), content)
    except (KeyError, TypeError) as error:
        raise UserError(f"--resume: {path}/state.json comes from another version of this software ({error})") from error


def _newest_whole(run: Path) -> Path | None:
    torn = []
    for path in reversed(_folders(run)):
        fault = _fault(path)
        if fault is None:
            if torn:
                print(f"damaged: {'; '.join(torn)}. Continuing from the one before, {path.name}", file=sys.stderr)
            return path
        torn.append(f"checkpoint {path}: {fault}")
    if torn:
        raise UserError(f"--resume: {run} has no intact checkpoint ({'; '.join(torn)}); best/ is unchanged")
    return None


def begun(run: Path) -> bool:
    """Whether a run has an epoch or a checkpoint, and so is worth resuming."""
    history = run / "history.jsonl"
    return bool(_folders(run)) or (history.exists() and history.stat().st_size > 0)


def epochs_finished(run: Path) -> int | None:
    """How many epochs a run has finished so far, by its history; None if that can't be read."""
    try:
        return len((run / "history.jsonl").read_bytes().splitlines())
    except OSError:
        return None


def _folders(run: Path) -> list[Path]:
    folders = (run / "checkpoints").glob("[0-9]*-[0-9]*")
    return sorted(path for path in folders if re.fullmatch(NAME, path.name))  # not somebody's copy of one


# ---- whole or not at all ----------------------------------------------------------------------------------------


def _files(folder: Path) -> dict[str, Path]:
    """The files in a folder, without those that file managers leave everywhere."""
    left = ("desktop.ini", "Thumbs.db")
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {
        it.relative_to(folder).as_posix(): it for it in files if not it.name.startswith(".") and it.name not in left
    }


def _seal(folder: Path) -> None:
    """Write the manifest and flush everything to disk."""
    manifest = {name: digest(path) for name, path in _files(folder).items()}
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    for path in [*_files(folder).values(), *(path for path in folder.rglob("*") if path.is_dir()), folder]:
        to_disk(path)


def _fault(folder: Path) -> str | None:
    """What is wrong with a sealed folder, or None."""
    try:
        files = _files(folder)
        manifest = json.loads(files.pop("manifest.json").read_text(encoding="utf-8"))
        names = sorted(manifest)
    except (KeyError, ValueError, TypeError, OSError):
        return "manifest.json is missing or damaged"
    if names != sorted(files):
        return f"{', '.join(sorted(set(names) ^ set(files)))} missing, or not in its manifest"
    for name in names:
        try:
            if digest(files[name]) != manifest[name]:
                return f"{name} is not what manifest.json says"
        except OSError as error:  # a bad sector, say
            return f"{name} can't be read ({error.strerror})"
    return None


# ---- resuming ---------------------------------------------------------------------------------------------------


def restore(accelerator: Accelerator, saved: Saved, run: Path) -> dict[str, Tensor]:
    """Load a checkpoint into the prepared objects, which must be those of its phase, and put its best/ back.

    Returns:
        The unfinished epoch's state, for `Classification.load_state_dict`.

    Raises:
        UserError: this process's random states can't be restored (Accelerate would ignore that).
    """
    path = saved.path
    # best/ may hold a later epoch, which will be trained again.
    if accelerator.is_main_process and (path / "best").is_dir():
        _put_in_place(path / "best", run / "best", shutil.copyfile)
    states = path / f"random_states_{accelerator.process_index}.pkl"
    loading = accelerator.register_load_state_pre_hook(partial(_load_weights, accelerator))
    try:
        accelerator.load_state(str(path))
        accelerator.step = 0  # its count of pieces, whose size may have changed: a checkpoint lies between steps
        restored = states.is_file() and _settle_random_states(load_safely(states), accelerator.device)
    except UnpicklingError as error:  # Accelerate loads with weights_only
        raise UserError(f"--resume: {path} holds a pickle that could run code, and is refused") from error
    finally:
        loading.remove()
    if not restored:
        raise UserError(
            f"--resume: {path} has no matching random states for process {accelerator.process_index}: resume with as "
            "many processes, and devices of the same kind and number, as the run was started with"
        )
    # Copies, as what is loaded maps the file, which Windows then can't remove.
    epoch = load_file(path / f"epoch_{accelerator.process_index}.safetensors")
    epoch = {name: part.clone() for name, part in epoch.items()}
    accelerator.wait_for_everyone()
    return epoch


def _load_weights(accelerator: Accelerator, models: list[nn.Module], folder: str) -> None:
    """In place of safetensors' `load_model`, which refuses weights that are parts of one storage."""
    state = load_file(Path(folder, "model.safetensors"))
    model = bare(accelerator, models.pop())
    own = model.state_dict().keys()
    plain = {name: name.removeprefix("module.").removeprefix("_orig_mod.") for name in state}  # of older checkpoints
    model.load_state_dict({name if name in own else plain[name]: state[name] for name in state})


def _settle_random_states(states: dict, device: torch.device) -> bool:
    """Set the random state of this process's GPU; return whether each that is drawn from is now the saved one."""
    numpy_now, numpy_then = np.random.get_state(), states["numpy_random_seed"]
    same = random.getstate() == states["random_state"] and torch.equal(
        torch.get_rng_state(), states["torch_manual_seed"]
    )
    same = same and all(np.array_equal(now, then) for now, then in zip(numpy_now, numpy_then, strict=True))
    if device.type == "cuda":
        then = states.get("torch_cuda_manual_seed", [])[device.index or 0 :]
        if then:  # Accelerate restores none if others are visible than were
            torch.cuda.set_rng_state(then[0], device)
        same = same and bool(then) and torch.equal(torch.cuda.get_rng_state(device), then[0])
    return same


# ---- the best weights -------------------------------------------------------------------------------------------


def save_best(model: nn.Module, run: Path) -> None:
    """Write the unwrapped model to runs/NAME/best, in timm's format: weights, architecture, normalisation."""
    unfinished = run / "best.unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)
    cfg = dict(model.pretrained_cfg)
    label_names = cfg.pop("label_names")
    arguments = {"img_size": list(cfg["input_size"][1:])} if cfg.get("fixed_input_size") else None
    parting = model.register_state_dict_post_hook(lambda model, state, *_: _part(state))
    try:
        save_for_hf(
            model,
            str(unfinished),
            model_config={"label_names": label_names, "pretrained_cfg": cfg},
            model_args=arguments,
            safe_serialization=True,
        )
        _put_in_place(unfinished, run / "best", replace)
    finally:
        parting.remove()
        shutil.rmtree(unfinished, ignore_errors=True)  # if it failed, it is useless, and the disk may be full


def _part(state: dict[str, Tensor]) -> None:
    """Make a state such as safetensors can write: contiguous, and no two weights in one storage.

    Weights may be channels_last, and modules may share theirs, as CoaT's stages do.
    """
    storages = set()
    for name, tensor in state.items():
        storage = tensor.untyped_storage().data_ptr()
        state[name] = tensor.contiguous() if storage not in storages else tensor.clone().contiguous()
        storages.add(storage)


def _put_in_place(source: Path, best: Path, move) -> None:
    """Move or copy best/'s files from `source`; each appears whole or not at all."""
    best.mkdir(exist_ok=True)
    for name in BEST:
        arrived = best / f".{name}.unfinished"
        try:
            move(source / name, arrived)
            to_disk(arrived)
            replace(arrived, best / name)
        except OSError:
            arrived.unlink(missing_ok=True)
            raise
    to_disk(best)


def load_best(model: nn.Module, run: Path) -> None:
    """Load the best weights into the bare model."""
    model.load_state_dict(load_file(run / "best" / "model.safetensors"))
