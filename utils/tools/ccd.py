"""Cluster centre distance (CCD) of two checkpoints, before and after adaptation (CLAN, CVPR 2019, figure 6).

    python -m utils.tools.ccd --restore-from BEFORE.ckpt AFTER.ckpt

For each class, the Euclidean distance between the centre (mean) of its features in the source domain and the
centre of its features in the target domain. If it is smaller after adaptation, the class is aligned better.

The features of two networks may have different scales, so a relative distance, which is our own and not the
paper's, is reported as well: |s_i - t_i| / scale, where s_i and t_i are the centres of class i in source and
target, and scale is the mean of |a - b| over all pairs of centres a, b of different classes, within a domain
and across, of the classes that occur in both. Each checkpoint has its own scale; a relative distance of 1 is
the average distance between different classes.

Features are those before the classifiers, at stride 8, with batch norm in evaluation mode. Labels are
downsampled to them by nearest neighbour with aligned corners, as predictions are upsampled.
"""

import argparse
import sys
from pathlib import Path

if not __package__:  # started as a file, not with -m
    sys.path[0] = str(Path(__file__).parents[2])

from utils.system import device, interrupt  # isort: skip

device.prepare_environment()  # before mindspore is imported
if __name__ == "__main__":
    interrupt.block()  # Ctrl-C and SIGTERM are looked for between two images

import numpy as np
from mindspore import nn
from scipy.spatial.distance import cdist
from tqdm import tqdm

from dataset.cityscapes_dataset import cityscapesDataSet
from dataset.classes import CLASS_NAMES, NUM_CLASSES
from dataset.file_lists import evenly_spaced_indices
from dataset.gta5_dataset import GTA5DataSet
from dataset.pipeline import batches
from model.CLAN_G import Res_Deeplab, generator
from options import Parser, add_machine_options, number, size
from utils import checkpoint, run_folder
from utils.metrics import number_or_none
from utils.system.errors import UserError, run_script
from utils.system.files import write_json

WHEN, ROWS = ("before", "after"), (*CLASS_NAMES, "mean")


class Features(nn.Cell):
    """G without its classifiers: images (N, 3, H, W) -> features (N, C, h, w) float32."""

    def __init__(self, net_G: Res_Deeplab):
        super().__init__(auto_prefix=False)  # the parameters keep their names
        self.net_G = net_G

    def construct(self, x):
        return self.net_G.features(x)


def downsample_labels(labels: np.ndarray, height: int, width: int) -> np.ndarray:
    """Return the trainIds (H, W) at the points of a height x width grid with the same corners."""
    grid = [np.rint(np.linspace(0, n - 1, m)).astype(int) for n, m in zip(labels.shape, (height, width))]
    return labels[np.ix_(*grid)]


def centres(features: Features, data, count: int | None, workers: int) -> np.ndarray:
    """Return the centre of each class (classes, C) float64 in `count` or all images, NaN without a point.

    A point is a position of the feature map. Only sums are kept.
    """
    points, total = np.zeros((NUM_CLASSES, 1), np.int64), 0.0
    chosen = evenly_spaced_indices(len(data), count or len(data))
    stream = batches(data, 1, workers, chosen)
    for images, labels in tqdm(stream, "features", len(chosen), leave=False, disable=None):
        interrupt.exit_if_pending()
        f = features(images).asnumpy()[0].astype(np.float64)
        small = downsample_labels(labels.asnumpy()[0], *f.shape[1:])
        member = small.ravel() == np.arange(NUM_CLASSES)[:, None]
        points += member.sum(1, keepdims=True)
        total += member.astype(np.float64) @ f.reshape(len(f), -1).T
    return np.where(points > 0, total / np.maximum(points, 1), np.nan)


def distances(source: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, float]:
    """Return the distance of each class (n,), from centres (n, C) of both domains, and the scale (see above).

    A class without a centre in one of the domains has NaN. UserError if fewer than two classes have both.
    """
    both = np.flatnonzero(~np.isnan(source + target).any(1))
    if len(both) < 2:
        raise UserError("fewer than two classes occur in the labels of both domains; try a larger --count")
    every, classes = np.concatenate((source[both], target[both])), np.tile(both, 2)
    between, result = cdist(every, every), np.full(NUM_CLASSES, np.nan)
    result[both] = between.diagonal(len(both))  # s_i with t_i
    return result, float(between[classes[:, None] != classes].mean())


def table(values: dict[str, np.ndarray]) -> str:
    """Return a line for each of ROWS with "distance" and "relative" (rows, 2); dashes where they are NaN."""
    lines = [f"{'':<14}{'distance':>30}{'relative':>30}"]
    lines += [f"{'':<14}" + 2 * "".join(f"{word:>10}" for word in (*WHEN, "change"))]
    for name, *pairs in zip(ROWS, values["distance"], values["relative"]):
        cells = [f"{a:10.3f}{b:10.3f}{b - a:+10.3f}" if a == a else f"{'–':>10}" * 3 for a, b in pairs]
        lines.append(f"{name:<14}" + "".join(cells))
    return "\n".join(lines)


def main(args: argparse.Namespace) -> None:
    """Print the distances for both checkpoints and write them to ccd.json; an earlier one is renamed."""
    source = GTA5DataSet(args.data_dir, size=args.input_size)
    target = cityscapesDataSet(args.data_dir_target, args.set, size=args.input_size_target, labels=True)
    for line in source.reports + target.reports:
        print(line)
    paths = [checkpoint.find(path) for path in args.restore_from]
    contents = [checkpoint.read(path) for path in paths]
    device.setup(args)
    run_folder.lock_results_dir(args.save_path)  # until this process ends
    features, found = Features(generator(checkpoint.model_of(contents[0]))).set_train(False), []
    for path, content in zip(paths, contents):
        print(checkpoint.load(features.net_G, content, path, "net_G"))
        both = [centres(features, data, args.count, args.num_workers) for data in (source, target)]
        found.append(distances(*both))
    distance, scale = np.stack([d for d, _ in found], 1), np.array([s for _, s in found])
    distance = np.vstack((distance, np.nanmean(distance, 0)))
    values = {"distance": distance, "relative": distance / scale}
    print(table(values))
    path = Path(args.save_path) / "ccd.json"
    run_folder.archive_old_results(path)
    write_json(path, {
        "checkpoints": dict(zip(WHEN, paths)), "set": args.set, "scale": dict(zip(WHEN, scale)),
        **{kind: {name: dict(zip(WHEN, map(number_or_none, pair))) for name, pair in zip(ROWS, pairs)}
           for kind, pairs in values.items()}})
    print(f"written: {path}")


def get_arguments() -> argparse.Namespace:
    parser = Parser("Distance between the centres of each class in source and target, of two checkpoints.")
    add = parser.add_argument
    add("--restore-from", nargs=2, metavar=("BEFORE", "AFTER"), required=True, help="two checkpoints")
    add("--data-dir", default="./data/GTA5", help="GTA5")
    add("--data-dir-target", default="./data/Cityscapes", help="Cityscapes")
    add("--set", default="val", help="part of Cityscapes, with labels")
    add("--input-size", type=size, default="1280,720", metavar="W,H", help="pixels")
    add("--input-size-target", type=size, default="1024,512", metavar="W,H", help="pixels")
    add("--count", type=number(int, 1), help="images of each domain, evenly spaced (default: all)")
    add("--save-path", default="./result/ccd", metavar="DIR", help="of the results")
    add_machine_options(parser)
    return parser.parse_args()


if __name__ == "__main__":
    run_script(main, get_arguments())
