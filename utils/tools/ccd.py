"""Cluster centre distance (CCD) of two checkpoints, before and after adaptation (CLAN, CVPR 2019, figure 6).

For each class, the Euclidean distance between the centre (mean) of its features in the source domain and the
centre of its features in the target domain. Smaller after adaptation: the class is aligned better.

The features of two networks may have different scales. So a relative one, which is our own and not
the paper's, is reported as well:

    relative(i) = |s_i - t_i| / scale
    scale       = mean of |a - b| over all pairs of centres a, b of different classes

s_i, t_i: the centres of class i in source and target. The pairs are among s_1 … s_n, t_1 … t_n, the n classes
that occur in both domains: 2n(n-1) pairs, within a domain and across. The scale is one number for each
checkpoint; 1 is as far as different classes are apart on average.

Features are those before the classifiers, at stride 8, with batch norm in evaluation mode; labels are
downsampled to them, nearest, corners on corners, as predictions are upsampled. Only sums are kept, in
float64, so memory does not grow with the number of images. With --adapt-bn each domain uses
BN statistics re-estimated on its own train images, as the evaluation script's option does for the target.
"""

from utils.system import device, interrupt  # isort: skip

device.prepare_environment()  # before mindspore is imported
if __name__ == "__main__":
    interrupt.block()  # Ctrl-C and SIGTERM wait for the end of an image

import argparse
from pathlib import Path

import numpy as np
from mindspore import nn
from PIL import Image
from scipy.spatial.distance import cdist
from tqdm import tqdm

from dataset.cityscapes_dataset import cityscapesDataSet
from dataset.classes import CLASS_NAMES, NUM_CLASSES
from dataset.gta5_dataset import GTA5DataSet
from dataset.pipeline import batches, evenly_spaced_indices
from model.CLAN_G import Res_Deeplab, generator
from options import Parser, add_machine_options, number, size
from utils import checkpoint, run_folder
from utils.evaluation import adapt_bn
from utils.metrics import number_or_none
from utils.system.errors import UserError, run_script
from utils.system.files import atomic, write_json
from utils.tools.bars import bars

WHEN, DOMAINS = ("before", "after"), ("source", "target")


class Features(nn.Cell):
    """Images (N, 3, H, W) -> features before the classifiers, (N, C, h, w) float32."""

    def __init__(self, net_G: Res_Deeplab):
        super().__init__(auto_prefix=False)  # the parameters keep their names
        self.net_G = net_G

    def construct(self, x):
        return self.net_G.features(x)


def downsample_labels(labels: np.ndarray, height: int, width: int) -> np.ndarray:
    """trainIds (H, W) at the nearest points of a height x width grid whose corners are theirs."""
    rows, columns = (np.rint(np.linspace(0, n - 1, m)).astype(int)
                     for n, m in zip(labels.shape, (height, width)))  # fmt: skip
    return labels[rows[:, None], columns]


def centres(features: Features, data, chosen: np.ndarray, workers: int) -> tuple[np.ndarray, np.ndarray]:
    """Over the images `chosen` of `data`: points per class (classes,) int64, centres (classes, C) float64.

    A point is a place of the feature map. The centre of a class without any is NaN.
    """
    features.set_train(False)
    points, total = np.zeros((NUM_CLASSES, 1), np.int64), 0.0
    for images, labels in tqdm(batches(data, 1, workers, chosen), desc="features", total=len(chosen),
                                 unit="image", leave=False, disable=None):  # fmt: skip
        interrupt.exit_if_pending()
        f = features(images).asnumpy()[0].astype(np.float64)
        small = downsample_labels(labels.asnumpy()[0], *f.shape[1:])
        member = small.ravel() == np.arange(NUM_CLASSES)[:, None]
        points += member.sum(1, keepdims=True)
        total += member.astype(np.float64) @ f.reshape(len(f), -1).T
    return points[:, 0], np.where(points > 0, total / np.maximum(points, 1), np.nan)


def distances(source: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, float]:
    """Centres (n, C) of both domains -> distance of each class (n,), and the scale of the relative one.

    NaN for a class that lacks one of the two. UserError if fewer than two classes have both, or if all
    centres are one point.
    """
    both = np.flatnonzero(~np.isnan(source + target).any(1))
    if len(both) < 2:
        raise UserError("fewer than two classes occur in the labels of both domains; try a larger --count")
    every, classes = np.concatenate((source[both], target[both])), np.tile(both, 2)
    between, result = cdist(every, every), np.full(NUM_CLASSES, np.nan)
    result[both] = between.diagonal(len(both))  # s_i with t_i
    scale = float(between[classes[:, None] != classes].mean())
    if scale == 0:
        raise UserError("all classes have one centre: a collapsed network; try an earlier checkpoint")
    return result, scale


def with_mean(values: np.ndarray) -> np.ndarray:
    """(n, …) -> (n + 1, …): below the classes the mean over those that have a value."""
    return np.concatenate((values, np.nanmean(values, 0, keepdims=True)))


def table(distance: np.ndarray, relative: np.ndarray) -> str:
    """A line for each class and one for their mean, of (n, 2) values; a dash for a class without any."""
    lines = [f"{'':<14}{'distance':>30}{'relative':>30}"]
    lines += [f"{'':<14}" + 2 * "".join(f"{word:>10}" for word in (*WHEN, "change"))]
    for name, *pairs in zip((*CLASS_NAMES, "mean"), with_mean(distance), with_mean(relative)):
        cells = [f"{a:10.3f}{b:10.3f}{b - a:+10.3f}" if a == a else f"{'–':>10}" * 3 for a, b in pairs]
        lines.append(f"{name:<14}" + "".join(cells))
    return "\n".join(lines)


def chart(title: str, values: np.ndarray) -> Image.Image:
    """Bars, before and after, of (n, 2) values and their mean; short: aligned."""
    rows = zip((*CLASS_NAMES, "mean"), with_mean(values))
    shown = [(name, pair) for name, pair in rows if not np.isnan(pair).any()]
    series = {when: [(float(pair[k]), None) for _, pair in shown] for k, when in enumerate(WHEN)}
    return bars(title, [name for name, _ in shown], series)


def main(args: argparse.Namespace) -> None:
    sets = [GTA5DataSet(args.data_dir, args.data_list, args.input_size),
            cityscapesDataSet(args.data_dir_target, args.set, args.data_list_target, args.input_size_target,
                              labels=True)]  # fmt: skip
    chosen = [evenly_spaced_indices(len(data), args.count or len(data)) for data in sets]
    trains = sets
    if args.adapt_bn:
        trains = [sets[0], cityscapesDataSet(args.data_dir_target, "train", size=args.input_size_target)]
    for line in sets[0].reports + sets[1].reports:
        print(line)
    paths = [checkpoint.find(path) for path in args.restore_from]
    contents = [checkpoint.read(path) for path in paths]
    device.setup(args)
    run_folder.lock_results_dir(args.save_path)
    # One network for two checkpoints of a kind: it is compiled once.
    networks = {model: Features(generator(model)) for model in set(map(checkpoint.model_of, contents))}
    found, points = [], []
    for path, content in zip(paths, contents):
        features = networks[checkpoint.model_of(content)]
        print(checkpoint.load(features.net_G, content, path, "net_G"))
        domains = []
        for data, images, train in zip(sets, chosen, trains):
            if args.adapt_bn:
                adapt_bn(features.net_G, train, args.adapt_bn, args.batch_size, args.num_workers)
            domains.append(centres(features, data, images, args.num_workers))
        points, both = zip(*domains)
        if not all(np.isfinite(c[n > 0]).all() for n, c in zip(points, both)):
            raise UserError(f"{path}: its features are not finite; try an earlier checkpoint")
        found.append(distances(*both))
    distance, scale = np.stack([d for d, _ in found], 1), np.array([s for _, s in found])
    relative = distance / scale
    print(table(distance, relative))

    folder, each = Path(args.save_path), number_or_none
    run_folder.archive_old_results(folder / "ccd.json", folder / "ccd.png")
    rows = (*CLASS_NAMES, "mean")
    write_json(folder / "ccd.json", {
        "checkpoints": dict(zip(WHEN, paths)), "set": args.set, "adapt_bn": args.adapt_bn,
        "scale": dict(zip(WHEN, scale)), "pictures": dict(zip(DOMAINS, map(len, chosen))),
        "points": {domain: dict(zip(CLASS_NAMES, n.tolist())) for domain, n in zip(DOMAINS, points)},
        **{what: {name: dict(zip(WHEN, map(each, pair))) for name, pair in zip(rows, with_mean(values))}
           for what, values in (("distance", distance), ("relative", relative))}})  # fmt: skip
    with atomic(folder / "ccd.png") as temporary:
        left = chart("Distance of a class's centres in source and target (CCD)", distance)
        right = chart("The same, relative to the mean distance between classes", relative)
        Image.fromarray(np.hstack((left, right))).save(temporary)
    print(f"written: {folder / 'ccd.json'}, {folder / 'ccd.png'}")


def get_arguments() -> argparse.Namespace:
    parser = Parser("Distance between the centres of each class in source and target, of two checkpoints.")
    add = parser.add_argument
    add("--restore-from", nargs=2, metavar=("BEFORE", "AFTER"), required=True, help="two checkpoints")
    add("--data-dir", default="./data/GTA5", help="GTA5 (default: ./data/GTA5)")
    add("--data-dir-target", default="./data/Cityscapes", help="Cityscapes (default: ./data/Cityscapes)")
    add("--set", default="val", help="part of Cityscapes, with labels (default: val)")
    add("--data-list", metavar="FILE", help="one image per line, relative to images/ (default: all)")
    add("--data-list-target", metavar="FILE",
        help="one image per line, relative to leftImg8bit/SET/ (default: all)")  # fmt: skip
    add("--input-size", type=size, default=(1280, 720), metavar="W,H", help="pixels (default: 1280,720)")
    add("--input-size-target", type=size, default=(1024, 512), metavar="W,H", help="(default: 1024,512)")
    add("--count", type=number(int, 1), help="images of each domain, evenly spaced (default: all)")
    add("--adapt-bn", type=number(int, 0), default=0, metavar="N",
        help="re-estimate BN statistics for each domain on N of its train images "
        "(default: 0, the checkpoint's)")  # fmt: skip
    add("--batch-size", type=number(int, 1), default=1, help="of --adapt-bn (default: 1)")
    add("--save-path", default="./result/ccd", metavar="DIR", help="of the results (default: ./result/ccd)")
    add_machine_options(parser)
    return parser.parse_args()


if __name__ == "__main__":
    run_script(main, get_arguments())
