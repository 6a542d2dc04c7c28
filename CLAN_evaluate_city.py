"""mIoU on Cityscapes of a checkpoint, or of every checkpoint in a folder; predictions; export.

The paper's evaluation, whose results go to result/cityscapes/result.json:
    python CLAN_evaluate_city.py --restore-from checkpoint/GTA5_best.ckpt
A folder; miou.csv has a row per checkpoint, and a second start skips those that are done:
    python CLAN_evaluate_city.py --restore-from checkpoint
Probabilities averaged over scales and mirror images, also with --predict:
    python CLAN_evaluate_city.py --restore-from checkpoint/GTA5_best.ckpt --scales 0.75,1,1.25 --flip
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
from argparse import ArgumentTypeError, Namespace
from collections.abc import Iterator
from contextlib import suppress
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

from dataset.classes import CLASS_NAMES, INFO
from dataset.file_lists import evenly_spaced_indices, few
from dataset.images import ImageFolder, Images, names_crc32
from dataset.layouts import labelled_images, unlabelled_images
from dataset.pipeline import read_ahead
from dataset.transform import IMG_MEAN, open_image
from model.CLAN_G import PaddedMaxPool, Res_Deeplab, generator
from model.upsample import up
from options import size
from utils import checkpoint, run_folder, tables
from utils.evaluation import Predict, adapt_bn, evaluate, predictions, read_views
from utils.loss import alignment_map
from utils.metrics import iou_table, mean_name, percent, summary, without_label
from utils.system import parallel
from utils.system.errors import UserError, run_script
from utils.system.files import atomic, follow_link, read_json, rotate_existing, write_json
from utils.visual import PANEL_WIDTH, panel, save_legend, save_prediction


def main(args) -> None:
    """Evaluate a checkpoint or a folder of them, or predict or export with a checkpoint."""
    if args.export and device.launched():
        raise UserError("--export is for one process: start it without msrun")
    try:
        if Path(args.restore_from).is_dir():
            evaluate_folder(args)
        else:
            one_checkpoint(args)
    finally:
        run_folder.release_results_dir()
    if device.simulated():
        parallel.print_rank0(device.simulation_report())


def one_checkpoint(args) -> None:
    """Evaluate one checkpoint, or predict or export with it."""
    path = checkpoint.find(args.restore_from)
    content = checkpoint.read(path)
    args, origin = with_run(args, path, content)
    data, train = set_up(args, origin)
    net_G = generator(args.model)
    parallel.print_rank0(checkpoint.load(net_G, content, path, "net_G", complete=True))
    if train:
        adapt_bn(net_G, train, args.adapt_bn, args.batch_size, args.num_workers)
    if args.predict:
        predict(args, net_G, data)
    elif args.export == "safetensors":
        file = Path(args.save_path) / f"CLAN_{args.model}.safetensors"
        run_folder.archive_old_results(file)
        checkpoint.save_safetensors(file, net_G)
        print(f"written: {file}")
    elif args.export:
        export(args, net_G)
    else:
        evaluate_alone(args, net_G, path, data, settings_of(args, data, train))


def with_run(args, path: str | Path, content: dict) -> tuple[Namespace, str]:
    """Return the options with the network and the input size for a checkpoint, and a line on their origin.

    The command line comes first, then the checkpoint, then, for the size, options.json next to it. UserError
    if the size found there is none.
    """
    beside = follow_link(Path(path)).parent / "options.json"
    saved = read_json(beside)
    sizes = {
        "--input-size": args.input_size,
        "the checkpoint": content.get("input_size"),
        str(beside): saved.get("input_size_target") if isinstance(saved, dict) else None,
        "the paper": (1024, 512),
    }
    origin, value = next(item for item in sizes.items() if item[1] is not None)
    try:
        width, height = size(value if isinstance(value, str) else ",".join(map(str, value)))
    except (TypeError, ArgumentTypeError):
        raise UserError(f"{path}: the input size in {origin} is damaged; give --input-size W,H") from None
    model, named = args.model, "--model"
    if model == "auto":
        model, named = checkpoint.model_of(content, str(path)), "the checkpoint"
    line = f"{path}: network {model} (from {named}), input size {width},{height} (from {origin})"
    return Namespace(**vars(args) | {"model": model, "input_size": (width, height)}), line


def set_up(args, origin: str) -> tuple[Images | None, Images | None]:
    """Choose the device and reserve the folder of the results; return the images of `images_of`.

    origin: the line of `with_run`, to print. UserError if the processes, which share the images, see
    different ones, or if a scale makes them too small.
    """
    for scale in args.scales:
        width, height = (int(side * scale) for side in args.input_size)
        if min(width, height) < 32:
            raise UserError(f"--scales {scale:g}: makes inputs of {width}x{height}, but both have to be at "
                            "least 32 pixels")  # fmt: skip
    device.setup(args)
    run_folder.lock_results_dir(args.save_path)
    data, train = images_of(args)
    lines = [environment_note, origin, device.precision_line(device.precision("O0", args.conv_precision))]
    if views := views_of(args):
        lines.append("predictions are means over scales {scales}, flip {flip}".format(**views))
    for images in filter(None, (data, train)):
        lines += images.reports
        if not parallel.all_equal(names_crc32(images)):
            raise UserError("the processes see different images: do all machines have the same data?")
    if train:
        count = min(args.adapt_bn, len(train))
        lines.append(f"BN statistics are re-estimated on {count} unlabelled images of {args.data_dir}")
    parallel.print_rank0("\n".join(filter(None, lines)))
    return data, train


def images_of(args) -> tuple[Images | None, Images | None]:
    """Return the images to predict or evaluate on, and those for --adapt-bn; None for what is not needed."""
    data = train = None
    if args.predict:
        data = ImageFolder(args.predict, args.input_size)
    elif not args.export:
        data = labelled_images(args.data_dir, "--data-dir", args.input_size, args.set, args.data_list)
    if args.adapt_bn and args.data_dir == args.predict:
        train = data
    elif args.adapt_bn:
        train = unlabelled_images(args.data_dir, "--data-dir", args.input_size)
    return data, train


def settings_of(args, data: Images, train: Images | None) -> dict:
    """Return what the result of a checkpoint depends on: options, images, labels, classes and precision.

    files_crc32 is of the names, sizes and times of all files, and of the classes.
    """
    names = ("set", "data_list", "classifier", "classes", "adapt_bn", "model", "flip")
    files, crc = [*data.images, *data.labels], zlib.crc32(json.dumps(INFO).encode())
    if train:
        files += [train.images[i] for i in evenly_spaced_indices(len(train), args.adapt_bn)]
    for path in files:
        status = path.stat()
        crc = zlib.crc32(os.fsencode(f"{path.name} {status.st_size} {status.st_mtime_ns}"), crc)
    return {
        "data_dir": os.path.abspath(args.data_dir),
        **{name: getattr(args, name) for name in names},
        "input_size": list(args.input_size),
        "scales": list(args.scales),
        "batch_size": args.batch_size if args.adapt_bn else None,  # otherwise it does not change the result
        "images": len(data),
        "files_crc32": crc,
        "precision": device.precision("O0", args.conv_precision),
        "simulated": device.simulated(),  # a DryRun
    }


def evaluate_alone(args, net_G: Res_Deeplab, path: str, data: Images, settings: dict) -> None:
    """Print the IoUs of one checkpoint, write them to result.json and, with --save, its predictions."""
    folder = Path(args.save_path)
    with_panel = set(evenly_spaced_indices(len(data), args.panels)) if args.save else ()
    if args.save:
        check_names(data)
    # All kinds, so that outputs of two evaluations do not mix.
    kinds = "result.json", "labelIds", "color", "panels", "legend.png"
    run_folder.archive_old_results(*(folder / kind for kind in kinds))
    if args.save and parallel.rank() == 0:
        save_legend(folder)

    def save(i: int, label: np.ndarray, trainIds: np.ndarray, logits: tuple[Tensor, Tensor]) -> None:
        parallel.exit_if_signalled(i, len(data))
        if args.save:
            save_prediction(folder, data.names[i], trainIds)
        if i in with_panel:
            shape = round(PANEL_WIDTH * label.shape[0] / label.shape[1]), PANEL_WIDTH
            M = alignment_map(*(up(C, shape) for C in logits)).asnumpy()[0, 0]
            with atomic(folder / "panels" / f"{data.names[i]}_panel.png") as temporary:
                panel(open_image(data.images[i]), trainIds, label, M).save(temporary)

    confusion = evaluate(net_G, data, args.classifier, args.batch_size, args.num_workers, save,
                         args.scales, args.flip)  # fmt: skip
    result = {"checkpoint": path, **settings, **summary(confusion)}
    if parallel.rank() == 0:
        write_json(folder / "result.json", result)
    parallel.print_rank0(f"{iou_table(result, args.classes)}written: {folder / 'result.json'}")


def evaluate_folder(args) -> None:
    """Evaluate each GTA5_<steps> checkpoint of a folder, write GTA5_<steps>.json, and miou.csv from these.

    A second start skips checkpoints whose result has the same options, checkpoint, images and labels.
    """
    source, folder = Path(args.restore_from), Path(args.save_path)
    found = dict(run_folder.snapshots(source, "ckpt|pth"))  # if a step has both, the .ckpt, which comes last
    if not found:
        raise UserError(f"{source}: no checkpoint GTA5_<steps>.ckpt or GTA5_<steps>.pth in it")
    given, (args, origin) = args, first_run(args, [found[steps] for steps in sorted(found)])
    data, train = set_up(args, origin)
    settings = {"folder": os.path.abspath(source), **settings_of(args, data, train)}
    settings.pop("classes")  # each result has the means over all sets
    results = earlier_results(folder, found, settings) if parallel.rank() == 0 else {}
    # A training may write more checkpoints meanwhile: rank 0 decides for all.
    todo = parallel.broadcast_from_rank0(sorted(found.keys() - results.keys()))
    done, mean = len(found) - len(todo), mean_name(args.classes)
    parallel.print_rank0(f"{len(found)} checkpoints in {source}, {done} of them evaluated already")
    net_G = generator(args.model)
    for steps in todo:
        path, problem = found.get(steps, source / f"GTA5_{steps}.ckpt"), None
        try:
            version = version_of(path)
            content = checkpoint.read(str(path))
            own, own_origin = with_run(given, path, content)
            if own != args:
                raise UserError(f"{own_origin}, but {origin}; give --input-size, or evaluate it alone")
            checkpoint.load(net_G, content, str(path), "net_G", complete=True)
        except (UserError, OSError) as error:
            problem = str(error)
        if parallel.any_rank(problem):
            parallel.print_rank0(f"skipped {problem or f'{path}: another process could not read it'}")
            continue
        if train:
            adapt_bn(net_G, train, args.adapt_bn, args.batch_size, args.num_workers)
        confusion = evaluate(net_G, data, args.classifier, args.batch_size, args.num_workers,
                             lambda i, *_: parallel.exit_if_signalled(i, len(data)),
                             args.scales, args.flip)  # fmt: skip
        result = {"checkpoint": str(path), **version, **settings, **summary(confusion)}
        parallel.print_rank0(f"{path.name}: {mean} {percent(result[mean])}")
        if parallel.rank() == 0:
            write_json(folder / f"GTA5_{steps}.json", result)
            results[steps] = result
    if parallel.rank() == 0:
        if not results:
            raise UserError(f"{source}: none of its {len(found)} checkpoints can be read")
        write_table(folder / "miou.csv", results, args)


def first_run(args, paths: list[Path]) -> tuple[Namespace, str]:
    """Return `with_run` for the first checkpoint that can be read."""
    for path in paths:
        with suppress(UserError, OSError):
            return with_run(args, path, checkpoint.read(str(path)))
    return with_run(args, paths[0], {})  # each of them will be reported


def earlier_results(folder: Path, found: dict[int, Path], settings: dict) -> dict[int, dict]:
    """Return by steps the results in `folder` that belong to `settings` and to the checkpoints `found`.

    Others are renamed, and miou.csv with them. A result whose checkpoint was deleted stays.
    """
    results, others = {}, []
    for steps, path in run_folder.snapshots(folder, "json"):
        result = read_json(path)
        expected = settings | (version_of(found[steps]) if steps in found else {})
        if isinstance(result, dict) and all(result.get(name) == value for name, value in expected.items()):
            results[steps] = result
        else:
            others.append(path)
    if (others or not results) and (old := rotate_existing(*others, folder / "miou.csv")):
        print(f"earlier results, of other options or files, are now {few(list(map(str, old)))}")
    return results


def version_of(path: Path) -> dict[str, int]:
    """Return size and time of a checkpoint, which identify its version."""
    status = path.stat()  # once: the file may be replaced between two calls
    return {"checkpoint_bytes": status.st_size, "checkpoint_mtime_ns": status.st_mtime_ns}


def write_table(path: Path, results: dict[int, dict], args) -> None:
    """Write results by steps to a table, and print the best of them."""
    mean, views, rows = mean_name(args.classes), views_of(args), []
    for steps, result in sorted(results.items()):
        values = result[mean], *result["IoU"].values()
        rows.append([steps, *("nan" if v is None else f"{v:.9g}" for v in values), *views.values()])
    tables.write(path, ("step", mean, *CLASS_NAMES, *views), rows)
    best = max(sorted(results), key=lambda steps: results[steps][mean] or 0)
    print(f"best: GTA5_{best}, {mean} {percent(results[best][mean])}\n"
          f"{without_label(results[best])}written: {path}")  # fmt: skip


def views_of(args) -> dict[str, str]:
    """Return --scales and --flip as columns of miou.csv; none for their defaults."""
    if args.scales == (1.0,) and not args.flip:
        return {}
    return {"scales": " ".join(f"{scale:g}" for scale in args.scales), "flip": "yes" if args.flip else "no"}


def check_names(data: Images) -> None:
    """Raise UserError if a name is too long for the names of its results, before anything is renamed."""
    for name in data.names:
        if len(os.fsencode(Path(name).name)) > 237:  # 255 with what `save_prediction` and `atomic` add
            raise UserError(f"{name}: too long for the names of its results; give the image a shorter name")


def predict(args, net_G: Res_Deeplab, data: ImageFolder) -> None:
    """Write label ids, colours and overlay of every image, at its own size, to predict/.

    Images and folders that cannot be read are skipped and reported; then UserError at the end.
    """
    folder = Path(args.save_path) / "predict"
    check_names(data)
    run_folder.archive_old_results(folder)
    if parallel.rank() == 0:
        save_legend(folder)
    mine, skipped = parallel.indices_of_rank(len(data)), []

    def read(i: int) -> tuple[int, list[np.ndarray], np.ndarray] | None:
        try:
            return read_views(data, i, args.scales, args.flip)
        except UserError as error:
            tqdm.write(f"skipped {error}")
            skipped.append(data.names[i])

    def readable() -> Iterator[tuple[int, list[np.ndarray], np.ndarray]]:
        for i, item in zip(mine, read_ahead(read, mine, args.num_workers, args.batch_size)):
            parallel.exit_if_signalled(i, len(data))  # for unreadable images, too: all processes call it
            if item:
                yield item

    for i, rgb, trainIds, _ in predictions(net_G, readable(), len(mine), args.classifier, args.batch_size,
                                           args.flip):  # fmt: skip
        save_prediction(folder, data.names[i], trainIds, rgb)
    count = int(parallel.all_reduce_sum(np.array([len(skipped)]))[0])
    parallel.print_rank0(f"{len(data) - count} images, written: {folder}")
    parallel.barrier()  # until rank 0 has printed: msrun kills all processes when one exits
    if count or data.locked:
        named = f": {few(sorted(skipped))}" if skipped else ""  # each process names its own
        lines = [f"{count} of {len(data)} images could not be read and were skipped{named}"] if count else []
        lines += [f"folders that may not be read were skipped: {few(data.locked)}"] if data.locked else []
        raise UserError("; ".join(lines))


def export(args, net_G: Res_Deeplab) -> None:
    """Write CLAN_<model>_<W>x<H>.mindir: (1, 3, H, W) float32, as to_input makes it -> trainIds (1, H, W)."""
    width, height = args.input_size
    path = Path(args.save_path) / f"CLAN_{args.model}_{width}x{height}.mindir"
    run_folder.archive_old_results(path)
    net_G.maxpool = PaddedMaxPool()  # on every device: the file may be for an NPU
    net_G.set_train(False)
    net = Predict(net_G, (height, width), args.classifier)
    x = Tensor(np.zeros((1, 3, height, width), np.float32))
    with atomic(path) as temporary, TemporaryDirectory() as scratch:
        plain = f"{scratch}/net.mindir"  # mindspore.export refuses a path with a space, +, = or Chinese
        mindspore.export(net, x, file_name=plain, file_format="MINDIR")
        shutil.copyfile(plain, temporary)
    print(f"input: (1, 3, {height}, {width}) float32, bicubic, BGR from 0 to 255 minus {IMG_MEAN}; "
          f"output: trainIds (1, {height}, {width}) int32\nwritten: {path}")  # fmt: skip


if __name__ == "__main__":
    run_script(main, args)
