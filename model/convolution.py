"""Convolutions with memory-efficient gradients for the CPU.

oneDNN computes the gradients of a convolution through a matrix of kernel x kernel copies of its input, and in
a graph every convolution keeps its own matrix: a step at 1280x720 + 1024x512 exceeds 24 GB, one at 320x180 +
256x128 takes 4.7 GB. Written as matrix products, the same gradients use MindSpore's memory pool, which serves
one convolution after the other: 11.7 and 2.3 GB.
"""

from functools import cache

import mindspore
import numpy as np
from mindspore import nn, ops


def use_low_memory_grad(*nets: nn.Cell) -> None:
    """Give all convolutions larger than 1x1 the gradients of this module; the forward pass stays."""
    for net in nets:
        for _, cell in list(net.cells_and_names()):
            if isinstance(cell, nn.Conv2d) and max(cell.kernel_size) > 1:
                del cell.conv2d
                kernel, stride, dilation = cell.kernel_size[0], cell.stride[0], cell.dilation[0]
                cell.conv2d = low_memory_convolution(kernel, stride, cell.padding, dilation)
            if isinstance(cell, nn.CellList):
                for i, part in enumerate(cell):
                    if type(part) is Convolution:
                        kind = part.kernel, part.stride, part.padding, part.dilation
                        cell[i] = low_memory_convolution(*kind)


@cache
def low_memory_convolution(kernel: int, stride: int, padding: int, dilation: int) -> nn.Cell:
    """Return one shared cell for all convolutions of a kind, as MindSpore compiles every object anew."""
    keeps_size = stride == 1 and 2 * padding == dilation * (kernel - 1)
    return (SameSize if keeps_size else Unfolded)(kernel, stride, padding, dilation)


class Convolution(nn.Cell):
    """Convolve x (N, C, H, W) with weight (K, C, kernel, kernel); MindSpore's own gradients."""

    def __init__(self, kernel: int, stride: int, padding: int, dilation: int):
        super().__init__(auto_prefix=False)
        self.kernel, self.stride, self.padding, self.dilation = kernel, stride, padding, dilation

    def construct(self, x, weight):
        return ops.conv2d(x, weight, None, self.stride, "pad", self.padding, self.dilation)


class Unfolded(Convolution):
    """The gradients are matrix products with the unfolded x, (N, C kernel^2, H' W')."""

    def __init__(self, kernel: int, stride: int, padding: int, dilation: int):
        super().__init__(kernel, stride, padding, dilation)
        self.unfold = ops.operations.array_ops.Im2Col(kernel, stride, dilation, padding)
        self.fold = ops.operations.array_ops.Col2Im([kernel] * 2, [dilation] * 2, [padding] * 2, [stride] * 2)
        self.product_bt = ops.BatchMatMul(transpose_b=True)
        self.product_at = ops.BatchMatMul(transpose_a=True)
        self.reshape, self.tile, self.sum = ops.Reshape(), ops.Tile(), ops.ReduceSum()

    def bprop(self, x, weight, out, dout):
        (n, c, h, w), k, size = x.shape, weight.shape[0], self.kernel * self.kernel
        x = ops.depend(x, dout)  # unfold in the backward pass; from the forward pass it would stay allocated
        dout = self.reshape(dout, (n, k, -1))
        unfolded = self.reshape(self.unfold(x), (n, c * size, -1))
        dw = self.reshape(self.sum(self.product_bt(dout, unfolded), 0), weight.shape)
        weights = self.tile(self.reshape(weight, (1, k, c * size)), (n, 1, 1))
        dx = self.reshape(self.product_at(weights, dout), (n, c, size, -1))
        return self.fold(dx, mindspore.Tensor([h, w], mindspore.int32)), dw


class SameSize(Unfolded):
    """For convolutions that keep the size, where the unfolded `dout` gives both gradients.

    At the classifiers dout has 38 channels where x has 2048, so unfolding dout is cheap. Both gradients need
    the kernel flipped; multiplying by an exchange matrix flips it exactly. ops.Transpose would keep an index
    of 8 bytes for every weight: 0.9 GB in ResNet-101.
    """

    def __init__(self, kernel: int, stride: int, padding: int, dilation: int):
        super().__init__(kernel, stride, padding, dilation)
        self.exchange = mindspore.Tensor(np.eye(kernel * kernel, dtype=np.float32)[None, ::-1].copy())

    def bprop(self, x, weight, out, dout):
        (n, c, h, w), k, size = x.shape, weight.shape[0], self.kernel * self.kernel
        weight = ops.depend(weight, dout)  # flip in the backward pass, as above
        exchange = self.tile(self.exchange, (k, 1, 1))
        unfolded = self.reshape(self.unfold(dout), (n, k * size, h * w))
        dw = self.sum(self.product_bt(unfolded, self.reshape(x, (n, c, h * w))), 0)
        dw = self.product_at(self.reshape(dw, (k, size, c)), exchange)
        flipped = self.product_bt(exchange, self.reshape(weight, (k, c, size)))
        flipped = self.tile(self.reshape(flipped, (1, k * size, c)), (n, 1, 1))
        dx = self.product_at(flipped, unfolded)
        return self.reshape(dx, (n, c, h, w)), self.reshape(dw, (k, c, self.kernel, self.kernel))
