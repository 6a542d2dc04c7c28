"""The losses of CLAN (Luo et al., CVPR 2019). Tensors are float32, labels int32; means are over pixels."""

from mindspore import Tensor, ops

from dataset.classes import IGNORE_LABEL
from utils.softmax import shifted_exp


def seg_loss(
    logits: Tensor, labels: Tensor, focal: bool = False, labelled: Tensor | None = None
) -> Tensor:
    """Segmentation loss of logits (N, C, H, W) against trainIds (N, H, W); pixels labelled 255 do not count.

    Cross-entropy -log p (the paper), or with `focal` the released code's -(1 - p)^2 log p with p in
    [1e-9, 1 - 1e-9]. A batch without a labelled pixel gives 0. `labelled`: the number of pixels to divide by,
    float32, if not those of this batch alone.
    """
    is_labelled = labels != IGNORE_LABEL
    index = ops.select(is_labelled, labels, ops.zeros_like(labels)).expand_dims(1)
    e, highest = shifted_exp(logits)
    log_p = ops.gather_elements(logits, 1, index) - highest - ops.log(e.sum(axis=1, keepdims=True))
    if focal:
        p = ops.clamp(ops.exp(log_p), 1e-9, 1 - 1e-9)
        log_p = (1 - p) * (1 - p) * ops.log(p)
    count = is_labelled.astype(logits.dtype).expand_dims(1)
    if labelled is None:
        labelled = ops.maximum(count.sum(), 1.0)
    return -(log_p * count).sum() / labelled


def alignment_map(logits1: Tensor, logits2: Tensor) -> Tensor:
    """M = 1 - cos(softmax(logits1), softmax(logits2)) over the classes, (N, C, H, W) twice -> (N, 1, H, W).

    0 where C1 and C2 agree. The cosine does not change when a vector is scaled: softmax need not be
    normalised.
    """
    e1, _ = shifted_exp(logits1)
    e2, _ = shifted_exp(logits2)
    dot = (e1 * e2).sum(axis=1, keepdims=True)
    return 1 - dot / ops.sqrt((e1 * e1).sum(axis=1, keepdims=True) * (e2 * e2).sum(axis=1, keepdims=True))


def adv_loss(logits: Tensor, domain: float, weight: Tensor) -> Tensor:
    """mean(weight * BCE(logits, domain)): D's logits (N, 1, H, W), domain 0 = source or 1 = target.

    `weight` is (N, 1, H, W) or a scalar: 1 for vanilla adversarial training, epsilon + lambda_local * M for
    CLAN.
    """
    bce = ops.relu(logits) - logits * domain + ops.log(1 + ops.exp(-ops.abs(logits)))
    return (weight * bce).mean()


def weight_discrepancy(w1: tuple, w2: tuple) -> Tensor:
    """cos(W5, W6) + 1 over all parameters of two classifiers (the paper): 0 when they point apart."""
    dot, sq1, sq2 = 0.0, 0.0, 0.0
    for a, b in zip(w1, w2):
        dot += (a * b).sum()
        sq1 += (a * a).sum()
        sq2 += (b * b).sum()
    return dot / ops.sqrt(sq1 * sq2) + 1
