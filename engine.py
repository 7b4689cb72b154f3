"""The loop: one epoch of training, one pass of validation. Takes what is prepared, gives numbers.

No files, no logging, no globals: whoever calls decides what to show, store and stop.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from metrics import IGNORED, Classification


@dataclass
class Step:
    """One optimizer step. Its figures stay on the device until somebody reads them."""

    loss: Tensor  # mean over this process's share of the batch, in nats
    top1: Tensor  # accuracy on the same share, a fraction
    images: int  # of the whole batch, all processes together
    unapplied: Tensor  # updates left out so far: this one and all since the first loss that was not finite


def train_epoch(
    accelerator: Accelerator,
    model: nn.Module,
    loader,
    transform: Callable[[Tensor], Tensor],
    optimizer: torch.optim.Optimizer,
    metrics: Classification,
    micro_batch_size: int,
    clip_norm: float | None = None,
    mix: Callable | None = None,
) -> Iterator[Step]:
    """Train for one epoch and yield after each optimizer step; afterwards `metrics` has taken in the epoch's rows.

    A batch is this process's share of the global batch. It goes through the model in pieces of `micro_batch_size`
    images whose gradients are accumulated; as the pieces are equal, the mean of their losses is the batch's loss.

    A loss that is not finite, on any process, is noted on the device: neither its update nor any later one is applied,
    so the weights stay what they were, and nobody has to wait for the device to tell. The caller reads
    `Step.unapplied` when it likes, and stops. What fp16's gradient scaler leaves out is not counted: there the loss
    is finite, and only its scaled gradients are not.

    Args:
        model, loader, optimizer: prepared by `accelerator`, whose `gradient_accumulation_steps` is the pieces' number.
        transform: uint8 (B, 3, H, W) to float32, augmented and normalised.
        clip_norm: limit of the gradients' global L2 norm.
        mix: what augment.mixing gives; mixes a piece's images.
    """
    train_mode(model)
    bad = unapplied = torch.zeros((), device=accelerator.device)
    for batch in loader:
        pieces = zip(batch["image"].split(micro_batch_size), batch["label"].split(micro_batch_size), strict=True)
        done = []
        for images, labels in pieces:
            with accelerator.accumulate(model):
                logits, losses = forward(model, transform(images), labels, mix)
                loss = losses.mean()
                bad = accelerator.reduce((~loss.isfinite()).float()).maximum(bad)
                # Once it is bad it stays so, and a gradient that is no number makes fp16's scaler skip the step too.
                accelerator.backward(loss * torch.where(bad > 0, torch.nan, 1.0))
                if clip_norm and accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), clip_norm)
                optimizer.optimizer.found_inf = bad.clamp(max=1)  # torch's fused optimizers leave the step out if 1
                optimizer.step()
                optimizer.zero_grad()
            done.append(metrics.reduce(logits, labels, losses))
        losses, classes, labels = (torch.cat(part) for part in zip(*done, strict=True))
        metrics.add(losses, classes, labels)
        top1 = (classes[:, 0] == labels).float().mean()
        unapplied = unapplied + (bad > 0)
        yield Step(losses.mean(), top1, len(labels) * accelerator.num_processes, unapplied)


def forward(model: nn.Module, images: Tensor, labels: Tensor, mix: Callable | None = None) -> tuple[Tensor, Tensor]:
    """Logits (B, classes) of what the model sees, and the rows' losses (B,): of mixed images that of both labels."""
    if mix is None:
        logits = model(images)
        return logits, row_losses(logits, labels)
    images, others, own = mix(images, labels)
    logits = model(images)
    return logits, own * row_losses(logits, labels) + (1 - own) * row_losses(logits, others)


def row_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of each row (B,), in nats; 0 where the label is IGNORED."""
    return F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="none")


@torch.inference_mode()
def validate(
    accelerator: Accelerator, model: nn.Module, loader, transform: nn.Module, micro_batch_size: int
) -> dict[str, float]:
    """Loss (nats), top-1 and top-5 (fractions) over every row of the loader, each exactly once.

    Batches go through the model in pieces of `micro_batch_size` images, like those of training: what fits there fits.
    `model` is the prepared one: unwrapped copies can hold different batch-norm statistics on different processes.
    """
    model.eval()
    metrics = Classification()
    for batch in loader:
        logits = torch.cat([model(transform(images)) for images in batch["image"].split(micro_batch_size)])
        losses = row_losses(logits, batch["label"])
        # Batch by batch, because the last one is padded so that all processes have equally much.
        metrics.add(*accelerator.gather_for_metrics(metrics.reduce(logits, batch["label"], losses)))
    return metrics.compute()


def train_mode(model: nn.Module) -> None:
    """Training mode for what trains; what is frozen stays in evaluation mode.

    Otherwise `model.train()` lets the batch-norm statistics of frozen layers drift and switches their dropout on.
    """
    model.train()
    for module in model.modules():
        parameters = list(module.parameters())
        if parameters and not any(parameter.requires_grad for parameter in parameters):
            module.eval()


def bare(accelerator: Accelerator, model: nn.Module) -> nn.Module:
    """The model inside what `prepare` put around it: DDP, or torch.compile's module (accelerate's --dynamo_backend)."""
    return accelerator.unwrap_model(model, keep_torch_compile=False)


def unwrap(accelerator: Accelerator, model: nn.Module) -> nn.Module:
    """The bare model, as it was before `prepare` and ready to be prepared afresh; the Accelerator forgets the rest.

    Accelerate puts its autocasting forward on the model itself and marks it as prepared. With the forward gone and the
    mark left, which is what `unwrap_model(keep_fp32_wrapper=False)` does, the next `prepare` would hand the model
    back as it is, and the next phase would silently train in fp32.
    """
    model = bare(accelerator, model)
    for name in ("forward", "_original_forward", "_is_accelerate_prepared"):
        vars(model).pop(name, None)
    accelerator.free_memory()
    return model
