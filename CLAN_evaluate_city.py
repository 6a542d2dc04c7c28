"""mIoU on Cityscapes of a checkpoint or a folder of them, predictions, export. `--help` lists the options."""

from options.evaluate_options import get_arguments

args = get_arguments() if __name__ == "__main__" else None  # before the slow imports: --help answers at once

import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from utils.system import device, interrupt

environment_note = device.prepare_environment()  # before mindspore is imported
if args:
    interrupt.block()  # Ctrl-C and SIGTERM wait for the end of an image

import mindspore
import numpy as np
from mindspore import Tensor
from tqdm import tqdm

from dataset.cityscapes_dataset import cityscapesDataSet
from dataset.classes import CLASS_NAMES, CLASS_SETS
from dataset.file_lists import few
from dataset.image_folder import ImageFolder, plain_folder
from dataset.labels import check_labels
from dataset.pipeline import evenly_spaced_indices, names_crc32, read_ahead
from dataset.transform import IMG_MEAN, open_image
from model.CLAN_G import PaddedMaxPool, Res_Deeplab, generator
from model.upsample import up
from utils import checkpoint, run_folder, tables
from utils.evaluation import Predict, adapt_bn, evaluate, label_map, with_logits
from utils.loss import alignment_map
from utils.metrics import class_iou, iou_table, mean_iou, mean_name, number_or_none
from utils.system import parallel
from utils.system.errors import UserError, run_script
from utils.system.files import atomic, read_json, rotate_existing, write_json
from utils.visual import PANEL_WIDTH, panel, save_prediction


def main(args) -> None:
    if environment_note:
        print(environment_note)
    if args.export and device.launched():
        raise UserError("--export is for one process: start it without msrun")
    if Path(args.restore_from).is_dir():
        evaluate_folder(args)
    else:
        one_checkpoint(args)
    if device.simulated():
        parallel.print_rank0(device.simulation_report())


def one_checkpoint(args) -> None:
    """Evaluate one checkpoint, or predict or export with it."""
    path = checkpoint.find(args.restore_from)
    if path != args.restore_from:
        print(f"{args.restore_from} is not there; using {path}")
    data = None
    if args.predict:
        data = ImageFolder(args.predict, args.input_size)
    elif not args.export:
        data = labelled_data(args)
    content = checkpoint.read(path)
    set_up_device(args)
    run_folder.lock_results_dir(args.save_path)
    if data is not None:
        check_same(data)
    model = checkpoint.model_of(content) if args.model == "auto" else args.model
    net_G = generator(model)
    parallel.print_rank0(checkpoint.load(net_G, content, path, "net_G", complete=True))

    if args.adapt_bn:
        on_predicted = args.data_dir == args.predict
        folder = data if on_predicted else plain_folder(args.data_dir, args.input_size, "--data-dir")
        train = folder or cityscapesDataSet(args.data_dir, "train", size=args.input_size)
        adapt_bn(net_G, train, args.adapt_bn, args.batch_size, args.num_workers)
        kind, count = "" if folder else " train", min(args.adapt_bn, len(train))
        images = f"{count} unlabelled{kind} images of {args.data_dir}"
        parallel.print_rank0(f"BN statistics re-estimated on {images}")
    if args.predict:
        predict(args, net_G, data)
    elif args.export:
        export(args, net_G, model)
    else:
        evaluate_checkpoint(args, net_G, data, path)


def set_up_device(args) -> None:
    """Choose the device and print what it computes in, as the log of a training says it."""
    device.setup(args)
    parallel.print_rank0(device.precision_line(device.precision("O0", args.conv_precision)))


def check_same(data: cityscapesDataSet | ImageFolder) -> None:
    """Print the reports of the data; UserError if the processes, which share it, see different images."""
    if not parallel.all_equal(names_crc32(data)):
        raise UserError("the processes see different images: do all machines have the same data?")
    for line in data.reports:
        parallel.print_rank0(line)


def labelled_data(args) -> cityscapesDataSet:
    """Return the images to evaluate on; UserError if they are not there."""
    if args.demo is not None and not Path(args.data_dir).is_dir():
        raise UserError(
            f"{args.data_dir} is not there yet: generate it with CLAN_train_gta5_2_city.py --demo "
            f"--random-seed {args.demo}"
        )
    data = cityscapesDataSet(args.data_dir, args.set, args.data_list, args.input_size, labels=True)
    data.reports += check_labels(data)
    return data


def evaluate_checkpoint(args, net_G: Res_Deeplab, data: cityscapesDataSet, path: str) -> None:
    """Print the IoUs of one checkpoint, write them to result.json and, with --save, its predictions."""
    folder = Path(args.save_path)
    kinds = [folder / kind for kind in ("labelIds", "color", "panels")]
    with_panel = set(evenly_spaced_indices(len(data), args.panels)) if args.save else ()
    # All kinds, so that outputs of two evaluations do not mix.
    run_folder.archive_old_results(folder / "result.json", *kinds)

    def each(i: int, label: np.ndarray, trainIds: np.ndarray, logits: tuple[Tensor, Tensor]) -> None:
        parallel.exit_if_signalled(i, len(data))
        if args.save:
            save_prediction(folder, data.names[i], trainIds)
        if i in with_panel:
            save_panel(folder, data, i, label, trainIds, logits)

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
    folder: Path, data: cityscapesDataSet, i: int, label: np.ndarray, trainIds: np.ndarray,
    logits: tuple[Tensor, Tensor],
) -> None:  # fmt: skip
    """panels/<name>_panel.png of image i of `data`, its label and prediction, and the alignment map of its
    logits.
    """
    size = round(PANEL_WIDTH * label.shape[0] / label.shape[1]), PANEL_WIDTH
    M = alignment_map(*(up(C, size) for C in logits)).asnumpy()[0, 0]
    with atomic(folder / "panels" / f"{data.names[i]}_panel.png") as temporary:
        panel(open_image(data.images[i]), trainIds, label, M).save(temporary)


def evaluate_folder(args) -> None:
    """Evaluate every numbered checkpoint of a folder, in order; miou.csv has a row for each that is done.

    miou.json says what the rows belong to: with the same options and files a second start resumes.
    """
    source, folder = Path(args.restore_from), Path(args.save_path)
    data = labelled_data(args)
    train = cityscapesDataSet(args.data_dir, "train", size=args.input_size) if args.adapt_bn else None
    found = dict(run_folder.snapshots(source, "ckpt|pth"))  # of both for one step the .ckpt, which comes last
    if not found:
        raise UserError(f"{source}: no checkpoint GTA5_<steps>.ckpt or GTA5_<steps>.pth in it")
    set_up_device(args)
    run_folder.lock_results_dir(folder)
    check_same(data)
    is_main, table, about = parallel.rank() == 0, folder / "miou.csv", folder / "miou.json"
    todo = sorted(found)
    if is_main:
        settings = {"checkpoints": os.path.abspath(source), **settings_of(args, data)}
        settings |= {"adapt_names_crc32": names_crc32(train)} if train else {}
        known = read_json(about)
        files = known.pop("files", None) if isinstance(known, dict) else None
        files = files if isinstance(files, dict) else {}  # of the rows: which file they were of
        done = {int(row[0]) for row in tables.rows(table)}
        replaced = any(str(n) in files and files[str(n)] != stamp(found[n]) for n in done & found.keys())
        if known != settings or replaced:
            if old := rotate_existing(table, about):
                print(f"earlier results, of other options or files, are now {', '.join(map(str, old))}")
            files, done = {}, set()
            write_json(about, {**settings, "files": files})
        tables.start(table, ("step", mean_name(args.classes), *CLASS_NAMES))
        todo = sorted(found.keys() - done)
        print(f"{len(found)} checkpoints in {source}, {len(found) - len(todo)} of them in {table} already")

    network = cache(generator)  # compiled once for all checkpoints
    # A training may write more checkpoints meanwhile: rank 0 decides for all.
    for steps in parallel.broadcast_from_rank0(todo):
        path, problem = found.get(steps, source / f"GTA5_{steps}.ckpt"), None
        try:
            status = stamp(path)
            content = checkpoint.read(str(path))
            net_G = network(checkpoint.model_of(content) if args.model == "auto" else args.model)
            checkpoint.load(net_G, content, str(path), "net_G", complete=True)
        except (UserError, OSError) as error:
            problem = str(error)
        if parallel.any_rank(problem):
            parallel.print_rank0(f"skipped {problem or f'{path}: another process could not read it'}")
            continue
        if train:
            adapt_bn(net_G, train, args.adapt_bn, args.batch_size, args.num_workers)
        confusion = evaluate(net_G, data, args.classifier, args.batch_size, args.num_workers,
                             lambda i, *_: parallel.exit_if_signalled(i, len(data)))  # fmt: skip
        if is_main:
            files[str(steps)] = status
            write_json(about, {**settings, "files": files})  # before the row, which may not come
            row = [steps, *(f"{v:.9g}" for v in (mean_iou(confusion, args.classes), *class_iou(confusion)))]
            tables.append(table, row)
        mean = f"{mean_name(args.classes)} {mean_iou(confusion, args.classes):.2f}"
        parallel.print_rank0(f"{path.name}: {mean}")
    if not is_main:
        return
    if not (rows := tables.rows(table)):
        raise UserError(f"{source}: none of its {len(found)} checkpoints can be read")
    print(f"{steps_table(rows, mean_name(args.classes))}\nwritten: {table}")


def stamp(path: Path) -> list[int]:
    """Return size and time of a file, which identify its version."""
    status = path.stat()  # once: asked twice, the answers could be of two files
    return [status.st_size, status.st_mtime_ns]


def settings_of(args, data: cityscapesDataSet) -> dict:
    """Return what the results of a checkpoint depend on, for result.json and miou.json.

    That is also what the device computes in: rows of HF32 and of float32, or of a DryRun, do not mix.
    """
    names = ("set", "data_list", "classifier", "classes", "adapt_bn", "model")
    precision = device.precision("O0", args.conv_precision)
    return {
        "data_dir": os.path.abspath(args.data_dir),
        **{name: getattr(args, name) for name in names},
        "input_size": list(args.input_size),
        "batch_size": args.batch_size if args.adapt_bn else None,  # elsewhere it changes nothing
        "images": len(data),
        "names_crc32": names_crc32(data),  # a list may have changed its content
        "precision": {**precision, "simulated": True} if device.simulated() else precision,
    }


def steps_table(rows: list[list[str]], mean: str) -> str:
    """The rows of miou.csv by steps, in percent, the best marked; mean: the name of their second column."""
    best = tables.best(rows)
    lines = [f"{'step':>9}{mean:>8}" + "".join(f"{name[:5]:>6}" for name in CLASS_NAMES)]
    for row in sorted(rows, key=lambda row: int(row[0])):
        ious = "".join(f"{'–':>6}" if v == "nan" else f"{float(v):6.1f}" for v in row[2:])
        lines.append(f"{row[0]:>9}{float(row[1]):8.2f}{ious}" + ("  best" if row is best else ""))
    return "\n".join(lines)


def predict(args, net_G: Res_Deeplab, data: ImageFolder) -> None:
    """Write label ids, colours and overlay of every image, at its own size, to predict/.

    What cannot be read in a folder is skipped and reported; UserError at the end if there was any.
    """
    folder = Path(args.save_path) / "predict"
    for source in {path.parent for path in data.images}:
        if source.resolve().is_relative_to(folder.resolve()):  # it would be renamed
            raise UserError(f"{source} is where --predict writes its results: choose another --save-path")
    if Path(args.predict).is_file():
        data[0]  # UserError before earlier results are renamed
    run_folder.archive_old_results(folder)
    mine, hidden, skipped = parallel.indices_of_rank(len(data)), parallel.rank() > 0 or None, []

    def read(i: int) -> tuple[int, np.ndarray] | UserError:
        try:
            return i, *data[i]
        except UserError as error:
            return error

    def readable() -> Iterator[tuple[int, np.ndarray]]:
        for i, item in zip(mine, read_ahead(read, mine, args.num_workers, args.batch_size)):
            parallel.exit_if_signalled(i, len(data))  # here, as others may have images that cannot be read
            if isinstance(item, UserError):
                tqdm.write(f"skipped {item}")
                skipped.append(data.names[i])
            else:
                yield item

    with tqdm(total=len(mine), desc="predict", unit="image", leave=False, disable=hidden) as bar:
        for (i, _), logits in with_logits(net_G, readable(), args.batch_size):
            rgb = data.image(i)
            save_prediction(folder, data.names[i], label_map(logits, rgb.shape[:2], args.classifier), rgb)
            bar.update()
    count = int(parallel.all_reduce_sum(np.array([len(skipped)]))[0])
    if count < len(data):
        kinds = ", ".join(str(folder / kind) for kind in ("labelIds", "color", "overlay"))
        parallel.print_rank0(f"{len(data) - count} images, written: {kinds}")
    parallel.barrier()  # until rank 0 has reported it: msrun ends all with the first
    if count:
        named = f": {few(skipped)}" if skipped else ""  # of several processes each names its own
        raise UserError(f"{count} of {len(data)} images could not be read and were skipped{named}")


def export(args, net_G: Res_Deeplab, model: str) -> None:
    """Write CLAN_<model>_<W>x<H>.mindir: (1, 3, H, W) float32, as to_input makes it -> trainIds (1, H, W)."""
    width, height = args.input_size
    path = Path(args.save_path) / f"CLAN_{model}_{width}x{height}.mindir"
    run_folder.archive_old_results(path)
    net_G.maxpool = PaddedMaxPool()  # whatever exports it: the file may be for an NPU
    net_G.set_train(False)
    net = Predict(net_G, (height, width), args.classifier)
    x = Tensor(np.zeros((1, 3, height, width), np.float32))
    with atomic(path) as temporary:
        mindspore.export(net, x, file_name=str(temporary.with_suffix("")), file_format="MINDIR")
        temporary.chmod(0o644)  # MindSpore makes it read-only for its owner
    print(f"input: (1, 3, {height}, {width}) float32, bicubic, BGR from 0 to 255 minus {IMG_MEAN}; "
          f"output: trainIds (1, {height}, {width}) int32\nwritten: {path}")  # fmt: skip


if __name__ == "__main__":
    run_script(main, args)
