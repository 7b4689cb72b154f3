"""How a run meets its machine: the Accelerator, checks of the launch, each process's share, what a device likes."""

import contextlib
import ctypes
import gc
import os
import platform
import shlex
import shutil
import warnings
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.commands.config.config_args import default_config_file
from accelerate.utils import (
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    is_bf16_available,
    parse_flag_from_env,
)

import smallmaps
from config import Config, Environment
from errors import USAGE, Interrupted, UserError
from folding import PRECISIONS
from processes import cores_per_process, world_size

LAUNCHED = ("processes", "mixed_precision", "device_type")  # what a launch decides, in the recorded environment
SHARDING = ("DEEPSPEED", "FSDP", "MEGATRON_LM")  # asked for by ACCELERATE_USE_* variables


def make_accelerator(config: Config, precision: str | None = None) -> Accelerator:
    """This run's Accelerator. `accelerate launch` sets the devices, the processes and, unless given, the precision.

    Raises:
        UserError: the run would not train as it was asked to.
    """
    _check_launched_as_meant()
    accelerator = Accelerator(
        mixed_precision=precision,
        log_with="wandb" if config.tracking == "wandb" else None,
        kwargs_handlers=[_waiting(config.timeout_minutes)],
        # The loop splits batches into equal pieces itself, so an epoch's end needs no special treatment.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1, sync_with_dataloader=False),
        # A seedable sampler gives the same order again after a restart.
        dataloader_config=DataLoaderConfiguration(
            use_seedable_sampler=True,
            data_seed=config.seed,
        ),
    )
    world = world_size()
    if world != accelerator.num_processes:
        raise UserError(
            f"{world} processes were launched, but each believes that it is alone. {_several(world)}", USAGE
        )
    kind = accelerator.device.type
    if kind == "cpu" and accelerator.mixed_precision == "fp16":
        raise UserError("fp16 does nothing on a CPU; use --mixed_precision bf16, or no", USAGE)
    on_gpu = kind == "cuda"
    # Only to a GPU that waits for them: Apple's may read what has been freed by then.
    accelerator.dataloader_config.non_blocking = on_gpu
    able = {"sync_batch_norm": on_gpu, "tf32": on_gpu and has_tf32()}
    for option, can_be_had in able.items():
        if getattr(config, option) and not can_be_had:
            raise UserError(f"{option}: not available on this device ({kind}); leave it out", USAGE)
    if on_gpu:
        if accelerator.device.index is not None:  # a device from ACCELERATE_TORCH_DEVICE is not yet current
            torch.cuda.set_device(accelerator.device)
        # torch's own default is TF32 in convolutions and not in matrix products.
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = config.tf32
    if kind == "cpu" and os.environ.get("OMP_NUM_THREADS", "1") == "1":
        # accelerate launch sets OMP_NUM_THREADS to 1 where the user did not, which wastes every core but one.
        torch.set_num_threads(cores_per_process())
    # From 1x1 or depthwise convolutions on channels_last images: their gradients' layout differs, their values do not.
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    return accelerator


def _waiting(minutes: float) -> InitProcessGroupKwargs:
    """How long processes wait for each other; the microsecond, as Accelerate drops a value equal to its default."""
    return InitProcessGroupKwargs(timeout=timedelta(minutes=minutes, microseconds=1))


def dispatch(accelerator: Accelerator, streamed: bool) -> None:
    """Choose whether the main process dispatches batches of loaders prepared from now on, or each reads its own."""
    accelerator.dataloader_config.dispatch_batches = streamed or None


def _check_launched_as_meant() -> None:
    """UserError if the launcher was asked for what the loop can't do, or for several processes but started one.

    accelerate launch silently does the latter for `--cpu --num_processes 2` and the like. It then sets the address
    where processes meet, but no world size.
    """
    env = os.environ
    unknown = [name for name in SHARDING if env.get(f"ACCELERATE_USE_{name}", "").lower() in ("true", "1")]
    unknown += [name] if (name := env.get("ACCELERATE_MIXED_PRECISION", "no")) not in PRECISIONS else []
    if unknown:
        raise UserError(
            f"{' and '.join(unknown)}: this loop trains whole models, in fp32, bf16 or fp16. If it is accelerate's "
            "settings on this machine that say so: accelerate launch --config_file accelerate_config.yaml train.py",
            USAGE,
        )
    gpus, here, rank = torch.cuda.device_count(), env.get("LOCAL_WORLD_SIZE", "more"), int(env.get("LOCAL_RANK", "0"))
    if 0 < gpus <= rank and not parse_flag_from_env("ACCELERATE_USE_CPU"):
        raise UserError(
            f"{here} processes were started on a machine with {gpus} GPU(s): --num_processes {gpus} or fewer for each "
            "machine; or ACCELERATE_USE_CPU=true, for processes on the CPU",
            shared=rank > gpus,
        )
    launched, meets = "ACCELERATE_MIXED_PRECISION" in env, "MASTER_ADDR" in env and "MASTER_PORT" in env
    ranked = any(name in env for name in ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"))
    if launched and meets and not ranked:
        raise UserError(
            f"several processes were asked for, but accelerate launch started one. {_several('N')}. (One is meant? "
            "Leave out --num_processes, or unset MASTER_ADDR, which says otherwise.)",
            USAGE,
        )


def _several(processes: int | str) -> str:
    """How to launch that many processes."""
    on_cpu = f"ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes {processes} train.py"
    if not torch.cuda.is_available():
        return f"torch finds no GPU here; on a CPU: {on_cpu} (or torchrun, with the same variable)"
    return f"On GPUs: accelerate launch --multi_gpu --num_processes {processes} train.py; on a CPU: {on_cpu}"


def command(processes: int, precision: str, device_type: str, machines: int = 1) -> str:
    """The command that starts train.py with these processes, precision and device type."""
    words = ["ACCELERATE_USE_CPU=true"] if device_type == "cpu" and processes > 1 else []
    words += ["accelerate launch"]
    # What is not said is taken from the user's own settings, if there are any, or the launcher starts what it can.
    settings = os.path.isfile(default_config_file)
    if device_type == "cpu" and processes == 1 and torch.accelerator.is_available():
        words += ["--cpu --num_processes 1"]  # otherwise as many as there are GPUs, of which it starts one
    elif processes == 1 and (settings or torch.cuda.device_count() > 1):
        words += ["--config_file accelerate_config.yaml"]  # which says one process, and no mixed precision
    if processes > 1:
        words += [f"--multi_gpu --num_processes {processes}"]
    if machines > 1:
        words += [f"--num_machines {machines} --machine_rank RANK --main_process_ip IP --main_process_port PORT"]
    if precision != "no" or settings:
        words += [f"--mixed_precision {precision}"]
    return " ".join([*words, "train.py"])


def resume_hint(accelerator: Accelerator, run: str | Path, push_to_hub: str | None = None) -> str:
    """How to resume this run, launched as it was, and with the upload that was asked for, which is not recorded."""
    processes = accelerator.num_processes
    machines = processes // int(os.environ.get("LOCAL_WORLD_SIZE", processes))
    started = command(processes, accelerator.mixed_precision, accelerator.device.type, machines)
    upload = f" --push_to_hub {push_to_hub}" if push_to_hub else ""
    return f"go on with: {started} --resume {shlex.quote(Path(run).as_posix())}{upload}"


@contextlib.contextmanager
def ended(accelerator: Accelerator):
    """Around work that all processes end together: those that reach its end leave together; failed ones don't wait.

    A process that exits while it holds gloo's connections is sometimes aborted, after all work is done.
    """
    try:
        yield
    except Interrupted:  # raised on all processes, at the same step
        _leave(accelerator)
        raise
    _leave(accelerator)


def _leave(accelerator: Accelerator) -> None:
    gc.collect()  # a phase's wrapped models are reference cycles
    accelerator.wait_for_everyone()
    accelerator.state.destroy_process_group()  # not end_training(), which waits for a tracker that may be gone


def precision_of_training(config: Config) -> str | None:
    """A run's training precision, for commands without a launcher; None if a launcher sets it or it can't be had."""
    recorded = config.environment.mixed_precision if config.environment else "no"
    can_be_had = {"fp16": torch.cuda.is_available(), "bf16": is_bf16_available()}.get(recorded, True)
    return recorded if can_be_had and "ACCELERATE_MIXED_PRECISION" not in os.environ else None


def hint_at_speed(accelerator: Accelerator) -> None:
    """Say so if a GPU, or a faster precision, is there and not used, or bf16 is used without instructions for it."""
    if torch.version.cuda is None and torch.version.hip is None and shutil.which("nvidia-smi"):
        accelerator.print(
            "hint: this machine seems to have an Nvidia GPU, but the installed torch is a CPU build (what pip installs "
            "on Windows): https://pytorch.org/get-started/locally/ says how to get one for the GPU"
        )
    has = has_bf16(accelerator.device)
    # Older GPUs, such as the T4 of free notebooks, have tensor cores for fp16 alone.
    other = "bf16" if has else "fp16" if has_tensor_cores(accelerator.device) else None
    if accelerator.mixed_precision == "no" and other:
        accelerator.print(
            f"hint: this machine also computes in {other}, usually faster: "
            f"accelerate launch --mixed_precision {other} ..."
        )
    if accelerator.mixed_precision == "bf16" and has is False:
        accelerator.print(
            f"warning: this {accelerator.device.type.upper()} has no instructions for bf16 and emulates it, many times "
            "slower than --mixed_precision no"
        )


def hint_at_launch(accelerator: Accelerator, recorded: Environment | None) -> None:
    """Say so if a run's config.yaml is trained again, but launched differently."""
    if recorded is None:
        return
    now = environment(accelerator)
    if any(getattr(recorded, name) != getattr(now, name) for name in LAUNCHED):
        started = command(recorded.processes, recorded.mixed_precision, recorded.device_type)
        accelerator.print(f"hint: the run that this configuration comes from was started with {started}")


def suited(model: torch.nn.Module, device: torch.device) -> torch.nn.Module:
    """The model in the form the device trains fastest, on images in `augment.layout`.

    With CUDA weights are channels_last, too. On a CPU convolutions take either layout, but fused optimizers copy
    weights not in the default one; and convolutions of small maps become matrix products.
    """
    if device.type == "cuda":
        return model.to(memory_format=torch.channels_last)
    return smallmaps.as_products(model) if device.type == "cpu" else model


def has_bf16(device: torch.device) -> bool | None:
    """Whether a device has instructions for bf16; None where torch can't tell."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    able = torch.cpu.get_capabilities() if device.type == "cpu" and hasattr(torch.cpu, "get_capabilities") else {}
    names = [name for name in ("avx512_bf16", "amx_bf16") if name in able]
    return any(able[name] for name in names) if names else None


def has_tensor_cores(device: torch.device) -> bool:
    """Whether it is an Nvidia GPU that computes in fp16 much faster than in fp32."""
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (7, 0)


def has_tf32() -> bool:
    """Whether there is a GPU that computes in TF32."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)


def tune_allocator(device: torch.device) -> None:
    """On a CPU: let glibc's allocator keep freed memory, since the next step needs it again.

    Otherwise each step's activations go back to the kernel and are fetched anew, page by page. Not for trial steps:
    memory kept from one that was too large would be missing in the next. Nor where a batch goes through the model in
    parts, as memory may be short: what is kept lies in pieces.
    """
    if device.type == "cpu" and platform.libc_ver()[0] == "glibc":
        trim_threshold, mmap_max = -1, -4  # glibc's malloc.h
        libc = ctypes.CDLL(None)
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, 2**31 - 1)


def environment(accelerator: Accelerator) -> Environment:
    """The environment as config.yaml records it."""
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
    """Compare a resumed run's environment with the one it started in; return the differences it survives.

    Raises:
        UserError: the number of processes, precision or device type changed: random states would not fit.
    """
    if recorded is None:
        return []
    now = environment(accelerator)
    for name in LAUNCHED:
        before, after = getattr(recorded, name), getattr(now, name)
        if before != after:
            started = command(recorded.processes, recorded.mixed_precision, recorded.device_type)
            raise UserError(
                f"--resume: the run was started with {name} {before}, not {after}: {started} --resume ...", USAGE
            )
    before, after = recorded.versions | {"device": recorded.device}, now.versions | {"device": now.device}
    return [
        f"{name} is {after[name]}, not {before[name]}: the rest of the run may differ in the last digits"
        for name in after
        if before.get(name) != after[name]
    ]


def describe_batch(config: Config, accelerator: Accelerator, micro_batch_size: int, rows: int | None) -> str:
    """How a step's images are divided, and the steps per epoch.

    Args:
        rows: training rows; None if unknown.
    """
    total, processes = config.data.batch_size, accelerator.num_processes
    share = total // processes
    passes = share // micro_batch_size
    parts = [f"{total} images a step on {processes} process{'es' if processes > 1 else ''} ({accelerator.device.type})"]
    if processes > 1:
        parts.append(f"{share} on each")
    if passes > 1:
        parts.append(f"in {passes} forward passes of {micro_batch_size}")
    steps = "how many steps an epoch, a stream tells at its end" if rows is None else f"{rows // total} steps an epoch"
    return f"{', '.join(parts)}; {steps}"


def peak_memory(accelerator: Accelerator) -> dict[str, int]:
    """`peak_memory_mb`: the most GPU memory this process's tensors have held so far; empty on a CPU."""
    if accelerator.device.type != "cuda":
        return {}
    return {"peak_memory_mb": torch.cuda.max_memory_allocated() // 2**20}


def own_generators(*loaders) -> None:
    """Give each prepared loader its own generator to draw its workers' seeds from.

    Otherwise each pass over a loader would advance the random state that augmentation and dropout use, and a run
    resumed in mid-epoch would differ from an uninterrupted one. Set after `prepare`, which would drop it.
    """
    for loader in loaders:
        if loader is not None:
            loader.base_dataloader.generator = torch.Generator()


def share_of_batch(config: Config, accelerator: Accelerator) -> tuple[int, int]:
    """Images per process and step, and per forward pass (the whole share at first if micro_batch_size is 'auto').

    Raises:
        UserError: the batch can't be divided equally; the message names the nearest sizes that can.
    """
    total, processes = config.data.batch_size, accelerator.num_processes
    micro = None if config.data.micro_batch_size == "auto" else config.data.micro_batch_size
    if micro and micro * processes > total:
        raise UserError(
            f"data.micro_batch_size: {micro} on {processes} process(es) is more than data.batch_size {total}", USAGE
        )
    share = total // processes
    if total % processes:
        nearest = f"{share * processes} or {(share + 1) * processes}" if share else processes
        raise UserError(
            f"data.batch_size: {total} images can't be divided equally among {processes} processes; nearest: {nearest}",
            USAGE,
        )
    if micro and share % micro:
        divisors = [part for part in range(1, share + 1) if share % part == 0]
        below, above = max(part for part in divisors if part < micro), min(part for part in divisors if part > micro)
        raise UserError(
            f"data.micro_batch_size: {micro} does not divide the {share} images of each process; nearest: {below} or "
            f"{above}",
            USAGE,
        )
    return share, micro or share
