"""The Accelerator, and what to check about how we were launched before anything is trained on it."""

import os
import platform

import torch
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.utils import GradientAccumulationPlugin

import data
from config import Config, Environment
from errors import USAGE, UserError


def make_accelerator(config: Config) -> Accelerator:
    """The Accelerator of this run: precision, devices and processes are as `accelerate launch` says.

    Raises:
        UserError: a launch that would train something else than it says.
    """
    accelerator = Accelerator(
        log_with="wandb" if config.tracking == "wandb" else None,
        # The loop cuts each batch into equal pieces itself, so an epoch's end needs no special treatment.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1, sync_with_dataloader=False),
        # A seedable sampler gives the same order again after a restart.
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=config.seed, non_blocking=True),
    )
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world != accelerator.num_processes:
        raise UserError(
            f"{world} processes were launched, but each of them believes to be alone. On GPUs: accelerate launch "
            f"--multi_gpu --num_processes {world} train.py; on a CPU: ACCELERATE_USE_CPU=true torchrun "
            f"--nproc_per_node {world} train.py",
            USAGE,
        )
    if accelerator.device.type == "cpu" and accelerator.mixed_precision == "fp16":
        raise UserError("fp16 does nothing on a CPU; use --mixed_precision bf16, or no", USAGE)
    if accelerator.device.type == "cpu" and os.environ.get("OMP_NUM_THREADS", "1") == "1":
        # accelerate launch sets OMP_NUM_THREADS to 1 where the user did not, which wastes every core but one.
        torch.set_num_threads(data.cores_per_process())
    return accelerator


def environment(accelerator: Accelerator) -> Environment:
    """What config.yaml records of the surroundings."""
    from importlib.metadata import version

    names = ("torch", "timm", "accelerate", "datasets", "kornia")
    on_gpu = accelerator.device.type == "cuda"
    return Environment(
        mixed_precision=accelerator.mixed_precision,
        processes=accelerator.num_processes,
        device=torch.cuda.get_device_name() if on_gpu else accelerator.device.type,
        versions={"python": platform.python_version()} | {name: version(name) for name in names},
    )


def check_same(recorded: Environment | None, accelerator: Accelerator) -> None:
    """UserError if a run would be resumed with other processes, precision or device than it was started with."""
    now = environment(accelerator)
    for name in ("processes", "mixed_precision", "device"):
        before = getattr(recorded, name, None)
        if recorded and before != getattr(now, name):
            raise UserError(f"--resume: the run was started with {name} {before}, not {getattr(now, name)}", USAGE)


def share_of_batch(config: Config, accelerator: Accelerator) -> tuple[int, int]:
    """Images per process and step, and per forward pass; sets the Accelerator's accumulation accordingly.

    Raises:
        UserError: the global batch can't be shared out equally; the nearest sizes that can are named.
    """
    total, processes = config.data.batch_size, accelerator.num_processes
    micro = config.data.micro_batch_size
    unit = processes * (micro or 1)
    if micro and micro * processes > total:
        raise UserError(
            f"data.micro_batch_size: {micro} on {processes} process(es) is more than data.batch_size {total}", USAGE
        )
    if total % unit:
        below, above = total // unit * unit, (total // unit + 1) * unit
        nearest = f"{below} or {above}" if below else f"{above}"
        pieces = f" x {micro} images (data.micro_batch_size)" if micro else ""
        raise UserError(
            f"data.batch_size: {total} is no multiple of {processes} process(es){pieces}; nearest: {nearest}", USAGE
        )
    share = total // processes
    accelerator.gradient_accumulation_steps = share // (micro or share)
    return share, micro or share
