"""What can go wrong in a valid run: memory or disk full, a worker or process dead. Each is explained in a sentence."""

import contextlib
import copy
import errno
import re
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import find_executable_batch_size
from accelerate.utils.memory import should_reduce_batch_size
from torch import nn

import checkpoint
import models
from config import Config
from engine import train_mode
from errors import UserError, first_line
from phases import make_optimizer
from processes import max_over_processes


@contextlib.contextmanager
def explained(
    resume_hint: str, accelerator: Accelerator, micro_batch_size: int, run: Path | None = None, resumed: bool = False
):
    """Turn libraries' errors for such faults into a `UserError` that says what to do; let all others pass.

    Args:
        resume_hint: how to continue, for the message.
        run: the run's folder; None if nothing is trained. If a new run fails before its first checkpoint, the
            folder is removed, so there is nothing to resume; the process that failed may have removed it before the
            others notice the failure.
        resumed: whether the run was resumed.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # each library has its own type, or just a RuntimeError with a message
        text, begun = str(error), run is None or resumed or checkpoint.begun(run)
        resume_hint = resume_hint if begun else "start again"
        in_worker = "in DataLoader worker process" in text  # its own error, raised here again
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or any(sign in text for sign in FULL)
        if "DataLoader worker (pid" in text or (in_worker and (full or "MemoryError" in text or out_of_memory(error))):
            reason = text.strip().splitlines()[-1] if in_worker else first_line(error)
            raise UserError(
                f"a loader's worker died ({reason}). If it was short of memory, or of /dev/shm, use fewer "
                f"--data.workers; {resume_hint}"
            ) from error
        if out_of_memory(error):
            device = accelerator.device.type
            raise UserError(
                f"out of memory with {micro_batch_size} images per forward pass on each process ({device}). Try a "
                f"smaller --data.micro_batch_size (the batch size stays)"
                f"{', or auto for it; --mixed_precision bf16' * (not begun)}"
                f"{'; --cuda_graphs false, --data.keep_mb 0' * (device == 'cuda' and run is not None)}; {resume_hint}"
            ) from error
        if ONE_VALUE in text:
            raise UserError(
                "batch norm needs more than one image where a map is one pixel: --data.micro_batch_size 2 or more, or "
                f"larger images; {resume_hint}"
            ) from error
        if UNUSED in text:
            which = re.search(r"did not receive grad for rank \d+: *([^\n]+)", text)
            raise UserError(
                "several processes can't train parameters that take no part in the loss, as some here do"
                f"{f' ({which[1].strip()})' if which else ''}: leave their modules out of the phase, or the model; "
                f"TORCH_DISTRIBUTED_DEBUG=INFO names them; {resume_hint}"
            ) from error
        if "NCCL" in text and "/dev/shm" in text:
            raise UserError(
                "the processes are short of /dev/shm, through which their GPUs communicate: give a container more "
                f"(docker run --shm-size 2g); {resume_hint}"
            ) from error
        if full:
            raise UserError(
                f"the disk is full: {first_line(error)}. What was written before is intact: make room, "
                f"and {resume_hint}"
            ) from error
        unread = isinstance(error, BrokenPipeError)  # of this process's own output: `| tee` has died
        if accelerator.num_processes > 1 and not unread and any(sign in text for sign in LOST):
            ways = resume_hint if run is None or run.exists() else "what it said itself is the reason"
            last = text.rpartition("Last error:")[2].strip()  # NCCL's own words, if it has any
            reason = first_line(error) if last in (text.strip(), "", "Unknown NCCL Error") else last
            raise UserError(f"another process of this run has died ({reason}); {ways}") from error
        raise


UNUSED = "Expected to have finished reduction in the prior iteration"
ONE_VALUE = "Expected more than 1 value per channel when training"
# Torch's writer gives no reason; 112 is Windows's number.
FULL = ("No space left on device", "(os error 112)", "PytorchStreamWriter failed", "unexpected pos")
NO_MEMORY = (
    "could not create a primitive",
    "CUDA error: out of memory",
    "Cuda failure 2 'out of memory'",  # as NCCL says it, and the next one, too
    "Failed to CUDA calloc",
    "_ALLOC_FAILED",
    "DefaultCPUAllocator: not enough memory",  # as Windows says it
)
LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Timed out waiting", "Socket", "NCCL")


def out_of_memory(error: Exception) -> bool:
    """Whether an error means out of memory: Python's own, those that Accelerate knows, oneDNN's and CUDA's."""
    known = isinstance(error, MemoryError) or should_reduce_batch_size(error)
    return known or any(sign in str(error) for sign in NO_MEMORY)


def fitting_micro_batch(
    accelerator: Accelerator, config: Config, model: nn.Module, transform: nn.Module, size: tuple[int, int], share: int
) -> int:
    """A micro-batch size whose step fits in every phase: a process's share of the batch, halved until it fits.

    Each try uses a copy of the model and some more images than are to fit, and throws everything drawn and computed
    away. Processes don't communicate during a try, but agree after it.

    Args:
        transform: uint8 (B, 3, H, W) to the model's input.
        size: height and width in pixels of the model's input.
        share: images per process and step.

    Raises:
        UserError: not even one image fits.
    """
    tried = last = share
    least = 1 if config.augment.mix == "none" else 2  # mixing needs two images

    def smaller() -> int:
        nonlocal tried, last
        last, tried = tried, max((part for part in range(least, tried // 2 + 1) if share % part == 0), default=0)
        return tried

    @find_executable_batch_size(starting_batch_size=share, reduce_batch_size_fn=smaller)
    def fit(micro_batch_size: int) -> int:
        error = None
        try:
            for phase in config.phases.values():
                # About an eighth more, as training holds more than a step does, and leaves memory in pieces. One image
                # must do, as there is no smaller step.
                images = micro_batch_size + (micro_batch_size + 6) // 8
                _try_step(accelerator, model, phase, transform, (images, 3, *size))
        except Exception as raised:
            if ONE_VALUE in str(raised):
                raise UserError(
                    "data.micro_batch_size: only 1 image fits, and batch norm needs two where a map is one pixel"
                ) from raised
            if not out_of_memory(raised):
                raise
            error = raised.with_traceback(None)  # the traceback holds the tensors
        if max_over_processes(accelerator, error is not None):
            raise torch.OutOfMemoryError("it is out of memory. (here, or on another process)") from error
        return micro_batch_size

    try:
        fitting = fit()
        if accelerator.device.type == "cuda":
            torch.cuda.empty_cache()  # for NCCL, which allocates its own
            torch.cuda.reset_peak_memory_stats()  # the history records the training's own peak
        return fitting
    except RuntimeError as error:
        if "reached zero" not in str(error):
            raise
        images = {1: "one image fits", 2: "two images fit"}.get(last, f"{last} images fit")
        others = f", and the {share} images of each process have no smaller part" if last > least else ""
        raise UserError(
            f"out of memory: not even {images} through {config.model.name} on {accelerator.device.type}{others}"
        ) from error


def _try_step(accelerator: Accelerator, model: nn.Module, phase, transform: nn.Module, shape) -> None:
    devices = [accelerator.device] if accelerator.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        trial = copy.deepcopy(model).to(accelerator.device)
        models.freeze_all_but(trial, phase.modules)
        train_mode(trial)
        optimizer = make_optimizer(phase, trial)
        trained = [parameter for parameter in trial.parameters() if parameter.requires_grad]
        twice = [torch.empty_like(one) for one in trained if accelerator.num_processes > 1]  # DDP's second gradients
        images = transform(torch.zeros(shape, dtype=torch.uint8, device=accelerator.device))
        for _ in range(2):  # the second step has the optimizer's state, too
            with accelerator.autocast():
                loss = trial(images).float().logsumexp(1).mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        del twice
