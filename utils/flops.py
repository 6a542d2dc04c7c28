"""Floating-point operations of a training step, counted from the networks' own weights."""

from mindspore import nn


def generator_flop(net_G: nn.Cell, size: tuple[int, int]) -> int:
    """Operations of G's convolutions, forward, for one image of size (W, H); a multiply-add counts as 2."""
    w, h = (after_stride(n) for n in size)
    flop = conv_weights(net_G.conv1) * h * w
    w, h = after_stride(w + 1), after_stride(h + 1)  # the pooling rounds up
    for layer in (net_G.layer1, net_G.layer2, net_G.layer3, net_G.layer4, net_G.layer5, net_G.layer6):
        if layer is net_G.layer2:
            w, h = after_stride(w), after_stride(h)
        flop += conv_weights(layer) * h * w  # the stride sits first in a layer: one size for all its outputs
    return 2 * flop


def discriminator_flop(net_D: nn.Cell, size: tuple[int, int]) -> int:
    """Operations of D's convolutions, forward, for one map of probabilities of size (W, H)."""
    w, h = size
    flop = 0
    for layer in (net_D.conv1, net_D.conv2, net_D.conv3, net_D.conv4, net_D.classifier):
        w, h = w // 2, h // 2
        flop += conv_weights(layer) * h * w
    return 2 * flop


def step_flop(
    net_G: nn.Cell,
    net_D: nn.Cell,
    source_size: tuple[int, int],
    target_size: tuple[int, int],
    method: str = "clan",
    batch_size: int = 1,
) -> int:
    """Operations of the convolutions of one training step, images of sizes (W, H).

    Backward counts twice forward. D sees the source once and the target twice, one of the two with a
    gradient for its input only. What is not a convolution adds less than a hundredth.
    """
    flop = 3 * generator_flop(net_G, source_size)
    if method != "source":
        flop += 3 * generator_flop(net_G, target_size)
        flop += 3 * discriminator_flop(net_D, source_size) + 5 * discriminator_flop(net_D, target_size)
    return batch_size * flop


def conv_weights(cell: nn.Cell) -> int:
    """The number of weights of all convolutions in a cell."""
    return sum(p.size for p in cell.get_parameters() if p.ndim == 4)


def after_stride(n: int) -> int:
    """The size after a stride of two with padding that keeps the size otherwise."""
    return (n + 1) // 2
