"""Discriminator D of CLAN, which tells from which domain a map of class probabilities comes."""

from itertools import pairwise

import mindspore
from mindspore import Tensor, mint, nn, ops

from dataset.classes import NUM_CLASSES
from utils.system.device import on_npu


def leaky_relu(x: Tensor) -> Tensor:
    """Return max(x, 0.2 x)."""
    return ops.maximum(x, 0.2 * x)


def leaky_relu_npu(x: Tensor) -> Tensor:
    """Return the same by an operator that neither the CPU nor --jit-level O2 has: 2 kernels instead of 13."""
    return mint.nn.functional.leaky_relu(x, 0.2)


class FCDiscriminator(nn.Cell):
    """Map probabilities (N, num_classes, H, W) to one logit per 32x32 cell, (N, 1, H // 32, W // 32).

    Low logits mean source. Five 4x4 convolutions of stride 2 with bias, leaky ReLU 0.2 between them.
    MindSpore's initial values of nn.Conv2d match the reference's: U(+-1/sqrt(fan_in)) for weights and biases.
    """

    def __init__(self, num_classes: int = NUM_CLASSES, ndf: int = 64):
        super().__init__()
        channels = (num_classes, ndf, 2 * ndf, 4 * ndf, 8 * ndf, 1)
        self.conv1, self.conv2, self.conv3, self.conv4, self.classifier = (
            nn.Conv2d(c_in, c_out, 4, 2, pad_mode="pad", padding=1, has_bias=True)
            for c_in, c_out in pairwise(channels))
        per_operator = on_npu() and mindspore.get_context("jit_level") != "O2"
        self.leaky_relu = leaky_relu_npu if per_operator else leaky_relu

    def construct(self, x: Tensor) -> Tensor:
        for layer in (self.conv1, self.conv2, self.conv3, self.conv4):
            x = self.leaky_relu(layer(x))
        return self.classifier(x)


def discriminator(model: str) -> FCDiscriminator:
    """Return the paper's D (ndf 64, 2.78 M parameters), or a narrow one for the demo's `small` G."""
    return FCDiscriminator(ndf=16 if model == "small" else 64)
