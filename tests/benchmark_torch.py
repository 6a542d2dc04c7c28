"""The same training step and evaluation in plain PyTorch, with which two comparisons are made.

Written from the description of the method (README: model, losses, optimisers), not from anybody's code. Each
image passes G once, the gradients of source and target are computed in turn, and D reuses the predictions.
In-place ReLU and, in the benchmark, channels_last are PyTorch's fastest plain form. Runs under an interpreter
with torch, numpy and pillow and imports nothing that needs mindspore. As a program it is a worker of
tests/benchmark.py; tests/trajectory_torch.py trains with it.
"""

import sys
from argparse import Namespace
from itertools import cycle
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

from dataset.transform import IMG_MEAN, LABEL_TO_TRAIN, PALETTE, TRAIN_TO_LABEL
from options.train_options import get_arguments
from tests import golden
from tests.benchmark import SETTINGS, inputs, serve

CLASSES, IGNORED = 19, 255
LAYOUT = torch.channels_last  # a step at 320x180 + 256x128 takes 14 % less time
# Blocks of layer1 to layer4, channels of conv1, dilations of the classifiers; D's first layer has 64 and 16.
NETWORKS = {"resnet101": ((3, 4, 23, 3), 64, (6, 12, 18, 24)), "small": ((1, 1, 1, 1), 16, (2, 6))}


def conv(c_in: int, c_out: int, kernel: int, stride: int = 1, dilation: int = 1) -> nn.Conv2d:
    return nn.Conv2d(c_in, c_out, kernel, stride, dilation * (kernel // 2), dilation, bias=False)


class Block(nn.Module):
    """Bottleneck of 1x1 (with the stride), dilated 3x3 and 1x1 convolutions, and a residual sum."""

    def __init__(self, c_in: int, planes: int, stride: int, dilation: int, project: bool):
        super().__init__()
        self.conv1, self.bn1 = conv(c_in, planes, 1, stride), nn.BatchNorm2d(planes)
        self.conv2, self.bn2 = conv(planes, planes, 3, 1, dilation), nn.BatchNorm2d(planes)
        self.conv3, self.bn3 = conv(planes, 4 * planes, 1), nn.BatchNorm2d(4 * planes)
        self.downsample = nn.Identity()
        if project:
            self.downsample = nn.Sequential(conv(c_in, 4 * planes, 1, stride), nn.BatchNorm2d(4 * planes))

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = F.relu(self.bn2(self.conv2(out)), inplace=True)
        return F.relu(self.bn3(self.conv3(out)) + self.downsample(x), inplace=True)


class Classifier(nn.Module):
    """The sum of dilated 3x3 convolutions."""

    def __init__(self, c_in: int, dilations: tuple[int, ...]):
        super().__init__()
        convs = [nn.Conv2d(c_in, CLASSES, 3, padding=d, dilation=d) for d in dilations]
        self.conv2d_list = nn.ModuleList(convs)

    def forward(self, x):
        return sum(conv(x) for conv in self.conv2d_list)


class Generator(nn.Module):
    """Images (N, 3, H, W) -> logits of both classifiers, (N, 19, h, w) each; output stride 8."""

    def __init__(self, model: str = "resnet101"):
        super().__init__()
        layers, width, dilations = NETWORKS[model]
        self.conv1, self.bn1 = nn.Conv2d(3, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width)
        self.pool = nn.MaxPool2d(3, 2, 1, ceil_mode=True)
        c_in = width
        for i, (blocks, stride, dilation) in enumerate(zip(layers, (1, 2, 1, 1), (1, 1, 2, 4)), 1):
            planes = width * 2 ** (i - 1)
            layer = [Block(c_in, planes, stride, dilation, True)]
            layer += [Block(4 * planes, planes, 1, dilation, False) for _ in range(blocks - 1)]
            setattr(self, f"layer{i}", nn.Sequential(*layer))
            c_in = 4 * planes
        self.layer5, self.layer6 = Classifier(c_in, dilations), Classifier(c_in, dilations)
        for m in self.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.weight.requires_grad = m.bias.requires_grad = False

    def forward(self, x):
        x = self.pool(F.relu(self.bn1(self.conv1(x)), inplace=True))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.layer5(x), self.layer6(x)


class Discriminator(nn.Module):
    """Probabilities (N, 19, H, W) -> one logit per 32x32 cell."""

    def __init__(self, model: str = "resnet101"):
        super().__init__()
        n = NETWORKS[model][1]
        self.conv1, self.conv2 = nn.Conv2d(CLASSES, n, 4, 2, 1), nn.Conv2d(n, 2 * n, 4, 2, 1)
        self.conv3, self.conv4 = nn.Conv2d(2 * n, 4 * n, 4, 2, 1), nn.Conv2d(4 * n, 8 * n, 4, 2, 1)
        self.classifier = nn.Conv2d(8 * n, 1, 4, 2, 1)

    def forward(self, x):
        for layer in (self.conv1, self.conv2, self.conv3, self.conv4):
            x = F.leaky_relu(layer(x), 0.2, inplace=True)
        return self.classifier(x)


def up(x, size):
    return F.interpolate(x, size=size, mode="bilinear", align_corners=True)


def adv(o, domain: float, weight=None):
    bce = F.binary_cross_entropy_with_logits(o, torch.full_like(o, domain), reduction="none")
    return (bce if weight is None else weight * bce).mean()


def seg(logits, y, focal: bool):
    """Mean over the labelled pixels of the cross-entropy, or of the released code's focal loss."""
    if not focal:
        return F.cross_entropy(logits, y, ignore_index=IGNORED)
    labelled = y != IGNORED
    p = F.softmax(logits, 1).gather(1, y.where(labelled, 0).unsqueeze(1)).squeeze(1)
    p = p[labelled].clamp(1e-9, 1 - 1e-9)
    return (-((1 - p) ** 2) * p.log()).mean()


def updates_per_step(name: str) -> int:
    """How often the released code's optimiser lists a weight of G."""
    if "downsample" in name:
        return 4
    return 3 if name.startswith(("layer1", "layer2", "layer3", "layer4")) else 1


class Trainer:
    """A step of CLAN with the options of the training script, by the optimisers of PyTorch 1.0."""

    def __init__(self, G: Generator, D: Discriminator, args: Namespace):
        self.G, self.D, self.args, self.steps = G.train(), D.train(), args, 0
        self.weights_G = []  # weight, its moment, factor of the learning rate, updates per step
        for name, p in G.named_parameters():
            if p.requires_grad:
                factor = args.classifier_lr_mult if name.startswith(("layer5", "layer6")) else 1.0
                times = updates_per_step(name) if args.repeat_backbone_updates else 1
                self.weights_G.append((p, torch.zeros_like(p), factor, times))
        self.weights_D = [(p, torch.zeros_like(p), torch.zeros_like(p)) for p in D.parameters()]

    def step(self, x_s, y_s, x_t, damp: float, base: float, local: float, lr: float,
             lr_D: float) -> list[float]:
        """Update both networks; return the five losses as they enter the objectives."""
        G, D, args = self.G, self.D, self.args
        size_s, size_t = args.input_size[::-1], args.input_size_target[::-1]
        G.zero_grad()
        D.zero_grad()

        p1, p2 = (up(p, size_s) for p in G(x_s))
        loss_seg = sum(seg(p, y_s, args.seg_loss == "focal") for p in (p1, p2))
        loss_seg.backward()

        D.requires_grad_(False)
        t1, t2 = (up(t, size_t) for t in G(x_t))
        M = 1 - F.cosine_similarity(F.softmax(t1, 1), F.softmax(t2, 1), 1).unsqueeze(1)
        weight = base + local * (M.detach() if args.detach_weight_map else M)
        q = F.softmax(t1 + t2, 1)
        loss_adv = args.lambda_adv * damp * adv(up(D(q), size_t), 0.0, weight)
        w5, w6 = (torch.cat([p.flatten() for p in c.parameters()]) for c in (G.layer5, G.layer6))
        loss_weight = 2 * args.lambda_weight * damp * (w5 @ w6 / (w5.norm() * w6.norm()) + 1)
        (loss_adv + loss_weight).backward()

        D.requires_grad_(True)
        loss_D_s = adv(up(D(F.softmax((p1 + p2).detach(), 1)), size_s), 0.0)
        loss_D_s.backward()
        loss_D_t = adv(up(D(q.detach()), size_t), 1.0, weight.detach())
        loss_D_t.backward()
        self.update(lr, lr_D)
        return [x.item() for x in (loss_seg, loss_adv, loss_weight, loss_D_s, loss_D_t)]

    @torch.no_grad()
    def update(self, lr: float, lr_D: float) -> None:
        """SGD adds the decay to the gradient in place; Adam adds epsilon before the bias correction."""
        for p, v, factor, times in self.weights_G:
            for _ in range(times):
                p.grad.add_(p, alpha=self.args.weight_decay)
                v.mul_(self.args.momentum).add_(p.grad)
                p.add_(v, alpha=-lr * factor)
        self.steps += 1
        rate = lr_D * (1 - 0.99**self.steps) ** 0.5 / (1 - 0.9**self.steps)
        for p, m, v in self.weights_D:
            m.mul_(0.9).add_(p.grad, alpha=0.1)
            v.mul_(0.99).addcmul_(p.grad, p.grad, value=0.01)
            p.addcdiv_(m, v.sqrt().add_(1e-8), value=-rate)


def load_weights(net: nn.Module, tensors: dict[str, np.ndarray]) -> None:
    """Copy all tensors of a network, except num_batches_tracked, which nothing here uses."""
    state = {name: torch.from_numpy(value) for name, value in tensors.items()}
    missing, unexpected = net.load_state_dict(state, strict=False)
    assert not unexpected and all(name.endswith("num_batches_tracked") for name in missing), missing


def load() -> tuple[Generator, Discriminator]:
    """Return both networks with the generated weights of the reference outputs."""
    G, D = Generator(), Discriminator()
    load_weights(G, golden.state(golden.shapes_G(), "t"))
    load_weights(D, golden.state(golden.shapes_D(), "tD."))
    return G.to(memory_format=LAYOUT), D.to(memory_format=LAYOUT)


def read_image(path: str | Path, size: tuple[int, int]) -> np.ndarray:
    """Return an image as float32 (3, H, W), BGR minus the mean."""
    rgb = Image.open(path).convert("RGB").resize(size, Image.Resampling.BICUBIC)
    return np.ascontiguousarray((np.asarray(rgb, np.float32)[:, :, ::-1] - IMG_MEAN).transpose(2, 0, 1))


def serve_step(size: str) -> None:
    """Serve the training step."""
    source, target = size.split("+")
    args = get_arguments(["--input-size", source, "--input-size-target", target])
    trainer = Trainer(*load(), args)
    x_s, y_s, x_t = (torch.from_numpy(x) for x in inputs(size))
    x_s, x_t = (x.contiguous(memory_format=LAYOUT) for x in (x_s, x_t))
    serve(lambda: trainer.step(x_s, y_s.long(), x_t, *SETTINGS, lr=2.5e-4, lr_D=1e-4))


def serve_evaluation(folder: str) -> None:
    """Serve the evaluation of one image of the validation set: Pillow, PyTorch, NumPy."""
    G, out = load()[0].eval(), Path(folder) / "theirs"
    out.mkdir()
    images, labels = (sorted(Path(folder).glob(f"{kind}/val/*/*.png")) for kind in ("leftImg8bit", "gtFine"))
    pairs = cycle(zip(images, labels))

    @torch.no_grad()
    def work() -> None:
        image, truth = next(pairs)
        x = torch.from_numpy(read_image(image, (1024, 512))[None])
        label = LABEL_TO_TRAIN[np.asarray(Image.open(truth))]
        logits = sum(G(x.contiguous(memory_format=LAYOUT)))
        prediction = up(logits, (1024, 2048)).numpy()[0].transpose(1, 2, 0).argmax(2).astype(np.uint8)
        known = label < CLASSES
        np.bincount(CLASSES * label[known].astype(int) + prediction[known], minlength=CLASSES**2)
        Image.fromarray(TRAIN_TO_LABEL[prediction]).save(out / image.name)
        colours = Image.fromarray(prediction)
        colours.putpalette(PALETTE.tobytes())
        colours.save(out / f"{image.stem}_color.png")

    serve(work)


if __name__ == "__main__":
    globals()["serve_" + sys.argv[1]](*sys.argv[2:])
