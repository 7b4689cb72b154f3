"""CUDA graphs: record a step's work once and replay it, instead of launching it from Python kernel by kernel.

On small images a GPU finishes a kernel before Python has launched the next one, and mostly waits. A recorded sequence
of kernels is launched as one. It computes the same as the kernels, and draws new random numbers each time.
"""

from collections.abc import Callable

import torch
from accelerate import Accelerator
from accelerate.utils import DynamoBackend
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import engine
import faults
from errors import UserError, first_line


class Replayed:
    """A function of a batch of images on a GPU, recorded on its first call.

    Batches of another shape go through the function itself. The next call overwrites the tensor returned.
    """

    def __init__(self, function: Callable[[Tensor], Tensor]):
        self.function = function
        self.graph = self.given = self.made = None

    def __call__(self, images: Tensor) -> Tensor:
        if self.graph is None:
            self._record(images)
        if images.shape != self.given.shape:
            return self.function(images)
        self.given.copy_(images, non_blocking=True)
        self.graph.replay()
        return self.made

    @torch.no_grad()
    def _record(self, images: Tensor) -> None:
        random_state = torch.cuda.get_rng_state(images.device)
        self.given, aside = images.clone(), torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(3):  # the libraries' initial setup must not be recorded
                self.function(self.given)
        torch.cuda.current_stream().wait_stream(aside)
        self.graph = torch.cuda.CUDAGraph()
        # thread_local lets other threads go on pinning the loader's batches.
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
            self.made = self.function(self.given)
        torch.cuda.set_rng_state(random_state, images.device)  # as if nothing had been drawn


def record(accelerator: Accelerator, model: nn.Module, shape: tuple[int, ...]) -> bool:
    """Record the forward and backward pass of a prepared model in training mode, until `engine.unwrap`.

    Weights, buffers and random state stay as they were. Nothing is recorded without CUDA; with DDP, which hooks into
    the backward pass; with gradient accumulation, as a replay overwrites the last gradients; or with torch.compile.

    Args:
        shape: (B, 3, H, W) of all training batches.

    Returns:
        Whether it was recorded.

    Raises:
        UserError: it can't be recorded, mostly because a step needs some value on the CPU midway.
        RuntimeError: out of memory.
    """
    if (
        accelerator.device.type != "cuda"
        or isinstance(model, DistributedDataParallel)
        or accelerator.gradient_accumulation_steps > 1
        or accelerator.state.dynamo_plugin.backend != DynamoBackend.NO
    ):
        return False
    random_state = torch.cuda.get_rng_state(accelerator.device)
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    engine.train_mode(model)
    images = torch.zeros(shape, device=accelerator.device).contiguous(memory_format=torch.channels_last)
    # Gradients accumulate on the recording stream, which torch warns about and waits for in each step.
    torch.autograd.graph.set_warn_on_accumulate_grad_stream_mismatch(False)
    try:
        torch.cuda.make_graphed_callables(model, (images,), allow_unused_input=True)
    except (RuntimeError, AssertionError) as error:  # a failed recording leaves random numbers unusable
        if any(it is not None and faults.out_of_memory(it) for it in (error, error.__context__)):
            raise
        raise UserError(
            f"this model's steps can't be recorded as CUDA graphs ({first_line(error)}); without them: --cuda_graphs "
            "false, after --resume, too"
        ) from error
    # What frozen modules keep for later calls was recorded, too, and some drop it when they change mode: LeViT's
    # attention, for one. Replays would read freed memory.
    model.forward.kept = [dict(vars(module)) for module in model.modules()]
    for name, buffer in model.named_buffers():
        buffer.copy_(buffers[name])
    torch.cuda.set_rng_state(random_state, accelerator.device)
    return True
