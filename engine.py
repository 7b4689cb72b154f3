"""The loop: one epoch of training, one pass of validation. Prepared objects in, numbers out.

No files, no logging, no globals: callers decide what to show and store, and when to stop.
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
    """One optimizer step. Its tensors stay on the device until somebody reads them."""

    loss: Tensor  # mean over this process's share of the batch, in nats
    top1: Tensor  # accuracy on the same share, a fraction
    images: int  # in the whole batch, over all processes
    unapplied: Tensor  # updates skipped so far: all since the first non-finite loss, this one included


def train_epoch(
    accelerator: Accelerator,
    model: nn.Module,
    loader,
    augmentation: Callable[[Tensor], Tensor],
    optimizer: torch.optim.Optimizer,
    metrics: Classification,
    micro_batch_size: int,
    clip_norm: float | None = None,
    mix: Callable | None = None,
) -> Iterator[Step]:
    """Train for one epoch, yielding after each optimizer step, and add the epoch's rows to `metrics`.

    A batch is this process's share of the global batch. It goes through the model in micro-batches of
    `micro_batch_size` images, accumulating gradients; as these are equal, the mean of their losses is the batch's.

    A non-finite loss on any process sets a flag on the device: its update and all later ones are skipped, so the
    weights keep their values, and the CPU need not wait for the device to find out. The caller reads
    `Step.unapplied` when it likes, and stops. Updates skipped by fp16's gradient scaler are not counted: there the
    loss is finite, and only the scaled gradients are not.

    Args:
        model, loader, optimizer: prepared by `accelerator`; its `gradient_accumulation_steps` counts the micro-batches.
        augmentation: uint8 (B, 3, H, W) to float32, augmented and normalised.
        clip_norm: limit on the gradients' global L2 norm.
        mix: from augment.mixing; mixes the images of one micro-batch.
    """
    train_mode(model)
    bad = unapplied = torch.zeros((), device=accelerator.device)
    for batch in loader:
        micro_batches = zip(batch["image"].split(micro_batch_size), batch["label"].split(micro_batch_size), strict=True)
        parts = []
        for images, labels in micro_batches:
            with accelerator.accumulate(model):
                logits, losses = forward(model, augmentation(images), labels, mix)
                loss = losses.mean()
                bad = accelerator.reduce((~loss.isfinite()).float(), "max").maximum(bad)  # 0 or 1, on all processes
                # Once bad it stays bad, and NaN gradients make fp16's scaler skip the step, too.
                accelerator.backward(loss * torch.where(bad > 0, torch.nan, 1.0))
                if clip_norm and accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), clip_norm)
                optimizer.optimizer.found_inf = bad  # 1 makes torch's fused optimizers skip the step
                optimizer.step()
                optimizer.zero_grad()
            parts.append(metrics.reduce(logits, labels, losses))
        losses, classes, labels = (torch.cat(part) for part in zip(*parts, strict=True))
        metrics.add(losses, classes, labels)
        top1 = (classes[:, 0] == labels).float().mean()
        unapplied = unapplied + bad
        yield Step(losses.mean(), top1, len(labels) * accelerator.num_processes, unapplied)


def forward(model: nn.Module, images: Tensor, labels: Tensor, mix: Callable | None = None) -> tuple[Tensor, Tensor]:
    """Logits (B, classes) and row losses (B,); `mix` mixes the images first; the loss then weights both labels."""
    if mix is None:
        logits = model(images)
        return logits, row_losses(logits, labels)
    images, partners, lam = mix(images, labels)
    logits = model(images)
    return logits, lam * row_losses(logits, labels) + (1 - lam) * row_losses(logits, partners)


def row_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of each row (B,), in nats; 0 where the label is IGNORED."""
    return F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="none")


@torch.inference_mode()
def validate(
    accelerator: Accelerator, model: nn.Module, loader, transform: nn.Module, micro_batch_size: int
) -> dict[str, float]:
    """Loss (nats), top-1 and top-5 (fractions) over every row of the loader, each exactly once.

    Batches go through the model in micro-batches, as in training: what fits there fits here.
    `model` must be prepared, or just loaded from one file: otherwise it can hold different batch-norm statistics on
    different processes.
    """
    model.eval()
    metrics = Classification()
    for batch in loader:
        logits = torch.cat([model(transform(images)) for images in batch["image"].split(micro_batch_size)])
        losses = row_losses(logits, batch["label"])
        # Gathering per batch drops the rows that pad the last one to the same size everywhere.
        metrics.add(*accelerator.gather_for_metrics(metrics.reduce(logits, batch["label"], losses)))
    return metrics.compute()


def train_mode(model: nn.Module) -> None:
    """Training mode for trainable modules; frozen ones stay in evaluation mode.

    `model.train()` alone would let frozen layers' batch-norm statistics drift and switch on their dropout.
    """
    model.train()
    for module in model.modules():
        parameters = list(module.parameters())
        if parameters and not any(parameter.requires_grad for parameter in parameters):
            module.eval()


def bare(accelerator: Accelerator, model: nn.Module) -> nn.Module:
    """The model without `prepare`'s wrappers: DDP, or torch.compile's module (accelerate's --dynamo_backend)."""
    return accelerator.unwrap_model(model, keep_torch_compile=False)


def unwrap(accelerator: Accelerator, model: nn.Module) -> nn.Module:
    """The bare model as it was before `prepare`, ready to be prepared again; the Accelerator forgets the rest.

    Accelerate sets its autocasting forward on the model itself and marks the model as prepared.
    `unwrap_model(keep_fp32_wrapper=False)` would remove the forward but leave the mark: the next `prepare` would
    return the model unchanged, and the next phase would silently train in fp32.
    """
    model = bare(accelerator, model)
    for name in ("forward", "_original_forward", "_is_accelerate_prepared"):
        vars(model).pop(name, None)
    accelerator.free_memory()
    return model
