"""Generator G of CLAN: DeepLab-v2 on a dilated ResNet (output stride 8) with two classifiers, C1 and C2.

Names follow the authors' PyTorch modules (layer1 … layer4, layer5 = C1, layer6 = C2), so that their
checkpoints map one to one; see utils/checkpoint.py.
"""

import mindspore
from mindspore import Tensor, nn, ops
from mindspore.common.initializer import HeNormal, Initializer, Normal

from dataset.classes import NUM_CLASSES
from model.convolution import Convolution
from utils.system.device import on_npu

CLASSIFIERS = ("layer5.", "layer6.")  # the parameters of C1 and of C2 begin so


def conv(c_in: int, c_out: int, kernel: int, init: Initializer, stride: int = 1, dilation: int = 1):
    """Return a convolution without bias whose padding keeps the size if the stride is 1."""
    return nn.Conv2d(c_in, c_out, kernel, stride, pad_mode="pad", padding=dilation * (kernel // 2),
                     dilation=dilation, has_bias=False, weight_init=init)


def batch_norm(channels: int) -> nn.BatchNorm2d:
    """Return batch norm with running value = 0.9 old + 0.1 batch, as PyTorch's momentum 0.1."""
    return nn.BatchNorm2d(channels, eps=1e-5, momentum=0.9)


class PaddedMaxPool(nn.Cell):
    """3x3, stride 2, padding 1, ceil mode: (N, C, H, W) -> (N, C, H // 2 + 1, W // 2 + 1).

    Zero padding equals ceil-mode pooling only after a ReLU. Used on Ascend, where nn.MaxPool2d runs on the
    slow AI CPU; on the CPU the built-in is three times faster.
    """

    def __init__(self):
        super().__init__()
        self.pool = nn.MaxPool2d(3, 2, "valid")

    def construct(self, x):
        h, w = x.shape[2:]
        return self.pool(ops.pad(x, (1, 2 * (w // 2 + 1) - w, 1, 2 * (h // 2 + 1) - h)))


class Bottleneck(nn.Cell):
    """1x1 (with the stride, Caffe style), dilated 3x3, 1x1 to 4 x planes; residual sum."""

    def __init__(self, c_in: int, planes: int, stride: int, dilation: int, project: bool, init: Initializer):
        super().__init__()
        self.conv1 = conv(c_in, planes, 1, init, stride)
        self.bn1 = batch_norm(planes)
        self.conv2 = conv(planes, planes, 3, init, dilation=dilation)
        self.bn2 = batch_norm(planes)
        self.conv3 = conv(planes, 4 * planes, 1, init)
        self.bn3 = batch_norm(4 * planes)
        self.relu = nn.ReLU()
        self.downsample = None
        if project:
            self.downsample = nn.SequentialCell(
                conv(c_in, 4 * planes, 1, init, stride), batch_norm(4 * planes))

    def construct(self, x):
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        residual = x if self.downsample is None else self.downsample(x)
        return self.relu(out + residual)


class Classifier_Module(nn.Cell):
    """The parameters of a classifier: four dilated 3x3 convolutions with bias, which Res_Deeplab applies."""

    def __init__(self, c_in: int, num_classes: int, dilations: tuple[int, ...]):
        super().__init__()
        self.conv2d_list = nn.CellList([
            nn.Conv2d(c_in, num_classes, 3, pad_mode="pad", padding=d, dilation=d, has_bias=True,
                      weight_init=Normal(0.01)) for d in dilations])


class Res_Deeplab(nn.Cell):
    """Map images (N, 3, H, W) float32, BGR minus the mean, to logits of C1 and C2, (N, num_classes, h, w).

    The logits are not upsampled: 1280x720 gives 161x91, because the max pooling rounds up (ceil mode).
    """

    def __init__(self, num_classes: int = NUM_CLASSES, layers: tuple[int, ...] = (3, 4, 23, 3),
                 width: int = 64, dilations: tuple[int, ...] = (6, 12, 18, 24),
                 init: Initializer | None = None):
        super().__init__()
        init = init or Normal(0.01)
        self.num_classes = num_classes
        self.conv1 = nn.Conv2d(3, width, 7, 2, pad_mode="pad", padding=3, has_bias=False, weight_init=init)
        self.bn1 = batch_norm(width)
        self.relu = nn.ReLU()
        ceil_mode = nn.MaxPool2d(3, 2, pad_mode="pad", padding=1, ceil_mode=True)
        self.maxpool = PaddedMaxPool() if on_npu() else ceil_mode
        self.layer1 = self._layer(width, width, layers[0], 1, 1, init)
        self.layer2 = self._layer(4 * width, 2 * width, layers[1], 2, 1, init)
        self.layer3 = self._layer(8 * width, 4 * width, layers[2], 1, 2, init)
        self.layer4 = self._layer(16 * width, 8 * width, layers[3], 1, 4, init)
        self.layer5 = Classifier_Module(32 * width, num_classes, dilations)
        self.layer6 = Classifier_Module(32 * width, num_classes, dilations)
        self.joint_convolutions = nn.CellList([Convolution(3, 1, d, d) for d in dilations])

    @staticmethod
    def _layer(c_in, planes, blocks, stride, dilation, init):
        first = Bottleneck(c_in, planes, stride, dilation, True, init)
        rest = [Bottleneck(4 * planes, planes, 1, dilation, False, init) for _ in range(blocks - 1)]
        return nn.SequentialCell(first, *rest)

    def features(self, x: Tensor) -> Tensor:
        """Return the features that both classifiers see, (N, 32 width, h, w)."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))

    def construct(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.features(x)
        # C1 and C2 use the same features with the same dilations: one convolution serves both.
        pairs = zip(self.layer5.conv2d_list, self.layer6.conv2d_list, self.joint_convolutions)
        logits = ops.addn([conv2d(x, ops.concat((c1.weight, c2.weight))) for c1, c2, conv2d in pairs])
        bias = [ops.addn([c.bias for c in C.conv2d_list]) for C in (self.layer5, self.layer6)]
        return ops.split(ops.bias_add(logits, ops.concat(bias)), self.num_classes, axis=1)


def generator(model: str) -> Res_Deeplab:
    """Return `resnet101`, the paper's network, 45.3 M parameters, or `small`, one block per layer, 0.9 M."""
    if model == "small":
        return Res_Deeplab(layers=(1, 1, 1, 1), width=16, dilations=(2, 6),
                           init=HeNormal(mode="fan_out", nonlinearity="relu"))
    return Res_Deeplab()


def freeze_bn_affine(G: Res_Deeplab) -> None:
    """Exclude gamma and beta of every batch norm from training; BN statistics are still updated."""
    for parameter in G.get_parameters():
        if parameter.name.endswith((".gamma", ".beta")):
            parameter.requires_grad = False


def to_mixed_precision(net: nn.Cell) -> None:
    """Let a network compute in float16; its weights stay float32, as do batch norm's scale and statistics.

    In graphs for an NPU batch norm takes the activations as they are, in float16. Its kernels elsewhere know
    float32 alone.
    """
    net.to_float(mindspore.float16)
    in_float16 = on_npu() and mindspore.get_context("mode") == mindspore.GRAPH_MODE
    for _, cell in net.cells_and_names():
        if isinstance(cell, nn.BatchNorm2d) and in_float16:
            cell.add_flags(fp16=False)  # no casts: to_float would also round its statistics in validation
        elif isinstance(cell, nn.BatchNorm2d):
            cell.to_float(mindspore.float32)


def recompute(net_G) -> None:
    """Recompute the activations inside ResNet's blocks for their gradients, instead of keeping them.

    Batch norm is left out: its running statistics would be updated twice.
    """
    for layer in (net_G.layer1, net_G.layer2, net_G.layer3, net_G.layer4):
        for block in layer:
            block.recompute()
            for _, cell in block.cells_and_names():
                if isinstance(cell, nn.BatchNorm2d):
                    cell.bn_train.recompute(False)
