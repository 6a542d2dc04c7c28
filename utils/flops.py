"""Floating-point operations of a training step, computed from the sizes of the networks' weights."""

from mindspore import nn


def generator_flop(net_G: nn.Cell, size: tuple[int, int]) -> int:
    """Return the operations of G's convolutions for one image of size (W, H), two per multiply-add."""
    w, h = ((n + 1) // 2 for n in size)  # after a stride of two
    flop = conv_weights(net_G.conv1) * h * w
    w, h = w // 2 + 1, h // 2 + 1  # after the pooling, which has ceil_mode
    flop += conv_weights(net_G.layer1) * h * w
    w, h = (w + 1) // 2, (h + 1) // 2  # only a layer's first convolution has a stride
    layers = net_G.layer2, net_G.layer3, net_G.layer4, net_G.layer5, net_G.layer6
    return 2 * (flop + sum(map(conv_weights, layers)) * h * w)


def discriminator_flop(net_D: nn.Cell, size: tuple[int, int]) -> int:
    """Return the operations of D's convolutions for probabilities of size (W, H)."""
    flop, (w, h) = 0, size
    for layer in (net_D.conv1, net_D.conv2, net_D.conv3, net_D.conv4, net_D.classifier):
        w, h = w // 2, h // 2
        flop += conv_weights(layer) * h * w
    return 2 * flop


def step_flop(net_G: nn.Cell, net_D: nn.Cell, source_size: tuple[int, int], target_size: tuple[int, int],
              method: str = "clan", batch_size: int = 1) -> int:
    """Return the operations of the convolutions of one training step with images of sizes (W, H).

    A backward pass counts as two forward passes. D sees the source once and the target twice, one of the two
    with a gradient for its input only: 3 + 3 + 2 forward passes. Everything else adds less than 1 %.
    """
    flop = 3 * generator_flop(net_G, source_size)
    if method != "source":
        flop += 3 * generator_flop(net_G, target_size)
        flop += 3 * discriminator_flop(net_D, source_size) + 5 * discriminator_flop(net_D, target_size)
    return batch_size * flop


def conv_weights(cell: nn.Cell) -> int:
    """Return the number of weights of all convolutions in a cell."""
    return sum(p.size for p in cell.get_parameters() if p.ndim == 4)
