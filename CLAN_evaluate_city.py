"""mIoU on Cityscapes of a checkpoint or a folder of them, predictions, export. `--help` lists the options."""

from options.evaluate_options import get_arguments

args = get_arguments() if __name__ == "__main__" else None  # before the slow imports: --help answers at once

import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from functools import cache, lru_cache
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
from dataset.picture_folder import PictureFolder
from dataset.pipeline import batches, spread
from dataset.transform import CLASS_NAMES, CLASS_SETS, IGNORE_LABEL, IMG_MEAN, open_image
from model.CLAN_G import NUM_CLASSES, Res_Deeplab, generator
from utils import checkpoint, parallel, run_folder
from utils.errors import UserError, run
from utils.files import atomic, keep_old, read_json, write_json
from utils.loss import alignment_map
from utils.upsample import up
from utils.visual import PANEL_WIDTH, panel, save_prediction


class Predict(nn.Cell):
    """Pictures (N, 3, h, w) -> trainIds (N, H, W) int32: logits up-sampled to (H, W), argmax.

    With size None the logits themselves, float32 (N, 19, h', w'), at the network's own resolution.
    """

    def __init__(self, net_G: Res_Deeplab, size: tuple[int, int] | None, classifier: str = "sum"):
        super().__init__(auto_prefix=False)  # the parameters keep their names
        self.net_G, self.size, self.classifier = net_G, size, classifier

    def construct(self, x):
        logits1, logits2 = self.net_G(x)
        logits = logits1 + logits2
        if self.classifier == "1":
            logits = logits1
        elif self.classifier == "2":
            logits = logits2
        return logits if self.size is None else label_map(logits, self.size)


def label_map(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """Logits (N, 19, h, w) -> trainIds (N, H, W) int32 for size (H, W)."""
    return ops.Argmax(axis=1, output_type=mindspore.int32)(up(logits, size))


@lru_cache(maxsize=4)
def predictor(net_G: Res_Deeplab, size: tuple[int, int] | None, classifier: str) -> Predict:
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
    mine, hidden = parallel.share(len(data)), parallel.rank() > 0 or None
    names = (data.names[i] for i in mine)
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
    indices = spread(len(data), count)  # over all cities
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
    if args.export and device.launched():
        raise UserError("--export is for one process: start it without msrun")
    if Path(args.restore_from).is_dir():
        score_folder(args)
        return
    path = checkpoint.find(args.restore_from)
    if path != args.restore_from:
        print(f"{args.restore_from} is not there; using {path}")
    data = None
    if args.predict:
        data = PictureFolder(args.predict, args.input_size, args.save_path)
    elif not args.export:
        data = labelled_data(args)
    content = checkpoint.read(path)
    device.setup(args.device, args.device_id, args.mode, args.jit_level, args.conv_precision)
    model = checkpoint.model_of(content) if args.model == "auto" else args.model
    net_G = generator(model)
    say(checkpoint.load(net_G, content, path, "net_G"))

    if args.adapt_bn:
        train = cityscapesDataSet(args.data_dir, "train", size=args.input_size)
        adapt_bn(net_G, train, args.adapt_bn, args.batch_size, args.num_workers)
        count = min(args.adapt_bn, len(train))
        say(f"batch statistics re-estimated on {count} unlabelled train pictures")
    if args.predict:
        predict(args, net_G, data)
    elif args.export:
        export(args, net_G, model)
    else:
        score(args, net_G, data, path)


def say(text: str) -> None:
    """Print, in process 0 alone."""
    if parallel.rank() == 0:
        print(text, flush=True)


def labelled_data(args) -> cityscapesDataSet:
    """The pictures to score on."""
    if args.demo is not None and not Path(args.data_dir).is_dir():
        raise UserError(
            f"{args.data_dir} is not there yet: draw it with CLAN_train_gta5_2_city.py --demo "
            f"--random-seed {args.demo}"
        )
    return cityscapesDataSet(args.data_dir, args.set, args.data_list, args.input_size, labels=True)


def make_room(*results: Path) -> None:
    """Rename earlier results, and say so; all processes go on once that is done."""
    if parallel.rank() == 0:
        results[0].parent.mkdir(parents=True, exist_ok=True)  # if it cannot be, better now than at the end
        if old := keep_old(*results):
            print(f"earlier results are now {', '.join(map(str, old))}")
    parallel.wait()


def score(args, net_G: Res_Deeplab, data: cityscapesDataSet, path: str) -> None:
    """Print the IoUs of one checkpoint, write them to result.json and, with --save, its predictions."""
    folder = Path(args.save_path)
    kinds = [folder / kind for kind in ("labelIds", "color", "panels")]
    with_panel = {data.names[i]: i for i in spread(len(data), args.panels)} if args.save else {}
    make_room(folder / "result.json", *kinds)  # all: pictures must not lie beside figures that are not theirs

    def each(name: str, trainIds: np.ndarray) -> None:
        interrupt.exit_if_asked()
        if args.save:
            save_prediction(folder, name, trainIds)
        if name in with_panel:
            save_panel(folder, net_G, data, with_panel[name], trainIds)

    confusion = evaluate(net_G, data, args.classifier, args.batch_size, args.num_workers, each)
    if parallel.rank() > 0:
        return
    print(iou_table(confusion, args.classes))
    write_json(
        folder / "result.json",
        {
            "checkpoint": path,
            **settings_of(args, data),
            **{mean_name(n): number_or_none(mean_iou(confusion, n)) for n in CLASS_SETS},
            "IoU": {name: number_or_none(iou) for name, iou in zip(CLASS_NAMES, class_iou(confusion))},
        },
    )
    print(f"written: {', '.join(str(p) for p in (folder / 'result.json', *kinds) if p.exists())}")


def save_panel(
    folder: Path, net_G: Res_Deeplab, data: cityscapesDataSet, i: int, trainIds: np.ndarray
) -> None:
    """panels/<name>_panel.png of picture i of `data` and its prediction.

    The alignment map takes a second pass: its logits are up-sampled to the size of the sheet's pictures.
    """
    picture, label = data[i]
    size = round(PANEL_WIDTH * label.shape[0] / label.shape[1]), PANEL_WIDTH
    M = alignment_map(*(up(logits, size) for logits in net_G(Tensor(picture[None])))).asnumpy()[0, 0]
    with atomic(folder / "panels" / f"{data.names[i]}_panel.png") as temporary:
        panel(open_image(data.pictures[i]), trainIds, label, M).save(temporary)


def score_folder(args) -> None:
    """Score every numbered checkpoint of a folder, in order; miou.csv has a row for each that is done.

    miou.json beside it says what the rows belong to: with the same options and files a second start goes on.
    """
    source, folder = Path(args.restore_from), Path(args.save_path)
    data = labelled_data(args)
    train = cityscapesDataSet(args.data_dir, "train", size=args.input_size) if args.adapt_bn else None
    found = dict(run_folder.snapshots(source, "ckpt|pth"))  # of both for one step the .ckpt, which comes last
    if not found:
        raise UserError(f"{source}: no checkpoint GTA5_<steps>.ckpt or GTA5_<steps>.pth in it")
    device.setup(args.device, args.device_id, args.mode, args.jit_level, args.conv_precision)
    chief, table, about = parallel.rank() == 0, folder / "miou.csv", folder / "miou.json"
    todo = sorted(found)
    if chief:
        settings = {"checkpoints": os.path.abspath(source), **settings_of(args, data)}
        known = read_json(about)
        files = known.pop("files", None) if isinstance(known, dict) else None
        files = files if isinstance(files, dict) else {}  # of the rows: which file they were of
        done = {int(row[0]) for row in run_folder.rows(table)}
        replaced = any(str(n) in files and files[str(n)] != stamp(found[n]) for n in done & found.keys())
        if known != settings or replaced:
            if old := keep_old(table, about):
                print(f"earlier results, of other options or files, are now {', '.join(map(str, old))}")
            files, done = {}, set()
            write_json(about, {**settings, "files": files})
        run_folder.start_table(table, ("step", mean_name(args.classes), *CLASS_NAMES))
        todo = sorted(found.keys() - done)
        print(f"{len(found)} checkpoints in {source}, {len(found) - len(todo)} of them in {table} already")

    network = cache(generator)  # compiled once for all checkpoints
    for steps in parallel.of_chief(todo):  # a training may write more meanwhile: one process decides
        path, broken = found.get(steps, source / f"GTA5_{steps}.ckpt"), None
        try:
            scored = stamp(path)
            content = checkpoint.read(str(path))
            net_G = network(checkpoint.model_of(content) if args.model == "auto" else args.model)
            checkpoint.load(net_G, content, str(path), "net_G", complete=True)
        except (UserError, OSError) as error:
            broken = str(error)
        if parallel.anywhere(broken):
            say(f"passed over {broken or f'{path}: another process could not read it'}")
            continue
        if train:
            adapt_bn(net_G, train, args.adapt_bn, args.batch_size, args.num_workers)
        each = interrupt.exit_if_asked
        confusion = evaluate(net_G, data, args.classifier, args.batch_size, args.num_workers, each)
        if chief:
            files[str(steps)] = scored
            write_json(about, {**settings, "files": files})  # before the row, which may not come
            row = [steps, *(f"{v:.9g}" for v in (mean_iou(confusion, args.classes), *class_iou(confusion)))]
            run_folder.append(table, row)
        say(f"{path.name}: {mean_name(args.classes)} {mean_iou(confusion, args.classes):.2f}")
    if not chief:
        return
    if not (rows := run_folder.rows(table)):
        raise UserError(f"{source}: none of its {len(found)} checkpoints can be read")
    print(f"{steps_table(rows)}\nwritten: {table}")


def stamp(path: Path) -> list[int]:
    """Size and time of a file, which change when another takes its place."""
    status = path.stat()  # once: asked twice, the answers could be of two files
    return [status.st_size, status.st_mtime_ns]


def settings_of(args, data: cityscapesDataSet) -> dict:
    """What the figures of a checkpoint depend on, for result.json and miou.json."""
    names = ("set", "data_list", "classifier", "classes", "adapt_bn", "model")
    return {
        "data_dir": os.path.abspath(args.data_dir),
        **{name: getattr(args, name) for name in names},
        "input_size": list(args.input_size),
        "batch_size": args.batch_size if args.adapt_bn else None,  # elsewhere it changes nothing
        "images": len(data),
        "names_crc32": zlib.crc32("\n".join(data.names).encode()),  # a list may have changed its content
    }


def steps_table(rows: list[list[str]]) -> str:
    """The rows of miou.csv by steps, in percent, the best marked."""
    best = run_folder.best_of(rows)
    lines = [f"{'step':>9}{'mIoU':>7} " + "".join(f"{name[:5]:>6}" for name in CLASS_NAMES)]
    for row in sorted(rows, key=lambda row: int(row[0])):
        ious = "".join(f"{'–':>6}" if v == "nan" else f"{float(v):6.1f}" for v in row[2:])
        lines.append(f"{row[0]:>9}{float(row[1]):7.2f} {ious}" + ("  best" if row is best else ""))
    return "\n".join(lines)


def predict(args, net_G: Res_Deeplab, data: PictureFolder) -> None:
    """Write label ids, colours and overlay of every picture, at its own size, to predict/.

    The network's graph gives logits of one size; only the up-sampling, outside it, depends on the picture's.
    """
    folder = Path(args.save_path) / "predict"
    make_room(folder)
    net_G.set_train(False)
    logits_of = predictor(net_G, None, args.classifier)
    mine, hidden = parallel.share(len(data)), parallel.rank() > 0 or None
    names = (data.names[i] for i in mine)
    items = batches(data, 1, args.num_workers, mine)
    try:
        with tqdm(total=len(mine), desc="predict", unit="picture", leave=False, disable=hidden) as bar:
            while group := list(islice(items, args.batch_size)):
                logits = logits_of(ops.concat([x for x, _ in group]))
                for k, (_, picture) in enumerate(group):
                    interrupt.exit_if_asked()
                    rgb = picture.asnumpy()[0]
                    trainIds = label_map(logits[k : k + 1], rgb.shape[:2]).asnumpy()[0]
                    save_prediction(folder, next(names), trainIds, rgb)
                bar.update(len(group))
    except UserError as error:
        if not folder.is_dir():
            raise
        raise UserError(f"{error}; what was predicted until then is in {folder}") from None
    parallel.wait()
    kinds = ", ".join(str(folder / kind) for kind in ("labelIds", "color", "overlay"))
    say(f"{len(data)} pictures, written: {kinds}")


def export(args, net_G: Res_Deeplab, model: str) -> None:
    """Write CLAN_<model>_<W>x<H>.mindir: (1, 3, H, W) float32, as to_input makes it -> trainIds (1, H, W)."""
    width, height = args.input_size
    path = Path(args.save_path) / f"CLAN_{model}_{width}x{height}.mindir"
    make_room(path)
    net_G.set_train(False)
    net = predictor(net_G, (height, width), args.classifier)
    x = Tensor(np.zeros((1, 3, height, width), np.float32))
    with atomic(path) as temporary:
        mindspore.export(net, x, file_name=str(temporary.with_suffix("")), file_format="MINDIR")
        temporary.chmod(0o644)  # MindSpore makes it read-only for its owner
    print(f"input: (1, 3, {height}, {width}) float32, bicubic, BGR from 0 to 255 minus {IMG_MEAN}; "
          f"output: trainIds (1, {height}, {width}) int32\nwritten: {path}")  # fmt: skip


def number_or_none(x: float) -> float | None:
    """JSON knows no NaN."""
    return None if np.isnan(x) else float(x)


if __name__ == "__main__":
    run(main, args)
