"""Class centre distance (CCD, Wang et al., ECCV 2020): how tight classes are beside how far apart.

    CCD(i) = 1 / (n - 1) * sum over j != i of  mean over x in S_i of |x - mu_i|^2  /  |mu_i - mu_j|^2

x: features of the last layer before the classifiers; S_i: those on pixels of class i; mu_i: their mean; n:
the number of classes that occur. Low is good. For two checkpoints, before and after adaptation, on the same
pictures. Features stay at stride 8; labels are down-sampled to them, nearest, corners on corners, as the
predictions are up-sampled. Only sums are kept, so memory does not grow with the number of pictures.
"""

import CLAN_evaluate_city as evaluation  # isort: skip  # sets the environment before mindspore is imported

import argparse
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from mindspore import nn
from scipy.spatial.distance import cdist
from tqdm import tqdm

from dataset.cityscapes_dataset import cityscapesDataSet
from dataset.gta5_dataset import GTA5DataSet
from dataset.pipeline import batches
from dataset.transform import CLASS_NAMES, IGNORE_LABEL
from model.CLAN_G import NUM_CLASSES, Res_Deeplab, generator
from options import Parser, add_machine_options, number, size
from utils import checkpoint, device
from utils.errors import UserError, run
from utils.files import atomic, keep_old, write_json
from utils.visual import bars


class Features(nn.Cell):
    """Pictures (N, 3, H, W) -> what C1 and C2 look at, (N, C, h, w) float32."""

    def __init__(self, net_G: Res_Deeplab):
        super().__init__(auto_prefix=False)  # the parameters keep their names
        self.net_G = net_G

    def construct(self, x):
        return self.net_G.features(x)


def shrink(labels: np.ndarray, height: int, width: int) -> np.ndarray:
    """trainIds (N, H, W) at the nearest points of a height x width grid whose corners are theirs."""
    rows, columns = (np.rint(np.linspace(0, n - 1, m)).astype(int)
                     for n, m in zip(labels.shape[1:], (height, width)))  # fmt: skip
    return labels[:, rows[:, None], columns]


def add_sums(sums: dict, features: np.ndarray, labels: np.ndarray) -> None:
    """Add features (P, C) with trainIds (P,) to count (19,), total (19, C) and square (19,), float64."""
    counted = labels != IGNORE_LABEL
    x = features[counted].astype(np.float64)
    member = (labels[counted] == np.arange(NUM_CLASSES)[:, None]).astype(np.float64)
    parts = {"count": member.sum(1), "total": member @ x, "square": member @ (x * x).sum(1)}
    for name, value in parts.items():
        sums[name] = sums.get(name, 0.0) + value


def ccd(sums: dict) -> np.ndarray:
    """CCD (19,) of the sums of `add_sums`; NaN for a class that does not occur, or occurs alone."""
    here = np.flatnonzero(sums["count"])
    count, result = sums["count"][here], np.full(NUM_CLASSES, np.nan)
    centre = sums["total"][here] / count[:, None]
    within = np.maximum(sums["square"][here] / count - (centre * centre).sum(1), 0)
    between = cdist(centre, centre, "sqeuclidean")
    np.fill_diagonal(between, np.inf)
    if len(here) > 1:
        with np.errstate(divide="ignore", invalid="ignore"):  # two centres on one point
            result[here] = (within[:, None] / between).sum(1) / (len(here) - 1)
    return result


def sums_of(net_G: Res_Deeplab, sets: Iterable, count: int | None, workers: int) -> dict:
    """The sums over up to `count` pictures, evenly spread, of each data set with labels."""
    net_G.set_train(False)
    features, sums = Features(net_G), {}
    for data in sets:
        chosen = np.linspace(0, len(data) - 1, min(count or len(data), len(data))).astype(int)
        for pictures, labels in tqdm(batches(data, 1, workers, chosen), desc="features", total=len(chosen),
                                     unit="picture", leave=False, disable=None):  # fmt: skip
            evaluation.interrupt.exit_if_asked()
            f = features(pictures).asnumpy()
            small = shrink(labels.asnumpy(), *f.shape[2:])
            add_sums(sums, np.moveaxis(f, 1, -1).reshape(-1, f.shape[1]), small.ravel())
    return sums


def table(before: np.ndarray, after: np.ndarray) -> str:
    """A line for each class and one for their mean; a dash for a class that does not occur."""
    rows = [*zip(CLASS_NAMES, before, after), ("mean", np.nanmean(before), np.nanmean(after))]
    lines = [f"{'CCD':<14}{'before':>10}{'after':>10}{'change':>10}"]
    for name, a, b in rows:
        cells = (f"{a:10.3f}", f"{b:10.3f}", f"{b - a:+10.3f}") if a == a else [f"{'–':>10}"] * 3
        lines.append(f"{name:<14}" + "".join(cells))
    return "\n".join(lines)


def main(args: argparse.Namespace) -> None:
    sets = [cityscapesDataSet(args.data_dir, args.set, args.data_list, args.input_size, labels=True)]
    if args.data_dir_source:
        sets.append(GTA5DataSet(args.data_dir_source, size=args.input_size_source))
    paths = [checkpoint.find(path) for path in args.restore_from]
    contents = [checkpoint.read(path) for path in paths]
    device.setup(args.device, args.device_id, args.mode)
    values, sums = [], {}
    for path, content in zip(paths, contents):
        net_G = generator(checkpoint.model_of(content))
        print(checkpoint.load(net_G, content, path, "net_G"))
        if args.adapt_bn:
            unlabelled = cityscapesDataSet(args.data_dir, "train", size=args.input_size)
            evaluation.adapt_bn(net_G, unlabelled, args.adapt_bn, args.batch_size, args.num_workers)
        sums = sums_of(net_G, sets, args.count, args.num_workers)
        values.append(ccd(sums))
    if np.isnan(values).all():
        raise UserError(f"{args.data_dir}: fewer than two classes in the labels")
    print(table(*values))

    folder, each = Path(args.save_path), evaluation.number_or_none
    if old := keep_old(folder / "ccd.json", folder / "ccd.png"):
        print(f"earlier results are now {', '.join(map(str, old))}")
    write_json(folder / "ccd.json", {
        "checkpoints": dict(zip(("before", "after"), paths)), "set": args.set, "adapt_bn": args.adapt_bn,
        "pictures": [min(args.count or len(data), len(data)) for data in sets],
        "mean": [float(np.nanmean(v)) for v in values],
        "CCD": {name: [each(a), each(b)] for name, a, b in zip(CLASS_NAMES, *values)},
        "points": {name: int(n) for name, n in zip(CLASS_NAMES, sums["count"])}})  # fmt: skip
    shown = [k for k in range(NUM_CLASSES) if not np.isnan(values).any(0)[k]]
    series = {when: [(float(v[k]), None) for k in shown] for when, v in zip(("before", "after"), values)}
    with atomic(folder / "ccd.png") as temporary:
        title = "Class centre distance; low: a class is tight and far from the others"
        bars(title, [CLASS_NAMES[k] for k in shown], series).save(temporary)
    print(f"written: {folder / 'ccd.json'}, {folder / 'ccd.png'}")


def get_arguments() -> argparse.Namespace:
    parser = Parser("Class centre distance (CCD) of each class, before and after adaptation.")
    add = parser.add_argument
    add("--restore-from", nargs=2, metavar=("BEFORE", "AFTER"), required=True, help="two checkpoints")
    add("--data-dir", default="./data/Cityscapes", help="Cityscapes (default: ./data/Cityscapes)")
    add("--set", default="val", help="part of Cityscapes (default: val)")
    add("--data-list", metavar="FILE", help="one picture a line, relative to leftImg8bit/SET/ (default: all)")
    add("--data-dir-source", metavar="DIR", help="GTA5: its pictures count too (default: the target's alone)")
    add("--input-size", type=size, default=(1024, 512), metavar="W,H", help="pixels (default: 1024,512)")
    add("--input-size-source", type=size, default=(1280, 720), metavar="W,H", help="(default: 1280,720)")
    add("--count", type=number(int, 1), help="pictures of each data set, evenly spread (default: all)")
    add("--adapt-bn", type=number(int, 0), default=0, metavar="N",
        help="first re-estimate batch statistics on N unlabelled train pictures (default: 0)")  # fmt: skip
    add("--batch-size", type=number(int, 1), default=1, help="of --adapt-bn (default: 1)")
    add("--save-path", default="./result/ccd", metavar="DIR", help="of the results (default: ./result/ccd)")
    add_machine_options(parser)
    return parser.parse_args()


if __name__ == "__main__":
    run(main, get_arguments())
