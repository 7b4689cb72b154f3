"""Fold batch norms into the frozen convolutions before them: the same outputs for less work.

A batch norm in evaluation mode is a linear map of each channel, so the convolution before it can absorb it. The folded
weights are copies, in the precision that the convolutions compute in, used until `unfold`; parameters, buffers and
their names stay the same, so checkpoints are not affected.
"""

import torch
from timm.layers import BatchNormAct2d, SyncBatchNormAct
from torch import Tensor, nn
from torch.nn.utils import fuse_conv_bn_weights

import smallmaps
from augment import layout

PRECISIONS = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm, BatchNormAct2d, SyncBatchNormAct)
SAME = 1e-2  # relative difference of features: rounding (a GPU's TF32 included) stays below, a wrong fold does not


class _FoldedConv:
    """The forward of a convolution with its batch norm folded in."""

    def __init__(self, conv: nn.Conv2d, norm: nn.BatchNorm2d):
        self.conv = conv
        self.weight, self.bias = (
            part.detach()
            for part in fuse_conv_bn_weights(
                conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
            )
        )

    def __call__(self, images: Tensor) -> Tensor:
        return self.conv._conv_forward(images, self.weight, self.bias)


class _FoldedNorm:
    """The forward of a batch norm that was folded; timm's dropout and activation remain."""

    def __init__(self, norm: nn.BatchNorm2d):
        self.rest = (norm.drop, norm.act) if isinstance(norm, (BatchNormAct2d, SyncBatchNormAct)) else ()

    def __call__(self, images: Tensor) -> Tensor:
        for module in self.rest:
            images = module(images)
        return images


@torch.no_grad()
def fold(model: nn.Module, size: tuple[int, int], mixed_precision: str) -> int:
    """Fold each frozen batch norm into the frozen convolution it follows; `unfold` undoes it.

    A forward pass of two noise images shows which follows which. If folding changes the model's features, because some
    convolution's output is used elsewhere too, it is undone.

    Args:
        model: an unwrapped timm-style model, with weights loaded, and frozen except for what the phase trains. Left in
            evaluation mode.
        size: height and width in pixels of the model's input.
        mixed_precision: Accelerate's name for it: no, bf16 or fp16.

    Returns:
        The number of convolutions with a batch norm folded in.
    """
    model.eval()
    frozen = [module for module in model.modules() if all(not p.requires_grad for p in module.parameters())]
    convs = [module for module in frozen if type(module) is nn.Conv2d]
    # Not those without parameters: in a module that trains they use the batch's statistics.
    norms = [module for module in frozen if type(module) in NORMS and module.affine and module.track_running_stats]
    if not convs or not norms:
        return 0
    device = next(model.parameters()).device
    images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0)).to(device)

    made_by, pairs = {}, []  # made_by keeps the outputs alive, too, so that their ids stay unique
    hooks = [conv.register_forward_hook(lambda conv, _, out: made_by.update({id(out): (conv, out)})) for conv in convs]
    hooks += [
        norm.register_forward_pre_hook(lambda norm, given: pairs.append((made_by.get(id(given[0])), norm)))
        for norm in norms
    ]
    features = _features(model, images)
    for hook in hooks:
        hook.remove()
    pairs = {made[0]: norm for made, norm in pairs if made}

    for conv, norm in pairs.items():
        conv.forward, norm.forward = _FoldedConv(conv, norm), _FoldedNorm(norm)
    difference = (_features(model, images) - features).norm()
    if not difference <= SAME * features.norm():
        unfold(model)
        return 0
    for conv in pairs:
        folded, dtype = conv.forward, PRECISIONS[mixed_precision]
        folded.weight = smallmaps.mark_constant(folded.weight.to(dtype, memory_format=layout(device)))
        folded.bias = folded.bias.to(dtype)
    return len(pairs)


def unfold(model: nn.Module) -> None:
    """Restore the own forwards of an unwrapped model's modules."""
    for module in model.modules():
        if isinstance(vars(module).get("forward"), (_FoldedConv, _FoldedNorm)):
            del module.forward


def _features(model: nn.Module, images: Tensor) -> Tensor:
    """What the classifier sees (B, features): behind the last batch norm, and one tensor in all of timm's models."""
    with torch.autocast(images.device.type, enabled=False):
        return model.forward_head(model.forward_features(images), pre_logits=True)
