"""Convolutions of small feature maps as matrix products: the same outputs and gradients, on a CPU in less time.

CPU convolutions are made for large maps. The last stages of a ResNet have many weights and, for small images, maps of a
few pixels. There a convolution, above all its backward pass, takes up to five times as long as the equivalent matrix
product.

In bf16 oneDNN computes the product, and first brings the weights into an order of its own. For weights that never
change that is done once: their kernels are packed.
"""

import platform
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SMALL = 16  # pixels of the largest map; above it products gain nothing
# Not part of torch's public interface.
OPERATIONS = ("_is_mkldnn_bf16_supported", "_reorder_linear_weight", "_linear_pointwise")


def as_products(model: nn.Module) -> nn.Module:
    """The model, whose convolutions compute small maps as products. Parameters and their names stay the same."""
    for conv in model.modules():
        plain = type(conv) is nn.Conv2d and conv.groups == 1 and conv.dilation == (1, 1)
        if plain and conv.padding_mode == "zeros" and not isinstance(conv.padding, str):
            # Not a bound method: that is a reference cycle. Callers pass the weights: its own, or folded ones.
            conv._conv_forward = partial(_convolve, conv.kernel_size, conv.stride, conv.padding)
    return model


def mark_constant(weight: Tensor) -> Tensor:
    """Mark, in place, a detached weight that never changes: its kernels for products are packed, where that helps."""
    if _packable(weight):
        weight.packed = PackedKernels()
    return weight


def _packable(weight: Tensor) -> bool:
    """Whether packing pays: measured on x86 alone. On ARM, packed bf16 was reported as slow (pytorch issue 180447)."""
    return (
        weight.device.type == "cpu"
        and weight.dtype is torch.bfloat16
        and platform.machine() in ("x86_64", "AMD64")
        and torch.backends.mkldnn.is_available()
        and all(hasattr(torch.ops.mkldnn, name) for name in OPERATIONS)
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


class PackedKernels(dict):
    """A weight's packed kernels, by their height and width. They can't be copied or pickled: a copy starts empty."""

    def __reduce__(self):
        return PackedKernels, ()


def _convolve(kernel_size, stride, padding, images: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The convolution of maps (B, C, H, W)."""
    (height, width), (stride_y, stride_x), (pad_y, pad_x) = images.shape[2:], stride, padding
    if height * width <= SMALL:
        # Packed products have no gradients, and torch.compile takes only kernels that it packed itself.
        packed = None if images.requires_grad or torch.compiler.is_compiling() else getattr(weight, "packed", None)
        if kernel_size == (1, 1) and padding == (0, 0):
            pixels = images[:, :, ::stride_y, ::stride_x].contiguous(memory_format=torch.channels_last)
            return _product(pixels.permute(0, 2, 3, 1), weight, bias, packed)
        room_y, room_x = height + 2 * pad_y - kernel_size[0], width + 2 * pad_x - kernel_size[1]
        if 0 <= room_y < stride_y and 0 <= room_x < stride_x:  # one kernel position, where part of it covers the map
            kernel = weight[:, :, pad_y : pad_y + height, pad_x : pad_x + width]
            covered = images[:, :, : kernel.shape[2], : kernel.shape[3]].flatten(1)[:, None, None]
            return _product(covered, kernel, bias, packed)
    return F.conv2d(images, weight, bias, stride, padding)


def _product(patches: Tensor, kernel: Tensor, bias: Tensor | None, packed: PackedKernels | None) -> Tensor:
    """What the kernel covers at each position (B, H, W, elements) times the kernel: maps (B, outputs, H, W)."""
    if packed is None:
        return F.linear(patches, kernel.flatten(1), bias).permute(0, 3, 1, 2)
    size = kernel.shape[2:]
    if size not in packed:
        packed[size] = torch.ops.mkldnn._reorder_linear_weight(kernel.flatten(1).contiguous(), patches[..., 0].numel())
    patches = patches.to(kernel.dtype)  # autocast does not know this operation
    return torch.ops.mkldnn._linear_pointwise(patches, packed[size], bias, "none", [], "").permute(0, 3, 1, 2)
