"""Softmax over the class axis, written out for the CPU: MindSpore's own is slow there over axis 1."""

import numpy as np
from mindspore import Tensor, ops

from utils.system import device

on_npu = ops.constexpr(device.on_npu)  # for graphs: known when they are compiled
# The operators themselves: of the functions around them, MindSpore compiles all lines into every graph.
reduce_max = ops.ReduceMax(keep_dims=True)
conv1x1 = ops.Conv2D(1, 1)


def shifted_exp(logits: Tensor) -> tuple[Tensor, Tensor]:
    """exp(logits - max) of logits (N, C, H, W), and that max over C (N, 1, H, W), without a gradient."""
    highest = ops.stop_gradient(reduce_max(logits, 1))
    return ops.exp(logits - highest), highest


def softmax(logits: Tensor) -> Tensor:
    """Class probabilities of logits (N, C, H, W), stable for logits of any size."""
    if on_npu():
        return ops.softmax(logits, 1)
    e, _ = shifted_exp(logits)
    return e / class_sum(e)


def unnormalised_softmax(logits: Tensor) -> Tensor:
    """`softmax` times some number per pixel."""
    return softmax(logits) if on_npu() else shifted_exp(logits)[0]


def log_softmax_at(logits: Tensor, labels: Tensor) -> Tensor:
    """Log-probability of each pixel's label, both (N, 1, H, W); 0 for labels that are no class."""
    if on_npu():  # a gather's gradient is an AI-CPU kernel on a 910A; on the CPU this form is the slower one
        one_hot = (labels == class_axis(logits.shape[1])).astype(logits.dtype)
        return (ops.log_softmax(logits, 1) * one_hot).sum(axis=1, keepdims=True)
    highest_label = logits.shape[1] - 1
    e, highest = shifted_exp(logits)
    at_label = ops.gather_elements(logits, 1, ops.minimum(labels, highest_label))
    log_p = at_label - highest - ops.log(class_sum(e))
    return log_p * (labels <= highest_label).astype(logits.dtype)


def class_sum(x: Tensor) -> Tensor:
    """Sum over the classes: (N, C, H, W) -> (N, 1, H, W)."""
    if on_npu():
        return x.sum(axis=1, keepdims=True)
    return conv1x1(x, ones(x.shape[1]))  # the same in a fifth of the time


@ops.constexpr
def ones(count: int) -> Tensor:
    return Tensor(np.ones((1, count, 1, 1), np.float32))


@ops.constexpr
def class_axis(count: int) -> Tensor:
    """0 to count - 1 as (1, count, 1, 1), to be compared with labels."""
    return Tensor(np.arange(count, dtype=np.int32).reshape(1, count, 1, 1))
