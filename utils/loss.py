"""The losses of CLAN (Luo et al., CVPR 2019). Tensors are float32, labels int32; means are over pixels."""

import mindspore
from mindspore import Tensor, ops

from utils.softmax import class_sum, log_softmax_at, on_npu, unnormalised_softmax

softplus = ops.Softplus()  # log(1 + exp(x)), for x of any size
row_product = ops.MatMul(transpose_b=True)  # (m, k) times (n, k) -> (m, n)


def seg_loss(logits: Tensor, labels: Tensor, labelled: Tensor, focal: bool = False) -> Tensor:
    """Return the segmentation loss of logits (N, C, H, W) against trainIds (N, H, W); label 255 is ignored.

    Cross-entropy -log p (the paper), or with `focal` the released code's -(1 - p)^2 log p with p in
    [1e-9, 1 - 1e-9]. labelled: the number of pixels to divide by, a float32 scalar.
    """
    labels = labels.expand_dims(1)
    log_p = log_softmax_at(logits, labels)  # 0 where there is no label, which adds 0 to either loss
    if focal:
        p = ops.clamp(ops.exp(log_p), 1e-9, 1 - 1e-9)
        log_p = (1 - p) * (1 - p) * ops.log(p)
    return log_p.sum() / -labelled


def alignment_map(logits1: Tensor, logits2: Tensor) -> Tensor:
    """Return M = 1 - cos(softmax(logits1), softmax(logits2)), (N, 1, H, W), of two (N, C, H, W) (the paper).

    The cosine is over the classes; M is 0 where C1 and C2 agree. It does not depend on the length of a
    vector, so softmax need not be normalised.
    """
    e1, e2 = unnormalised_softmax(logits1), unnormalised_softmax(logits2)
    dot = class_sum(e1 * e2)
    return 1 - dot * ops.rsqrt(class_sum(e1 * e1) * class_sum(e2 * e2))


def adv_loss(logits: Tensor, domain: int, weight: Tensor | float) -> Tensor:
    """Return mean(weight * BCE(logits, domain)) of D's logits (N, 1, H, W), domain 0 = source, 1 = target.

    weight: (N, 1, H, W) or a scalar; 1 for vanilla adversarial training, epsilon + lambda_local * M for CLAN
    (the paper).
    """
    bce = softplus(-logits if domain else logits)
    return (weight * bce).mean()


def weight_discrepancy(w1: tuple, w2: tuple) -> Tensor:
    """Return cos(W5, W6) + 1 over all parameters of two classifiers (the paper): 0 when they point apart."""
    v1, v2 = vector(w1), vector(w2)
    return dot(v1, v2) * ops.rsqrt(dot(v1, v1) * dot(v2, v2)) + 1


def vector(parameters: tuple) -> Tensor:
    """Return all values of a classifier's parameters, weights first, as one vector (n,) float32."""
    weights = ops.concat([p for p in parameters if p.ndim == 4]).reshape(-1)
    biases = [p for p in parameters if p.ndim == 1]
    # In PyNative mode parameters of a network in mixed precision arrive as float16.
    return ops.concat([values.astype(mindspore.float32) for values in (weights, *biases)])


def dot(v1: Tensor, v2: Tensor) -> Tensor:
    """Return the scalar product of two vectors (n,), the same in every execution of a graph.

    On the CPU the sum over a long vector is split between threads by measured times, so that its last bits
    differ between executions: there it is a matrix product. A 910A has matrix products in float16 only.
    """
    if on_npu():
        return (v1 * v2).sum()
    return row_product(v1.reshape(1, -1), v2.reshape(1, -1)).reshape(())
