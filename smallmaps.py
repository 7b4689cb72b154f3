"""Convolutions of small feature maps as matrix products: the same outputs and gradients, on a CPU in less time.

CPU convolutions are made for large maps. The last stages of a ResNet have many weights and, for small images, maps of a
few pixels. There a convolution, above all its backward pass, takes up to five times as long as the equivalent matrix
product.
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


def _convolve(kernel_size, stride, padding, images: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The convolution of maps (B, C, H, W)."""
    (rows, columns), (down, right), (above, left) = images.shape[2:], stride, padding
    if rows * columns <= SMALL:
        if kernel_size == (1, 1) and padding == (0, 0):
            pixels = images[:, :, ::down, ::right].contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1)
            return F.linear(pixels, weight.flatten(1), bias).permute(0, 3, 1, 2)
        downwards, sideways = rows + 2 * above - kernel_size[0], columns + 2 * left - kernel_size[1]
        if 0 <= downwards < down and 0 <= sideways < right:  # one kernel position, where part of it covers the map
            kernel = weight[:, :, above : above + rows, left : left + columns]
            met = images[:, :, : kernel.shape[2], : kernel.shape[3]]
            return F.linear(met.flatten(1), kernel.flatten(1), bias)[:, :, None, None]
    return F.conv2d(images, weight, bias, stride, padding)
