"""Convolutions of small feature maps as matrix products: the same outputs and gradients, on a CPU in less time.

CPU convolutions are made for large maps. The last stages of a ResNet have many weights and, for small images, maps of a
few pixels. There a convolution, above all its backward pass, takes up to five times as long as the equivalent matrix
product. oneDNN, which computes the product, first brings the weights into an order of its own; for weights that do not
change that is done once.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SMALL = 16  # pixels of the largest map; above it products gain nothing


def as_products(model: nn.Module) -> nn.Module:
    """The model, whose convolutions compute small maps as products. Parameters and their names stay the same."""
    for conv in model.modules():
        plain = type(conv) is nn.Conv2d and conv.groups == 1 and conv.dilation == (1, 1)
        if plain and conv.padding_mode == "zeros" and not isinstance(conv.padding, str):
            # Not a bound method: that is a reference cycle. Callers pass the weights: its own, or folded ones.
            conv._conv_forward = partial(_convolve, conv.kernel_size, conv.stride, conv.padding)
    return model


def constant(weight: Tensor) -> Tensor:
    """The weight, marked as one that will never change: its kernels for products are packed, and kept with it."""
    onednn = torch.backends.mkldnn.is_available()
    if onednn and weight.dtype is torch.bfloat16:
        onednn = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if onednn and weight.device.type == "cpu" and weight.dtype in (torch.float32, torch.bfloat16):
        weight.packed = PackedKernels()
    return weight


class PackedKernels(dict):
    """Kernels by the height and width of the maps they were cut out for. A copy starts empty: they can't be copied."""

    def __deepcopy__(self, memo):
        return PackedKernels()


def _convolve(kernel_size, stride, padding, images: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The convolution of maps (B, C, H, W)."""
    (rows, columns), (down, right), (above, left) = images.shape[2:], stride, padding
    if rows * columns <= SMALL:
        # Neither autograd nor torch.compile knows packed kernels.
        packed = None if images.requires_grad or torch.compiler.is_compiling() else getattr(weight, "packed", None)
        if kernel_size == (1, 1) and padding == (0, 0):
            pixels = images[:, :, ::down, ::right].contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1)
            return _product(pixels, weight, bias, packed, images.shape[2:])
        downwards, sideways = rows + 2 * above - kernel_size[0], columns + 2 * left - kernel_size[1]
        if 0 <= downwards < down and 0 <= sideways < right:  # one kernel position, where part of it covers the map
            kernel = weight[:, :, above : above + rows, left : left + columns]
            covered = images[:, :, : kernel.shape[2], : kernel.shape[3]].flatten(1)[:, None, None]
            return _product(covered, kernel, bias, packed, images.shape[2:])
    return F.conv2d(images, weight, bias, stride, padding)


def _product(
    seen: Tensor, kernel: Tensor, bias: Tensor | None, packed: PackedKernels | None, size: torch.Size
) -> Tensor:
    """What a kernel sees at each position (B, H, W, elements) times its weights: maps (B, outputs, H, W)."""
    if packed is None:
        return F.linear(seen, kernel.flatten(1), bias).permute(0, 3, 1, 2)
    if size not in packed:
        packed[size] = torch.ops.mkldnn._reorder_linear_weight(kernel.flatten(1).contiguous(), seen[..., 0].numel())
    seen = seen.to(kernel.dtype)  # autocast does not know these operations either
    return torch.ops.mkldnn._linear_pointwise(seen, packed[size], bias, "none", [], "").permute(0, 3, 1, 2)
