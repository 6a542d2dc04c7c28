"""The embedded demo: the real training and evaluation code on rendered streets, with a small network.

Stage A trains on the source alone, from scratch. Stage B continues from there three times, with equal steps,
schedule and source images: source only; the control, where target images pass through the network (and
so through its BN statistics) without a discriminator (lambda_adv 0); CLAN. Each is evaluated on the target's
val set, with BN statistics re-estimated on unlabelled target images and with the running ones. Target
labels are for evaluation only.

Every training is a process of its own. On the CPU those of stage B run at the same time: the small network
keeps no two cores busy.
"""
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path
from threading import Thread
from typing import TextIO

import numpy as np
from mindspore import Tensor
from PIL import Image

from dataset.cityscapes_dataset import cityscapesDataSet
from dataset.classes import CLASS_NAMES
from model.CLAN_G import Res_Deeplab, generator
from model.upsample import up
from utils import checkpoint
from utils.evaluation import adapt_bn, evaluate
from utils.loss import alignment_map
from utils.metrics import class_iou, mean_iou, number_or_none
from utils.system import device, interrupt
from utils.system.errors import UserError
from utils.system.files import atomic, write_json
from utils.tools.demo_scenes import write_demo_data
from utils.visual import CLASSES, colourise, heatmap, panels

TRAIN = Path(__file__).parents[2] / "CLAN_train_gta5_2_city.py"
SIZE = (192, 96)
COMMON = ["--model", "small", "--input-size", "192,96", "--input-size-target", "192,96", "--batch-size", "2",
          "--random-mirror", "--classifier-lr-mult", "1", "--not-val"]
STAGE_A = ["--method", "source", "--learning-rate", "0.06", "--train-bn-affine", "--restore-from", "none"]
STAGE_B = ["--learning-rate", "0.05"]
CLAN = ["--method", "clan", "--learning-rate-D", "0.001", "--lambda-weight", "0.1", "--detach-weight-map"]
METHODS = {"source": ["--method", "source"], "control": [*CLAN, "--lambda-adv", "0"],
           "clan": [*CLAN, "--lambda-adv", "1"]}
ADAPT, BATCH, SHOWN = 160, 20, (3, 31, 62, 85)  # images for BN statistics; at a time; in demo.png


def demo(args) -> None:
    """Run the demo; demo.png and demo_result.json go to --snapshot-dir."""
    started, folder, steps, seed = time.time(), Path(args.snapshot_dir), args.num_steps, args.random_seed
    if (folder / "stage_a").exists():
        raise UserError(f"{folder} already holds a demo; choose another --snapshot-dir or move that one away")
    data = write_demo_data("./data/demo", seed)
    machine = {"--device": device.target(), "--device-id": args.device_id, "--mode": args.mode,
               "--conv-precision": args.conv_precision, "--num-workers": args.num_workers,
               **({"--jit-level": args.jit_level} if args.jit_level else {})}

    def command(name: str, steps: int, options: list[str]) -> list[str]:
        faster = ["--save-memory"] if device.on_cpu() else []  # pays after 200 steps
        return build_argv(data, folder / name, steps, seed, [*options, *faster, *flat(machine)])

    last = {name: folder / name / f"GTA5_{steps}.ckpt" for name in METHODS}
    stage_a = folder / "stage_a" / f"GTA5_{steps * 5 // 2}.ckpt"
    start = [*STAGE_B, "--restore-from", str(stage_a)]
    stage_b = {name: command(name, steps, [*start, *options]) for name, options in METHODS.items()}
    try:
        train({"stage_a": command("stage_a", steps * 5 // 2, STAGE_A)})
        if device.on_cpu():
            train(stage_b)
        else:  # one NPU
            for name, argv in stage_b.items():
                train({name: argv})
    except SystemExit:  # the hint that a stage prints is about that stage alone
        print(f"to begin again, move {folder} away and start the demo as before")
        raise

    print("\nevaluating on the target's val set")
    val = cityscapesDataSet(data / "Cityscapes", "val", size=SIZE, labels=True)
    unlabelled = cityscapesDataSet(data / "Cityscapes", "train", size=SIZE)
    net_G, result, logits = generator("small"), {}, {}

    for name, path in last.items():
        result[name] = score(net_G, path, val, unlabelled, args.num_workers)
        logits[name] = [up(c, SIZE[::-1]) for c in net_G(Tensor(np.stack([val[i][0] for i in SHOWN])))]

    with atomic(folder / "demo.png") as temporary:
        comparison(val, logits["source"], logits["clan"]).save(temporary)
    seconds = time.time() - started
    write_json(folder / "demo_result.json", {**result, "seed": seed, "steps": steps,
                                             "seconds": round(seconds, 1), "versions": device.versions()})
    print(table(result))
    print(f"{seconds:.0f} s in all; written: {folder / 'demo.png'}, {folder / 'demo_result.json'}")


def train(commands: dict[str, list[str]]) -> None:
    """Run the training script once with each of these lists of options, all at the same time.

    What they print comes with their name in front. Raises UserError if one fails, and SystemExit after a
    signal, once all have saved and ended.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    limit = os.environ.get("OMP_NUM_THREADS", "")
    threads = (min(int(limit), cores) if limit.isdecimal() else cores) // len(commands)
    environment = {**os.environ, "OMP_NUM_THREADS": str(max(threads, 1))}
    processes, readers = [], []
    for name, argv in commands.items():
        print(f"\n{name}: python {TRAIN.name} {shlex.join(argv)}", flush=True)
        process = subprocess.Popen([sys.executable, TRAIN, *argv], env=environment, encoding="utf-8",
                                   stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        processes.append(process)
        readers.append(Thread(target=show, args=(f"{name:<7} | ", process.stdout)))
        readers[-1].start()
    codes = wait_for(processes)
    for reader in readers:
        reader.join()
    interrupt.exit_if_pending()
    # 143: told to end because another failed
    failed = sorted((code == 143, name, code) for name, code in zip(commands, codes) if code)
    if failed:
        _, name, code = failed[0]
        raise UserError(f"{name} ended with exit code {code}; its last lines say why")


def show(name: str, lines: TextIO) -> None:
    with lines:  # closed if nobody reads ours, so that the process ends as well
        for line in lines:
            print(name + line, end="", flush=True)


def wait_for(processes: list[subprocess.Popen]) -> list[int]:
    """Return the exit codes once all have ended.

    After a signal to this process, or if one of them fails, the others are told to end, which a training does
    after its step.
    """
    while None in (codes := [process.poll() for process in processes]):
        if interrupt.pending_signal() or any(codes):
            for process in processes:
                process.terminate()  # nothing, if it has ended
            return [process.wait() for process in processes]
        time.sleep(0.2)
    return codes


def flat(options: dict) -> list[str]:
    """{"--num-steps": 500} -> ["--num-steps", "500"]."""
    return [str(word) for pair in options.items() for word in pair]


def build_argv(
    data: Path, folder: Path, steps: int, seed: int, options: list[str], source: str = "GTA5"
) -> list[str]:
    """The command line of one training of the small network on the images generated in `data`."""
    own = {"--data-dir": data / source, "--data-dir-target": data / "Cityscapes", "--num-steps": steps,
           "--preheat-steps": steps // 10, "--save-pred-every": steps, "--snapshot-dir": folder,
           "--random-seed": seed}
    return [*COMMON, *options, *flat(own)]


def score(
    net_G: Res_Deeplab, path: Path, val: cityscapesDataSet, unlabelled: cityscapesDataSet, workers: int = 4
) -> dict:
    """mIoU (and IoU of each class) of a checkpoint on `val`, in percent, with BN statistics re-estimated
    on `unlabelled`, which net_G then keeps; mIoU_running with the checkpoint's own."""

    def confusion() -> np.ndarray:
        return evaluate(net_G, val, "sum", BATCH, workers, interrupt.exit_if_pending)

    checkpoint.load(net_G, checkpoint.read(str(path)), str(path), "net_G")
    running = mean_iou(confusion())
    adapt_bn(net_G, unlabelled, ADAPT, BATCH, workers)
    adapted = confusion()
    return {"mIoU": mean_iou(adapted), "mIoU_running": running,
            "IoU": {c: number_or_none(v) for c, v in zip(CLASS_NAMES, class_iou(adapted))}}


def comparison(val: cityscapesDataSet, source: list[Tensor], clan: list[Tensor]) -> Image.Image:
    """For a few images: the image, both predictions, the ground truth and CLAN's alignment map.

    `source` and `clan` are the logits of C1 and C2 for the images SHOWN, (N, classes, H, W) each.
    """
    M = alignment_map(*clan).asnumpy()[:, 0]
    top = float(np.quantile(M, 0.995))
    prediction = [(c1 + c2).asnumpy().argmax(1) for c1, c2 in (source, clan)]
    rows = [[np.asarray(Image.open(val.images[i])), *(colourise(p[n]) for p in prediction),
             colourise(val[i][1]), heatmap(M[n] / top)] for n, i in enumerate(SHOWN)]
    captions = ["target image", "source only", "CLAN", "ground truth", "alignment map M (CLAN)"]
    return panels(rows, captions, top, 160, CLASSES)


def table(result: dict) -> str:
    """IoU of each class, mIoU, mIoU with running BN statistics, in percent, one column per method."""
    rows = [("", [f"{name:>9}" for name in result])]
    for c in CLASS_NAMES:
        ious = [r["IoU"][c] for r in result.values()]
        rows.append((c, [f"{'–':>9}" if iou is None else f"{iou:9.1f}" for iou in ious]))
    rows += [("mIoU", [f"{r['mIoU']:9.2f}" for r in result.values()]),
             ("mIoU, running BN statistics", [f"{r['mIoU_running']:9.2f}" for r in result.values()])]
    return "\n".join(f"{name:<26}" + "".join(cells) for name, cells in rows)
