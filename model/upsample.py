"""Bilinear upsampling with aligned corners, shared by losses, evaluation and figures."""

import mindspore
import numpy as np
from mindspore import Tensor, nn, ops

# The operator inside ops.interpolate, all 170 lines of which MindSpore would compile into every graph.
bilinear = ops.ResizeBilinearV2(align_corners=True)


def up(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Upsample (N, C, h, w), float16 or float32, to float32 (N, C, H, W) for size (H, W)."""
    return bilinear(x.astype(mindspore.float32), size)


class Up(nn.Cell):
    """`up` as a cell, for a fixed size (H, W)."""

    def __init__(self, size: tuple[int, int]):
        super().__init__()
        self.size = size

    def construct(self, x):
        return up(x, self.size)


class CPUUpsample(Up):
    """`Up` with its gradient as two matrix products; MindSpore's takes 6 times as long on the CPU."""

    def bprop(self, x, out, dout):
        (n, c, h, w), (H, W) = x.shape, self.size
        d = ops.matmul(dout.reshape(n * c * H, W), interpolation_matrix(w, W))
        d = d.reshape(n * c, H, w).transpose(1, 0, 2).reshape(H, n * c * w)  # one product for all planes
        d = ops.matmul(interpolation_matrix(h, H).T, d).reshape(h, n * c, w)
        return (d.transpose(1, 0, 2).reshape(n, c, h, w).astype(x.dtype),)  # float16 in mixed precision


@ops.constexpr
def interpolation_matrix(n: int, N: int) -> Tensor:
    """Return the weights (N, n) of n points in each of N points, at float32 positions as in the operator."""
    at = np.arange(N, dtype=np.float32) * np.float32((n - 1) / max(N - 1, 1))
    return Tensor(np.maximum(1 - abs(at[:, None] - np.arange(n, dtype=np.float32)), 0).astype(np.float32))
