"""mIoU on Cityscapes of a checkpoint, or of every checkpoint in a folder; predictions; export.

The paper's evaluation, whose results go to result/cityscapes/result.json:
    python CLAN_evaluate_city.py --restore-from checkpoint/GTA5_best.ckpt
A folder; miou.csv has a row per checkpoint, and a second start skips those that are done:
    python CLAN_evaluate_city.py --restore-from checkpoint
Several NPUs, which share the images:
    msrun --worker_num=8 --local_worker_num=8 --join=True CLAN_evaluate_city.py --restore-from checkpoint
Inference on your own images, without labels:
    python CLAN_evaluate_city.py --restore-from checkpoint/GTA5_best.ckpt --predict photos
The network as one file for other programs:
    python CLAN_evaluate_city.py --restore-from checkpoint/GTA5_best.ckpt --export mindir
A small network in a few seconds on a CPU, after CLAN_train_gta5_2_city.py --demo:
    python CLAN_evaluate_city.py --restore-from checkpoint/demo/clan/GTA5_500.ckpt --demo
--help lists the options.
"""

from options.evaluate_options import get_arguments

args = get_arguments() if __name__ == "__main__" else None  # before the slow imports: --help answers at once

import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

from utils.system import device, interrupt

environment_note = device.prepare_environment()  # before mindspore is imported
if args:
    interrupt.block()  # Ctrl-C and SIGTERM wait for the end of an image

import mindspore
import numpy as np
from mindspore import Tensor
from tqdm import tqdm

from dataset.cityscapes_dataset import cityscapesDataSet
from dataset.classes import CLASS_NAMES, INFO
from dataset.file_lists import few
from dataset.image_folder import ImageFolder, plain_folder
from dataset.labels import check_labels
from dataset.pipeline import evenly_spaced_indices, names_crc32, read_ahead
from dataset.transform import IMG_MEAN, open_image
from model.CLAN_G import PaddedMaxPool, Res_Deeplab, generator
from model.upsample import up
from utils import checkpoint, run_folder
from utils.evaluation import Predict, adapt_bn, evaluate, label_map, with_logits
from utils.loss import alignment_map
from utils.metrics import iou_table, mean_name, percent, summary, without_label
from utils.system import parallel
from utils.system.errors import UserError, run_script
from utils.system.files import atomic, read_json, rotate_existing, write_json
from utils.visual import PANEL_WIDTH, check_names, panel, save_prediction

Images = cityscapesDataSet | ImageFolder


def main(args) -> None:
    """Evaluate a checkpoint or a folder of them, or predict or export with a checkpoint."""
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
    data = None
    if args.predict:
        data = ImageFolder(args.predict, args.input_size)
    elif not args.export:
        data = labelled_data(args)
    train = unlabelled_data(args, data)
    content = checkpoint.read(path)
    set_up(args, data, train)
    if path != args.restore_from:
        parallel.print_rank0(f"{args.restore_from} is not there; using {path}")
    model = checkpoint.model_of(content) if args.model == "auto" else args.model
    net_G = generator(model)
    parallel.print_rank0(checkpoint.load(net_G, content, path, "net_G", complete=True))
    if train is not None:
        adapt_bn(net_G, train, args.adapt_bn, args.batch_size, args.num_workers)
    if args.predict:
        predict(args, net_G, data)
    elif args.export:
        export(args, net_G, model)
    else:
        evaluate_alone(args, net_G, path, data)


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


def unlabelled_data(args, data: Images | None) -> Images | None:
    """Return the images for --adapt-bn, which may be those to predict, `data`; None without this option."""
    if not args.adapt_bn:
        return None
    if args.data_dir == args.predict:
        return data
    folder = plain_folder(args.data_dir, args.input_size, "--data-dir")
    return folder or cityscapesDataSet(args.data_dir, "train", size=args.input_size)


def set_up(args, data: Images | None, train: Images | None) -> None:
    """Choose the device, reserve the folder of the results and compare the images of all processes."""
    device.setup(args)
    if environment_note:
        parallel.print_rank0(environment_note)
    parallel.print_rank0(device.precision_line(device.precision("O0", args.conv_precision)))
    run_folder.lock_results_dir(args.save_path)
    for images in (data, train):
        if images is not None:
            check_same(images)
    if train is not None:
        kind, count = "" if isinstance(train, ImageFolder) else " train", min(args.adapt_bn, len(train))
        text = f"BN statistics are re-estimated on {count} unlabelled{kind} images of {args.data_dir}"
        parallel.print_rank0(text)


def check_same(data: Images) -> None:
    """Print the reports of the data; UserError if the processes, which share it, see different images."""
    if not parallel.all_equal(names_crc32(data)):
        raise UserError("the processes see different images: do all machines have the same data?")
    for line in data.reports:
        parallel.print_rank0(line)


def evaluate_checkpoint(
    args, net_G: Res_Deeplab, path: str, data: cityscapesDataSet,
    each: Callable[[int, np.ndarray, np.ndarray, tuple], None] = lambda *_: None,
) -> dict:  # fmt: skip
    """Return the result of the checkpoint whose weights net_G has, for JSON: options and IoUs in percent.

    `each` is called for every image as `evaluate` says.
    """

    def each_image(i: int, *item) -> None:
        parallel.exit_if_signalled(i, len(data))
        each(i, *item)

    confusion = evaluate(net_G, data, args.classifier, args.batch_size, args.num_workers, each_image)
    return {"checkpoint": path, **settings_of(args, data), **summary(confusion)}


def evaluate_alone(args, net_G: Res_Deeplab, path: str, data: cityscapesDataSet) -> None:
    """Print the IoUs of one checkpoint, write them to result.json and, with --save, its predictions."""
    folder = Path(args.save_path)
    kinds = [folder / kind for kind in ("labelIds", "color", "panels")]
    with_panel = set(evenly_spaced_indices(len(data), args.panels)) if args.save else ()
    if args.save:
        check_names(folder, data.names)
    # All kinds, so that outputs of two evaluations do not mix.
    run_folder.archive_old_results(folder / "result.json", *kinds)

    def save(i: int, label: np.ndarray, trainIds: np.ndarray, logits: tuple[Tensor, Tensor]) -> None:
        if args.save:
            save_prediction(folder, data.names[i], trainIds)
        if i in with_panel:
            save_panel(folder, data, i, label, trainIds, logits)

    result = evaluate_checkpoint(args, net_G, path, data, save)
    if parallel.rank() > 0:
        return
    print(iou_table(result, args.classes))
    write_json(folder / "result.json", result)
    print(f"written: {', '.join(str(p) for p in (folder / 'result.json', *kinds) if p.exists())}")


def save_panel(
    folder: Path, data: cityscapesDataSet, i: int, label: np.ndarray, trainIds: np.ndarray,
    logits: tuple[Tensor, Tensor],
) -> None:  # fmt: skip
    """Write panels/<name>_panel.png: image i of `data`, label, prediction, alignment map of the logits."""
    size = round(PANEL_WIDTH * label.shape[0] / label.shape[1]), PANEL_WIDTH
    M = alignment_map(*(up(C, size) for C in logits)).asnumpy()[0, 0]
    with atomic(folder / "panels" / f"{data.names[i]}_panel.png") as temporary:
        panel(open_image(data.images[i]), trainIds, label, M).save(temporary)


def evaluate_folder(args) -> None:
    """Evaluate each GTA5_<steps> checkpoint of a folder, write GTA5_<steps>.json, and miou.csv from these.

    A second start skips checkpoints whose result has the same options, checkpoint, images and labels.
    """
    source, folder = Path(args.restore_from), Path(args.save_path)
    data = labelled_data(args)
    train = unlabelled_data(args, data)
    found = dict(run_folder.snapshots(source, "ckpt|pth"))  # if a step has both, the .ckpt, which comes last
    if not found:
        raise UserError(f"{source}: no checkpoint GTA5_<steps>.ckpt or GTA5_<steps>.pth in it")
    set_up(args, data, train)
    is_main, todo, results = parallel.rank() == 0, [], {}
    if is_main:
        settings = {"folder": os.path.abspath(source), **settings_of(args, data)}
        settings["files_crc32"] = files_crc32(args, data, train)
        results = earlier_results(folder, found, settings, args.classes)
        todo = sorted(found.keys() - results.keys())
        print(f"{len(found)} checkpoints in {source}, {len(found) - len(todo)} of them evaluated already")

    network = cache(generator)  # compiled once for all checkpoints
    # A training may write more checkpoints meanwhile: rank 0 decides for all.
    for steps in parallel.broadcast_from_rank0(todo):
        path, problem = found.get(steps, source / f"GTA5_{steps}.ckpt"), None
        try:
            version = version_of(path)
            content = checkpoint.read(str(path))
            net_G = network(checkpoint.model_of(content) if args.model == "auto" else args.model)
            checkpoint.load(net_G, content, str(path), "net_G", complete=True)
        except (UserError, OSError) as error:
            problem = str(error)
        if parallel.any_rank(problem):
            parallel.print_rank0(f"skipped {problem or f'{path}: another process could not read it'}")
            continue
        if train is not None:
            adapt_bn(net_G, train, args.adapt_bn, args.batch_size, args.num_workers)
        result = evaluate_checkpoint(args, net_G, str(path), data)
        if is_main:
            results[steps] = {**result, **settings, **version}
            write_json(folder / f"GTA5_{steps}.json", results[steps])
            write_table(folder / "miou.csv", table_text(results, args.classes))
        mean = mean_name(args.classes)
        parallel.print_rank0(f"{path.name}: {mean} {percent(result[mean])}")
    if is_main and not results:
        raise UserError(f"{source}: none of its {len(found)} checkpoints can be read")
    if is_main:
        print(f"{steps_table(results, args.classes)}\nwritten: {folder / 'miou.csv'}")


def earlier_results(folder: Path, found: dict[int, Path], settings: dict, classes: int) -> dict[int, dict]:
    """Return by steps the results in `folder` that belong to `settings` and to the checkpoints `found`.

    Results of other options or files are renamed, and a miou.csv that has rows of them. A result whose
    checkpoint was deleted stays.
    """
    kept, others = {}, []
    for steps, path in run_folder.snapshots(folder, "json"):
        result = read_json(path)
        expected = {**settings, **(version_of(found[steps]) if steps in found else {})}
        if isinstance(result, dict) and all(result.get(name) == value for name, value in expected.items()):
            kept[steps] = result
        else:
            others.append(path)
    table, text = folder / "miou.csv", table_text(kept, classes)
    lines = table.read_text(encoding="utf-8", errors="replace").splitlines() if table.exists() else []
    if set(lines) - set(text.splitlines()):
        others.append(table)
    if old := rotate_existing(*others):
        print(f"earlier results, of other options or files, are now {few(list(map(str, old)))}")
    write_table(table, text)
    return kept


def version_of(path: Path) -> dict[str, int]:
    """Return size and time of a checkpoint, which identify its version."""
    status = path.stat()  # once: the file may be replaced between two calls
    return {"checkpoint_bytes": status.st_size, "checkpoint_mtime_ns": status.st_mtime_ns}


def files_crc32(args, data: cityscapesDataSet, train: Images | None) -> int:
    """Return a checksum of the classes, and of names, sizes and times of all images and labels that count."""
    paths, crc = [*data.images, *data.labels], zlib.crc32(json.dumps(INFO).encode())
    if train is not None:
        paths += [train.images[i] for i in evenly_spaced_indices(len(train), args.adapt_bn)]
    for path in paths:
        status = path.stat()
        about = f"{path.name} {status.st_size} {status.st_mtime_ns}"
        crc = zlib.crc32(os.fsencode(about), crc)
    return crc


def settings_of(args, data: cityscapesDataSet) -> dict:
    """Return what the result of a checkpoint depends on, apart from the content of files.

    The precision of the device belongs to it, so that results of HF32 and float32, or of a DryRun, do not
    share a table.
    """
    names = ("set", "data_list", "classifier", "classes", "adapt_bn", "model")
    precision = device.precision("O0", args.conv_precision)
    return {
        "data_dir": os.path.abspath(args.data_dir),
        **{name: getattr(args, name) for name in names},
        "input_size": list(args.input_size),
        "batch_size": args.batch_size if args.adapt_bn else None,  # otherwise it does not change the result
        "images": len(data),
        "names_crc32": names_crc32(data),  # a list may have changed its content
        "precision": {**precision, "simulated": True} if device.simulated() else precision,
    }


def table_text(results: dict[int, dict], classes: int) -> str:
    """Return the content of miou.csv for results by steps."""
    lines = [["step", mean_name(classes), *CLASS_NAMES]]
    for steps, result in sorted(results.items()):
        values = (result[mean_name(classes)], *result["IoU"].values())
        lines.append([str(steps), *("nan" if v is None else f"{v:.9g}" for v in values)])
    return "".join(",".join(line) + "\r\n" for line in lines)


def write_table(table: Path, text: str) -> None:
    """Write miou.csv atomically."""
    with atomic(table) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="")


def steps_table(results: dict[int, dict], classes: int) -> str:
    """Return results by steps as a table in percent, the best marked, and the classes without a label."""
    mean = mean_name(classes)
    means = {steps: result[mean] for steps, result in sorted(results.items()) if result[mean] is not None}
    best = max(means, key=means.get, default=None)
    lines = [f"{'step':>9}{mean:>8}" + "".join(f"{name[:5]:>6}" for name in CLASS_NAMES)]
    for steps, result in sorted(results.items()):
        ious = "".join(f"{percent(v, 1):>6}" for v in result["IoU"].values())
        lines.append(f"{steps:>9}{percent(result[mean]):>8}{ious}" + ("  best" if steps == best else ""))
    return "\n".join([*lines, *without_label(result, classes)])


def predict(args, net_G: Res_Deeplab, data: ImageFolder) -> None:
    """Write label ids, colours and overlay of every image, at its own size, to predict/.

    Images of a folder that cannot be read are skipped and reported; then UserError at the end.
    """
    folder = Path(args.save_path) / "predict"
    for source in {path.parent for path in data.images}:
        if source.resolve().is_relative_to(folder.resolve()):  # it would be renamed
            raise UserError(f"{source} is where --predict writes its results: choose another --save-path")
    check_names(folder.parent, data.names)
    if Path(args.predict).is_file():
        data[0]  # UserError before earlier results are renamed
    run_folder.archive_old_results(folder)
    mine, hidden, skipped = parallel.indices_of_rank(len(data)), parallel.rank() > 0 or None, []

    def read(i: int) -> tuple[int, np.ndarray, np.ndarray] | UserError:
        try:
            return i, *data.with_image(i)
        except UserError as error:
            return error

    def readable() -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        for i, item in zip(mine, read_ahead(read, mine, args.num_workers, args.batch_size)):
            parallel.exit_if_signalled(i, len(data))  # for unreadable images, too: all processes call it
            if isinstance(item, UserError):
                tqdm.write(f"skipped {item}")
                skipped.append(data.names[i])
            else:
                yield item

    with tqdm(total=len(mine), desc="predict", unit="image", leave=False, disable=hidden) as bar:
        for (i, _, rgb), logits in with_logits(net_G, readable(), args.batch_size):
            save_prediction(folder, data.names[i], label_map(logits, rgb.shape[:2], args.classifier), rgb)
            bar.update()
    count = int(parallel.all_reduce_sum(np.array([len(skipped)]))[0])
    if count < len(data):
        kinds = ", ".join(str(folder / kind) for kind in ("labelIds", "color", "overlay"))
        parallel.print_rank0(f"{len(data) - count} images, written: {kinds}")
    parallel.barrier()  # until rank 0 has printed: msrun kills all processes when one exits
    if count:
        named = f": {few(skipped)}" if skipped else ""  # each process names its own
        raise UserError(f"{count} of {len(data)} images could not be read and were skipped{named}")


def export(args, net_G: Res_Deeplab, model: str) -> None:
    """Write CLAN_<model>_<W>x<H>.mindir: (1, 3, H, W) float32, as to_input makes it -> trainIds (1, H, W)."""
    width, height = args.input_size
    path = Path(args.save_path) / f"CLAN_{model}_{width}x{height}.mindir"
    run_folder.archive_old_results(path)
    net_G.maxpool = PaddedMaxPool()  # on every device: the file may be for an NPU
    net_G.set_train(False)
    net = Predict(net_G, (height, width), args.classifier)
    x, here = Tensor(np.zeros((1, 3, height, width), np.float32)), os.getcwd()
    with atomic(path) as temporary, TemporaryDirectory() as scratch:
        os.chdir(scratch)  # mindspore.export refuses a path with a space, +, = or Chinese
        try:
            mindspore.export(net, x, file_name="net", file_format="MINDIR")
        finally:
            os.chdir(here)
        # The copy has the permissions of any new file; MindSpore's own is read-only.
        shutil.copyfile(Path(scratch) / "net.mindir", temporary)
    print(f"input: (1, 3, {height}, {width}) float32, bicubic, BGR from 0 to 255 minus {IMG_MEAN}; "
          f"output: trainIds (1, {height}, {width}) int32\nwritten: {path}")  # fmt: skip


if __name__ == "__main__":
    run_script(main, args)
