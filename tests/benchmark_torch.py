"""The same training step and evaluation in plain PyTorch: the other side of tests/benchmark.py.

Written from the description of the method (README: model, losses, optimisers), not from anybody's code. Each
image passes G once, the gradients of source and target are computed in turn, and D reuses the predictions.
channels_last and in-place ReLU are PyTorch's fastest plain form. Runs under an interpreter with torch, numpy
and pillow and imports nothing that needs mindspore. As a program it is a worker of the benchmark.
"""

import sys
import time
from itertools import cycle
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

from dataset.transform import IMG_MEAN, LABEL_TO_TRAIN, PALETTE, TRAIN_TO_LABEL
from tests import golden
from tests.benchmark import SETTINGS, inputs, serve

CLASSES, IGNORED = 19, 255
LAYOUT = torch.channels_last  # a step at 320x180 + 256x128 takes 14 % less time


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
    """The sum of four dilated 3x3 convolutions."""

    def __init__(self):
        super().__init__()
        rates = (6, 12, 18, 24)
        self.conv2d_list = nn.ModuleList(nn.Conv2d(2048, CLASSES, 3, padding=d, dilation=d) for d in rates)

    def forward(self, x):
        return sum(conv(x) for conv in self.conv2d_list)


class Generator(nn.Module):
    """Images (N, 3, H, W) -> logits of both classifiers, (N, 19, h, w) each; output stride 8."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64)
        self.pool = nn.MaxPool2d(3, 2, 1, ceil_mode=True)
        c_in = 64
        for i, (blocks, stride, dilation) in enumerate(((3, 1, 1), (4, 2, 1), (23, 1, 2), (3, 1, 4)), 1):
            planes = 32 * 2**i
            layer = [Block(c_in, planes, stride, dilation, True)]
            layer += [Block(4 * planes, planes, 1, dilation, False) for _ in range(blocks - 1)]
            setattr(self, f"layer{i}", nn.Sequential(*layer))
            c_in = 4 * planes
        self.layer5, self.layer6 = Classifier(), Classifier()
        for m in self.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.weight.requires_grad = m.bias.requires_grad = False

    def forward(self, x):
        x = self.pool(F.relu(self.bn1(self.conv1(x)), inplace=True))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.layer5(x), self.layer6(x)


class Discriminator(nn.Module):
    """Probabilities (N, 19, H, W) -> one logit per 32x32 cell."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(CLASSES, 64, 4, 2, 1), nn.Conv2d(64, 128, 4, 2, 1)
        self.conv3, self.conv4 = nn.Conv2d(128, 256, 4, 2, 1), nn.Conv2d(256, 512, 4, 2, 1)
        self.classifier = nn.Conv2d(512, 1, 4, 2, 1)

    def forward(self, x):
        for layer in (self.conv1, self.conv2, self.conv3, self.conv4):
            x = F.leaky_relu(layer(x), 0.2, inplace=True)
        return self.classifier(x)


def up(x, size):
    return F.interpolate(x, size=size, mode="bilinear", align_corners=True)


def adv(o, domain: float, weight=None):
    bce = F.binary_cross_entropy_with_logits(o, torch.full_like(o, domain), reduction="none")
    return (bce if weight is None else weight * bce).mean()


class Trainer:
    """A step of CLAN after the warm-up, with the default recipe."""

    def __init__(self, G: Generator, D: Discriminator):
        self.G, self.D = G.train(), D.train()
        classifiers = [*G.layer5.parameters(), *G.layer6.parameters()]
        backbone = [p for n, p in G.named_parameters()
                    if p.requires_grad and not n.startswith(("layer5", "layer6"))]
        groups = [{"params": backbone, "lr": 2.5e-4}, {"params": classifiers, "lr": 2.5e-3}]
        self.opt_G = torch.optim.SGD(groups, lr=2.5e-4, momentum=0.9, weight_decay=5e-4)
        self.opt_D = torch.optim.Adam(D.parameters(), lr=1e-4, betas=(0.9, 0.99))

    def step(self, x_s, y_s, x_t, damp: float, base: float, local: float) -> list[float]:
        """Update both networks; return the five losses as they enter the objectives."""
        G, D, size_s, size_t = self.G, self.D, x_s.shape[2:], x_t.shape[2:]
        self.opt_G.zero_grad()
        self.opt_D.zero_grad()

        p1, p2 = (up(p, size_s) for p in G(x_s))
        loss_seg = sum(F.cross_entropy(p, y_s, ignore_index=IGNORED) for p in (p1, p2))
        loss_seg.backward()

        D.requires_grad_(False)
        t1, t2 = (up(t, size_t) for t in G(x_t))
        M = 1 - F.cosine_similarity(F.softmax(t1, 1), F.softmax(t2, 1), 1).unsqueeze(1)
        weight = base + local * M
        q = F.softmax(t1 + t2, 1)
        loss_adv = 0.001 * damp * adv(up(D(q), size_t), 0.0, weight)
        w5, w6 = (torch.cat([p.flatten() for p in c.parameters()]) for c in (G.layer5, G.layer6))
        loss_weight = 2 * 0.01 * damp * (w5 @ w6 / (w5.norm() * w6.norm()) + 1)
        (loss_adv + loss_weight).backward()

        D.requires_grad_(True)
        loss_D_s = adv(up(D(F.softmax((p1 + p2).detach(), 1)), size_s), 0.0)
        loss_D_s.backward()
        loss_D_t = adv(up(D(q.detach()), size_t), 1.0, weight.detach())
        loss_D_t.backward()
        self.opt_G.step()
        self.opt_D.step()
        return [x.item() for x in (loss_seg, loss_adv, loss_weight, loss_D_s, loss_D_t)]


def load() -> tuple[Generator, Discriminator]:
    """Return both networks with the generated weights of the reference outputs."""

    def tensors(shapes, salt):
        return {name: torch.from_numpy(value) for name, value in golden.state(shapes, salt).items()}

    G, D = Generator(), Discriminator()
    G.load_state_dict(tensors(golden.shapes_G(), "t"), strict=False)  # except num_batches_tracked
    D.load_state_dict(tensors(golden.shapes_D(), "tD."))
    return G.to(memory_format=LAYOUT), D.to(memory_format=LAYOUT)


def serve_step(size: str) -> None:
    """Serve the training step."""
    trainer = Trainer(*load())
    x_s, y_s, x_t = (torch.from_numpy(x) for x in inputs(size))
    x_s, x_t = (x.contiguous(memory_format=LAYOUT) for x in (x_s, x_t))
    serve(lambda: trainer.step(x_s, y_s.long(), x_t, *SETTINGS))


def serve_evaluation(folder: str) -> None:
    """Serve the evaluation of one image of the validation set: Pillow, PyTorch, NumPy."""
    G, out = load()[0].eval(), Path(folder) / "theirs"
    out.mkdir()
    images, labels = (sorted(Path(folder).glob(f"{kind}/val/*/*.png")) for kind in ("leftImg8bit", "gtFine"))
    pairs = cycle(zip(images, labels))

    @torch.no_grad()
    def work() -> list[float]:
        (image, truth), times = next(pairs), [time.perf_counter()]
        rgb = Image.open(image).convert("RGB").resize((1024, 512), Image.Resampling.BICUBIC)
        x = (np.asarray(rgb, np.float32)[:, :, ::-1] - IMG_MEAN).transpose(2, 0, 1)[None]
        label = LABEL_TO_TRAIN[np.asarray(Image.open(truth))]
        times.append(time.perf_counter())
        logits = sum(G(torch.from_numpy(np.ascontiguousarray(x)).contiguous(memory_format=LAYOUT)))
        times.append(time.perf_counter())
        prediction = up(logits, (1024, 2048)).numpy()[0].transpose(1, 2, 0).argmax(2).astype(np.uint8)
        times.append(time.perf_counter())
        known = label < CLASSES
        np.bincount(CLASSES * label[known].astype(int) + prediction[known], minlength=CLASSES**2)
        times.append(time.perf_counter())
        Image.fromarray(TRAIN_TO_LABEL[prediction]).save(out / image.name)
        colours = Image.fromarray(prediction)
        colours.putpalette(PALETTE.tobytes())
        colours.save(out / f"{image.stem}_color.png")
        times.append(time.perf_counter())
        return np.diff(times).tolist()

    serve(work)


if __name__ == "__main__":
    globals()["serve_" + sys.argv[1]](*sys.argv[2:])
