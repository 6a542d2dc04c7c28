"""mIoU of a checkpoint on Cityscapes. `--help` lists the options."""

from options.evaluate_options import get_arguments

args = get_arguments() if __name__ == "__main__" else None  # before the slow imports: --help answers at once

from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from itertools import groupby, islice
from pathlib import Path

from utils import device, interrupt

workaround = device.prepare_environment()  # before mindspore is imported
if args:
    interrupt.block()  # Ctrl-C and SIGTERM wait for the end of a picture

import mindspore
import numpy as np
from mindspore import Tensor, nn, ops
from tqdm import tqdm

from dataset.cityscapes_dataset import cityscapesDataSet
from dataset.pipeline import batches
from dataset.transform import CLASS_NAMES, CLASS_SETS, IGNORE_LABEL
from model.CLAN_G import NUM_CLASSES, Res_Deeplab, generator
from utils import checkpoint, parallel
from utils.errors import UserError, run
from utils.files import keep_old, write_json
from utils.upsample import up
from utils.visual import save_prediction


class Predict(nn.Cell):
    """Pictures (N, 3, h, w) -> trainIds (N, H, W) int32: logits up-sampled to (H, W), argmax."""

    def __init__(self, net_G: Res_Deeplab, size: tuple[int, int], classifier: str = "sum"):
        super().__init__(auto_prefix=False)  # the parameters keep their names
        self.net_G, self.size, self.classifier = net_G, size, classifier

    def construct(self, x):
        logits1, logits2 = self.net_G(x)
        logits = logits1 + logits2
        if self.classifier == "1":
            logits = logits1
        elif self.classifier == "2":
            logits = logits2
        logits = logits.astype(mindspore.float32)  # a network in training may compute in half precision
        return ops.Argmax(axis=1, output_type=mindspore.int32)(up(logits, self.size))


@lru_cache(maxsize=4)
def predictor(net_G: Res_Deeplab, size: tuple[int, int], classifier: str) -> Predict:
    """One Predict, and so one compilation, for all evaluations of a network at a size."""
    return Predict(net_G, size, classifier)


def evaluate(
    net_G: Res_Deeplab,
    data: cityscapesDataSet,
    classifier: str = "sum",
    batch_size: int = 1,
    workers: int = 4,
    each: Callable[[str, np.ndarray], None] | None = None,
) -> np.ndarray:
    """Confusion matrix (19, 19) int64 of net_G over `data` (with labels): rows truth, columns prediction.

    `each(name, trainIds)` is called for every picture. Memory does not grow with the number of pictures.
    Several processes share the pictures; all of them get the whole matrix.
    """
    net_G.set_train(False)
    confusion = np.zeros((NUM_CLASSES, NUM_CLASSES), np.int64)
    mine, chief = range(parallel.rank(), len(data), parallel.processes()), parallel.rank() == 0
    names = (data.names[i] for i in mine)
    hidden = None if chief else True
    with tqdm(total=len(mine), desc="evaluate", unit="picture", leave=False, disable=hidden) as bar:
        for group in of_one_size(batches(data, 1, workers, mine), batch_size):
            pictures = ops.concat([picture for picture, _ in group])
            labels = np.concatenate([label.asnumpy() for _, label in group])
            prediction = predictor(net_G, labels.shape[1:], classifier)(pictures).asnumpy()
            confusion += confusion_matrix(labels, prediction)
            if each:
                for trainIds in prediction:
                    each(next(names), trainIds)
            bar.update(len(prediction))
    return parallel.total(confusion)


def of_one_size(items: Iterable[tuple], count: int) -> Iterator[list[tuple]]:
    """Lists of up to `count` items in a row whose last columns, the labels, have one shape."""
    for _, group in groupby(items, lambda item: item[-1].shape):
        while some := list(islice(group, count)):
            yield some


def confusion_matrix(labels: np.ndarray, prediction: np.ndarray) -> np.ndarray:
    """Counts (19, 19) int64 of trainIds of the same shape; pixels labelled 255 do not count."""
    valid = labels != IGNORE_LABEL
    index = NUM_CLASSES * labels[valid].astype(np.int64) + prediction[valid]
    return np.bincount(index, minlength=NUM_CLASSES**2).reshape(NUM_CLASSES, NUM_CLASSES)


def class_iou(confusion: np.ndarray) -> np.ndarray:
    """TP / (TP + FP + FN) in percent for each class, NaN for a class in neither truth nor prediction."""
    tp = np.diag(confusion).astype(float)
    union = confusion.sum(0) + confusion.sum(1) - tp
    return 100 * np.divide(tp, union, out=np.full(len(tp), np.nan), where=union > 0)


def mean_iou(confusion: np.ndarray, classes: int = 19) -> float:
    """The mean over the classes of a set (CLASS_SETS) that have an IoU, in percent; NaN if none has.

    A class's IoU does not depend on the set: pixels of other classes count where they are mistaken for it.
    """
    iou = class_iou(confusion)[CLASS_SETS[classes]]
    return float(np.nanmean(iou)) if not np.isnan(iou).all() else float("nan")


def mean_name(classes: int) -> str:
    """What the mean over so many classes is called in tables and files."""
    return "mIoU" if classes == 19 else f"mIoU_{classes}"


def iou_table(confusion: np.ndarray, classes: int = 19) -> str:
    """A line for each class of the set and one for the mean, in percent."""
    iou = class_iou(confusion)
    rows = [
        f"{CLASS_NAMES[i]:<14}{iou[i]:7.2f}" if iou[i] == iou[i] else f"{CLASS_NAMES[i]:<14}      –"
        for i in CLASS_SETS[classes]
    ]
    return "\n".join([*rows, f"{mean_name(classes):<14}{mean_iou(confusion, classes):7.2f}"])


def adapt_bn(
    net_G: Res_Deeplab, data: cityscapesDataSet, count: int, batch_size: int = 1, workers: int = 4
) -> None:
    """Replace batch norm's running statistics by the mean over batches of `count` pictures of `data`.

    Each batch passes in training mode from statistics set to zero, which leaves 0.1 of the batch's own in
    them.
    """
    layers = [cell for _, cell in net_G.cells_and_names() if isinstance(cell, nn.BatchNorm2d)]
    statistics = [p for layer in layers for p in (layer.moving_mean, layer.moving_variance)]
    indices = np.linspace(0, len(data) - 1, min(count, len(data))).astype(int)  # spread over all cities
    total, passes = [0.0] * len(statistics), 0
    net_G.set_train(True)
    for pictures, *_ in batches(data, batch_size, workers, indices):
        interrupt.exit_if_asked()
        for p in statistics:
            p.set_data(ops.zeros_like(p))
        net_G(pictures)
        total = [t + p.asnumpy() / 0.1 for t, p in zip(total, statistics)]
        passes += 1
    for p, t in zip(statistics, total):
        p.set_data(Tensor((t / passes).astype(np.float32)))


def main(args) -> None:
    if workaround:
        print(workaround)
    path = checkpoint.find(args.restore_from)
    if path != args.restore_from:
        print(f"{args.restore_from} is not there; using {path}")
    if args.demo is not None and not Path(args.data_dir).is_dir():
        raise UserError(
            f"{args.data_dir} is not there yet: draw it with CLAN_train_gta5_2_city.py --demo "
            f"--random-seed {args.demo}"
        )
    data = cityscapesDataSet(args.data_dir, args.set, args.data_list, args.input_size, labels=True)
    content = checkpoint.read(path)
    device.setup(args.device, args.device_id, args.mode)
    chief = parallel.rank() == 0  # it alone prints and writes the result
    net_G = generator(checkpoint.model_of(content) if args.model == "auto" else args.model)
    report = checkpoint.load(net_G, content, path, "net_G")
    if chief:
        print(report)

    if args.adapt_bn:
        train = cityscapesDataSet(args.data_dir, "train", size=args.input_size)
        adapt_bn(net_G, train, args.adapt_bn, args.batch_size, args.num_workers)
        if chief:
            count = min(args.adapt_bn, len(train))
            print(f"batch statistics re-estimated on {count} unlabelled train pictures")
    folder = Path(args.save_path)
    result = [folder / "result.json", *([folder / "labelIds", folder / "color"] if args.save else [])]
    if chief and (old := keep_old(*result)):
        print(f"earlier results are now {', '.join(map(str, old))}")
    parallel.wait()  # until they are

    def each(name: str, trainIds: np.ndarray) -> None:
        interrupt.exit_if_asked()
        if args.save:
            save_prediction(folder, name, trainIds)

    confusion = evaluate(net_G, data, args.classifier, args.batch_size, args.num_workers, each)
    if not chief:
        return
    print(iou_table(confusion, args.classes))
    write_json(
        folder / "result.json",
        {
            "checkpoint": path,
            "images": len(data),
            **{mean_name(n): number_or_none(mean_iou(confusion, n)) for n in CLASS_SETS},
            "IoU": {name: number_or_none(iou) for name, iou in zip(CLASS_NAMES, class_iou(confusion))},
        },
    )
    print(
        f"written: {folder / 'result.json'}"
        + (f", {folder / 'labelIds'}, {folder / 'color'}" if args.save else "")
    )


def number_or_none(x: float) -> float | None:
    """JSON knows no NaN."""
    return None if np.isnan(x) else float(x)


if __name__ == "__main__":
    run(main, args)
