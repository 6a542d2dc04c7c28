"""The demo: the real training and evaluation code on generated street scenes, with a small network.

Stage A trains on the source alone, from scratch. Stage B continues from its checkpoint three times, with
equal steps, schedule and source images: source only; the control, where target images pass through the
network, and so through its BN statistics, without a discriminator (lambda_adv 0); CLAN. Each is evaluated on
the target's val set, with BN statistics re-estimated on unlabelled target images and with the running ones.
Target labels are for evaluation only.

Every training is a process of its own. On the CPU those of stage B run at the same time, as the small network
cannot keep two cores busy.
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
ADAPT, BATCH = 160, 20  # images for the BN statistics; per batch of the evaluation
SHOWN = (3, 31, 62, 85)  # images of the val set in demo.png


def demo(args) -> None:
    """Run the demo; write demo.png and demo_result.json to --snapshot-dir."""
    started, folder, steps, seed = time.time(), Path(args.snapshot_dir), args.num_steps, args.random_seed
    if (folder / "stage_a").exists():
        raise UserError(f"{folder} already holds a demo; choose another --snapshot-dir or move that one away")
    data = write_demo_data("./data/demo", seed)
    try:
        run_stages(args, data)
    except SystemExit:  # the hint that a training prints is about that training alone
        print(f"to begin again, move {folder} away and start the demo as before")
        raise

    print("\nevaluating on the target's val set")
    val = cityscapesDataSet(data / "Cityscapes", "val", size=SIZE, labels=True)
    unlabelled = cityscapesDataSet(data / "Cityscapes", "train", size=SIZE)
    net_G, result, logits = generator("small").set_train(False), {}, {}
    for name in METHODS:
        path = folder / name / f"GTA5_{steps}.ckpt"
        result[name] = evaluate_both_bn(net_G, path, val, unlabelled, args.num_workers)
        logits[name] = [up(c, SIZE[::-1]) for c in net_G(Tensor(np.stack([val[i][0] for i in SHOWN])))]

    with atomic(folder / "demo.png") as temporary:
        comparison(val, logits["source"], logits["clan"]).save(temporary)
    seconds = time.time() - started
    write_json(folder / "demo_result.json", {**result, "seed": seed, "steps": steps,
                                             "seconds": round(seconds, 1), "versions": device.versions()})
    print(table(result))
    print(f"{seconds:.0f} s in all; written: {folder / 'demo.png'}, {folder / 'demo_result.json'}")


def run_stages(args, data: Path) -> None:
    """Train stage A, then the METHODS of stage B from its checkpoint, each into a folder of its own."""
    folder, steps_a = Path(args.snapshot_dir), args.num_steps * 5 // 2
    machine = {"--device": device.target(), "--device-id": args.device_id, "--mode": args.mode,
               "--conv-precision": args.conv_precision, "--num-workers": args.num_workers,
               **({"--jit-level": args.jit_level} if args.jit_level else {})}
    faster = ["--save-memory"] if device.on_cpu() else []  # its compilation pays after 200 steps

    def command(name: str, steps: int, options: list[str]) -> list[str]:
        options = [*options, *faster, *flat(machine)]
        return build_argv(data, folder / name, steps, args.random_seed, options)

    train({"stage_a": command("stage_a", steps_a, STAGE_A)})
    start = [*STAGE_B, "--restore-from", str(folder / "stage_a" / f"GTA5_{steps_a}.ckpt")]
    stage_b = {name: command(name, args.num_steps, [*start, *options]) for name, options in METHODS.items()}
    for commands in [stage_b] if device.on_cpu() else [{name: argv} for name, argv in stage_b.items()]:
        train(commands)  # an NPU runs one training at a time


def train(commands: dict[str, list[str]]) -> None:
    """Run the training script once with each of these lists of options, all at the same time.

    Their output is shown with their name in front. Raises UserError if one fails, and SystemExit after a
    signal, both once all have ended.
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
    failed = [(name, code) for name, code in zip(commands, codes) if code]
    for name, code in sorted(failed, key=lambda pair: pair[1] == 143):  # 143: told to end, as another failed
        raise UserError(f"{name} ended with exit code {code}; its last lines say why")


def show(name: str, lines: TextIO) -> None:
    """Print what a process writes to a pipe, line by line, with its name in front."""
    with lines:
        for line in lines:
            print(name + line, end="", flush=True)


def wait_for(processes: list[subprocess.Popen]) -> list[int]:
    """Return the exit codes once all have ended.

    After a signal to this process, or if one of them fails, SIGTERM tells the others to end; a training does
    so after its step.
    """
    while None in (codes := [process.poll() for process in processes]):
        if interrupt.pending_signal() or any(codes):
            for process in processes:
                process.terminate()  # does nothing if it has ended
            return [process.wait() for process in processes]
        time.sleep(0.2)
    return codes


def flat(options: dict) -> list[str]:
    """Return {"--num-steps": 500} as ["--num-steps", "500"]."""
    return [str(word) for pair in options.items() for word in pair]


def build_argv(
    data: Path, folder: Path, steps: int, seed: int, options: list[str], source: str = "GTA5"
) -> list[str]:
    """Return the options of a training of the small network on the images that were generated in `data`."""
    own = {"--data-dir": data / source, "--data-dir-target": data / "Cityscapes", "--num-steps": steps,
           "--preheat-steps": steps // 10, "--save-pred-every": steps, "--snapshot-dir": folder,
           "--random-seed": seed}
    return [*COMMON, *options, *flat(own)]


def evaluate_both_bn(
    net_G: Res_Deeplab, path: Path, val: cityscapesDataSet, unlabelled: cityscapesDataSet, workers: int = 4
) -> dict:
    """Load a checkpoint into net_G and evaluate it on `val`, in percent.

    mIoU, and IoU of each class, are those with BN statistics re-estimated on `unlabelled`, which net_G keeps;
    mIoU_running is that with the checkpoint's own statistics.
    """

    def confusion() -> np.ndarray:
        return evaluate(net_G, val, "sum", BATCH, workers, interrupt.exit_if_pending)

    checkpoint.load(net_G, checkpoint.read(str(path)), str(path), "net_G")
    running = mean_iou(confusion())
    adapt_bn(net_G, unlabelled, ADAPT, BATCH, workers)
    adapted = confusion()
    return {"mIoU": mean_iou(adapted), "mIoU_running": running,
            "IoU": {c: number_or_none(v) for c, v in zip(CLASS_NAMES, class_iou(adapted))}}


def comparison(val: cityscapesDataSet, source: list[Tensor], clan: list[Tensor]) -> Image.Image:
    """Return demo.png: a row for each of the images SHOWN, with predictions, ground truth, alignment map.

    `source` and `clan` are the logits of C1 and C2 for these images, (N, classes, H, W) each.
    """
    M = alignment_map(*clan).asnumpy()[:, 0]
    top = float(np.quantile(M, 0.995))
    prediction = [(c1 + c2).asnumpy().argmax(1) for c1, c2 in (source, clan)]
    rows = [[np.asarray(Image.open(val.images[i])), *(colourise(p[n]) for p in prediction),
             colourise(val[i][1]), heatmap(M[n] / top)] for n, i in enumerate(SHOWN)]
    captions = ["target image", "source only", "CLAN", "ground truth", "alignment map M (CLAN)"]
    return panels(rows, captions, top, 160, CLASSES)


def table(result: dict) -> str:
    """Return a table of IoU of each class and mIoU with both kinds of BN statistics, a column per method."""
    rows = [("", [f"{name:>9}" for name in result])]
    for c in CLASS_NAMES:
        ious = [r["IoU"][c] for r in result.values()]
        rows.append((c, [f"{'–':>9}" if iou is None else f"{iou:9.1f}" for iou in ious]))
    rows += [("mIoU", [f"{r['mIoU']:9.2f}" for r in result.values()]),
             ("mIoU, running BN statistics", [f"{r['mIoU_running']:9.2f}" for r in result.values()])]
    return "\n".join(f"{name:<26}" + "".join(cells) for name, cells in rows)
