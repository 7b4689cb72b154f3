"""The Accelerator, and what to check about how we were launched before anything is trained on it."""

import contextlib
import ctypes
import os
import platform

import torch
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.utils import GradientAccumulationPlugin, broadcast_object_list, gather_object, is_bf16_available

import loading
from config import Config, Environment
from errors import USAGE, UserError


def make_accelerator(config: Config, precision: str | None = None) -> Accelerator:
    """The Accelerator of this run: devices and processes, and precision if not given, are as `accelerate launch` says.

    Raises:
        UserError: a launch that would train something else than it says.
    """
    streams = False
    with contextlib.suppress(UserError):  # a source that is not there is told when it is opened, if it is
        streams = config.data.streams
    accelerator = Accelerator(
        mixed_precision=precision,
        log_with="wandb" if config.tracking == "wandb" else None,
        # The loop cuts each batch into equal pieces itself, so an epoch's end needs no special treatment.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1, sync_with_dataloader=False),
        # A seedable sampler gives the same order again after a restart.
        dataloader_config=DataLoaderConfiguration(
            use_seedable_sampler=True,
            data_seed=config.seed,
            non_blocking=True,
            dispatch_batches=streams or None,  # what the main process reads, it hands to the others
        ),
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
        torch.set_num_threads(loading.cores_per_process())
    if accelerator.device.type == "cpu":
        _keep_memory()
    return accelerator


def precision_of_training(config: Config) -> str | None:
    """The precision that a run was trained in, for a command started without a launcher; None if one has its say."""
    recorded = config.environment.mixed_precision if config.environment else "no"
    can_be_had = {"fp16": torch.cuda.is_available(), "bf16": is_bf16_available()}.get(recorded, True)
    return recorded if can_be_had and "ACCELERATE_MIXED_PRECISION" not in os.environ else None


def precision_option(accelerator: Accelerator) -> str:
    """What `accelerate launch` has to be told besides for the same precision, with a space behind it."""
    return "" if accelerator.mixed_precision == "no" else f"--mixed_precision {accelerator.mixed_precision} "


def hint_at_bf16(accelerator: Accelerator) -> None:
    """Say so if bf16 is left unused by a device that has instructions for it."""
    if accelerator.mixed_precision == "no" and _has_bf16(accelerator.device):
        accelerator.print(
            "hint: this machine computes in bf16, too, mostly faster: accelerate launch --mixed_precision bf16 ..."
        )


def in_its_layout(model: torch.nn.Module, device: torch.device) -> torch.nn.Module:
    """The model with its weights in the layout that trains fastest on images in channels_last.

    On a GPU that is channels_last too. A CPU's convolutions take either, and its fused optimizers copy weights of any
    layout but the default one.
    """
    return model.to(memory_format=torch.channels_last) if device.type == "cuda" else model


def _has_bf16(device: torch.device) -> bool:
    """Whether a device has instructions for bf16; where torch can't tell, False."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    able = torch.cpu.get_capabilities() if device.type == "cpu" and hasattr(torch.cpu, "get_capabilities") else {}
    return any(able.get(name) for name in ("avx512_bf16", "amx_bf16"))


def _keep_memory() -> None:
    """Let glibc's allocator keep what is freed, as it will be wanted again in the next step.

    Otherwise each step's activations are given back to the kernel and fetched anew, page by page.
    """
    if platform.libc_ver()[0] == "glibc":
        trim_threshold, mmap_max = -1, -4  # glibc's malloc.h
        libc = ctypes.CDLL(None)
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, 2**31 - 1)


@contextlib.contextmanager
def together(accelerator: Accelerator):
    """Around work that one process does or may fail at: a `UserError` in one of them is raised in all.

    Nothing inside may wait for the other processes.
    """
    error = None
    try:
        yield
    except UserError as raised:
        error = raised
    failed = next((one for one in gather_object([error]) if one), None)
    if failed:
        raise UserError(str(failed), failed.exit_code, shared=True) from error


def agreed(accelerator: Accelerator, value):
    """The largest of all processes' values, on every process. Waits for them, so not for each step."""
    return value if accelerator.num_processes == 1 else max(gather_object([value]))


def from_main(accelerator: Accelerator, value):
    """The main process's value, on every process."""
    return broadcast_object_list([value])[0]


def environment(accelerator: Accelerator) -> Environment:
    """What config.yaml records of the surroundings."""
    from importlib.metadata import version

    names = ("torch", "timm", "accelerate", "datasets")
    on_gpu = accelerator.device.type == "cuda"
    return Environment(
        mixed_precision=accelerator.mixed_precision,
        processes=accelerator.num_processes,
        device_type=accelerator.device.type,
        device=torch.cuda.get_device_name() if on_gpu else platform.machine(),
        versions={"python": platform.python_version()} | {name: version(name) for name in names},
    )


def check_same(recorded: Environment | None, accelerator: Accelerator) -> list[str]:
    """Compare the surroundings of a resumed run with those it was started in; the differences that it survives.

    Raises:
        UserError: other processes, another precision or kind of device: the random states would not fit.
    """
    if recorded is None:
        return []
    now = environment(accelerator)
    for name in ("processes", "mixed_precision", "device_type"):
        before, after = getattr(recorded, name), getattr(now, name)
        if before != after:
            way_on = f"; accelerate launch --mixed_precision {before} ..." if name == "mixed_precision" else ""
            raise UserError(f"--resume: the run was started with {name} {before}, not {after}{way_on}", USAGE)
    before, after = recorded.versions | {"device": recorded.device}, now.versions | {"device": now.device}
    return [
        f"{name} is {after[name]}, not {before[name]}: the rest of the run may differ in the last digits"
        for name in after
        if before.get(name) != after[name]
    ]


def peak_memory(accelerator: Accelerator) -> dict[str, int]:
    """`peak_memory_mb`, the most that this process's tensors have held of a GPU so far; nothing on a CPU."""
    if accelerator.device.type != "cuda":
        return {}
    return {"peak_memory_mb": torch.cuda.max_memory_allocated() // 2**20}


def own_generators(*loaders) -> None:
    """Let prepared loaders draw their workers' seeds from a generator of their own.

    Otherwise each pass over a loader would move the random state that augmentation and dropout draw from, and a run
    resumed in mid-epoch would not be the uninterrupted one. Set on prepared loaders, as Accelerate drops it on the way.
    """
    for loader in loaders:
        loader.base_dataloader.generator = torch.Generator()


def share_of_batch(config: Config, accelerator: Accelerator) -> tuple[int, int]:
    """Images per process and step, and per forward pass (with micro_batch_size 'auto': the whole share, to begin with).

    Raises:
        UserError: the global batch can't be shared out equally; the nearest sizes that can are named.
    """
    total, processes = config.data.batch_size, accelerator.num_processes
    micro = None if config.data.micro_batch_size == "auto" else config.data.micro_batch_size
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
    return total // processes, micro or total // processes
