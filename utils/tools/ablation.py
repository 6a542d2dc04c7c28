"""Ablation of CLAN on the demo's domains over seeds, with its baselines, on the CPU.

    python -m utils.tools.ablation [--tune] [--jobs 2] [--markdown FILE]
    python -m utils.tools.ablation --camvid DIR --idd DIR --tune ...

The second command compares the baselines and CLAN on photographs: from CamVid to IDD-Lite.

Per seed, stage A trains on the source from scratch, and from its checkpoint one stage B for each of ROWS, all
with equal steps, schedule and source images. Every training is a process of its own. Its last checkpoint is
evaluated on the target's val set; the result is FOLDER/seed<seed>/<row>/result.json. A second start does only
what has no result yet. --tune first chooses lambda_adv of TAN and CLAN, each from the same values, on seeds
that are not reported.
"""

import os
import shutil
import statistics
import sys
from argparse import Namespace
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

if not __package__:  # started as a file, not with -m
    sys.path[0] = str(Path(__file__).parents[2])

from utils.system import device, interrupt  # isort: skip

device.prepare_environment()  # before mindspore is imported
if __name__ == "__main__":
    interrupt.block()  # Ctrl-C and SIGTERM are looked for between two images

from model.CLAN_G import Res_Deeplab, generator
from options import Parser, number, train_options
from utils import run_folder
from utils.system.errors import run_script
from utils.system.files import atomic, atomic_folder, read_json, rotate_existing, write_json
from utils.tools import demo
from utils.tools.camvid_idd import convert
from utils.tools.demo_scenes import write_demo_data

ROWS = {  # row: its label in the table, its method in the demo, further options
    "source": ("source only", "source"),
    "control": ("control: CLAN, lambda_adv 0", "control"),
    "tan": ("TAN: vanilla adversarial", "tan"),
    "clan": ("CLAN: lambda_local 40, epsilon 0.4", "clan"),
    "untrained_D": ("CLAN, D never learns", "clan", "--learning-rate-D", "1e-12"),  # changes below 1e-9
    "no_weight": ("CLAN, no weight discrepancy", "clan", "--lambda-weight", "0"),
    "no_map": ("CLAN, no alignment map", "clan", "--lambda-local", "0", "--epsilon", "1"),
    "not_detached": ("CLAN, M not detached", "clan", "--no-detach-weight-map"),  # as in the released code
    "local_10": ("CLAN, lambda_local 10", "clan", "--lambda-local", "10"),
    "local_20": ("CLAN, lambda_local 20", "clan", "--lambda-local", "20"),
    "local_80": ("CLAN, lambda_local 80", "clan", "--lambda-local", "80"),
    "epsilon_0": ("CLAN, epsilon 0", "clan", "--epsilon", "0"),
    "epsilon_1": ("CLAN, epsilon 1", "clan", "--epsilon", "1"),
    "oracle": ("oracle: the target's labels", "source"),
}
DEMO = {"steps": 500, "folder": "./checkpoint/ablation", "rows": list(ROWS)}  # defaults of options
PHOTOS = {"steps": 800, "folder": "./checkpoint/camvid-idd",
          "rows": ["source", "control", "tan", "clan", "oracle"]}
PHOTO_DATA, PHOTO_SIZE = "./data/camvid-idd", ["--input-size", "192,136", "--input-size-target", "192,136"]
TUNED, GRID, TUNING_SEEDS = ("tan", "clan"), ("0.3", "1", "3"), [101, 102]
TUNING_TEXT = ", ".join(map(str, TUNING_SEEDS))
BASES = {"source": "source", "control": "control", "tan": "TAN", "clan": "CLAN"}  # to which rows are compared
STATISTICS = {"re-estimated BN statistics": "mIoU", "running BN statistics": "mIoU_running"}


def runs_of_seed(args: Namespace, seed: int, rows: dict[str, list[str]]) -> dict[str, tuple[Path, list[str]]]:
    """Return all runs of a seed, {name: (folder, options of the training script)}; generate missing images.

    `rows`: the method's options of each row.
    """
    if args.camvid:
        data, steps_a = convert(args.camvid, args.idd, PHOTO_DATA), args.steps * 25 // 8
        warm_up, common = ["--preheat-steps", str(args.steps // 4)], [*PHOTO_SIZE, "--device", "cpu"]
    else:
        data, steps_a = write_demo_data("./data/demo", seed), args.steps * 5 // 2
        warm_up, common = [], ["--device", "cpu"]
    add_oracle(data)
    folder = Path(args.folder) / f"seed{seed}"
    stage_a = demo.build_argv(data, folder / "stage_a", steps_a, seed, [*demo.STAGE_A, *common])
    runs = {"stage_a": (folder / "stage_a", [*stage_a, *warm_up])}
    start = ["--restore-from", folder / "stage_a" / f"GTA5_{steps_a}.ckpt"]
    for row, method in rows.items():
        options, source = [*demo.STAGE_B, *method, *start, *common], "Oracle" if row == "oracle" else "GTA5"
        runs[row] = folder / row, demo.build_argv(data, folder / row, args.steps, seed, options, source)
    return runs


def add_oracle(data: Path) -> None:
    """Copy the target's train images and their labels to Oracle/, in GTA5's layout, unless that exists."""
    if (data / "Oracle").is_dir():
        return
    with atomic_folder(data / "Oracle") as draft:
        for kind, tree, ending in (("images", "leftImg8bit", "_leftImg8bit"),
                                   ("labels", "gtFine", "_gtFine_labelIds")):
            (draft / kind).mkdir()
            for path in (data / "Cityscapes" / tree / "train").rglob("*.png"):
                shutil.copyfile(path, draft / kind / path.name.replace(ending, ""))


def run_all(args: Namespace, seeds: list[int], rows: dict[str, list[str]]) -> dict[tuple[int, str], dict]:
    """Do the runs of all seeds, training --jobs at a time; return {(seed, name): result}."""
    runs = {(seed, name): run for seed in seeds for name, run in runs_of_seed(args, seed, rows).items()}
    results, net_G = {}, generator("small")
    for names in (["stage_a"], rows):  # the rows start from the checkpoints of stage A
        keys = [(seed, name) for seed in seeds for name in names]
        with ThreadPoolExecutor(args.jobs) as pool:
            for key, _ in zip(keys, pool.map(lambda key: train(*runs[key], args.jobs), keys)):
                interrupt.exit_if_pending()
                results[key] = result = known_result(*runs[key]) or evaluate(*runs[key], net_G)
                text = f"mIoU {result['mIoU']:.2f} (running {result['mIoU_running']:.2f})"
                print(f"{len(results)}/{len(runs)}  seed {key[0]}, {key[1]}: {text}", flush=True)
    return results


def known_result(folder: Path, argv: list[str]) -> dict | None:
    """Return the result of a run if it was done with these options."""
    result = read_json(folder / "result.json")
    return result if result and result.get("command") == argv else None


def train(folder: Path, argv: list[str], jobs: int) -> None:
    """Train with these options, unless the result is known; rename the folder if it has anything else."""
    if known_result(folder, argv) or interrupt.pending_signal():
        return
    if folder.exists():
        # A run may outlive the process that started it.
        lock = run_folder.lock_run_dir(folder, option="--folder")
        rotate_existing(folder)
        os.close(lock)
    demo.train(f"{folder.parent.name}/{folder.name}", argv, jobs)


def evaluate(folder: Path, argv: list[str], net_G: Res_Deeplab) -> dict:
    """Evaluate the last checkpoint of a training with these options; write and return its result.json."""
    args = train_options.get_arguments(argv)
    path = folder / f"GTA5_{args.num_steps_stop}.ckpt"
    result = demo.evaluate_both_bn(net_G, path, args.data_dir_target, args.input_size_target)
    write_json(folder / "result.json", {**result, "command": argv})
    return result


def tune(args: Namespace) -> tuple[dict[str, str], str]:
    """Choose lambda_adv of TAN and of CLAN by the mean mIoU over the tuning seeds.

    Returns {method: lambda_adv}, and a sentence for the table.
    """
    rows = {f"{method}_adv_{value}": [*demo.METHODS[method], "--lambda-adv", value]
            for method in TUNED for value in GRID}
    results = run_all(args, TUNING_SEEDS, rows)
    chosen, texts = {}, []
    for method in TUNED:
        means = {v: statistics.fmean(results[seed, f"{method}_adv_{v}"]["mIoU"] for seed in TUNING_SEEDS)
                 for v in GRID}
        chosen[method] = max(GRID, key=means.get)
        texts.append(f"{method.upper()} " + ", ".join(f"{v}: {mean:.2f}" for v, mean in means.items()))
    return chosen, (f"lambda_adv {chosen['tan']} for TAN, {chosen['clan']} for CLAN, each the best of "
                    f"{', '.join(GRID)} on seeds {TUNING_TEXT} (mIoU {'; '.join(texts)}).")


def table(results: dict, rows: list[str], seeds: list[int]) -> str:
    """Return Markdown, in points of mIoU: a table for each kind of BN statistics.

    Cells are mean (sd) over seeds of mIoU, and of its differences to BASES, paired by seed.
    """

    def cell(values: list[float], sign: str = "") -> str:
        sd = f" ({statistics.stdev(values):.2f})" if len(values) > 1 else ""
        return f"{statistics.fmean(values):{sign}.2f}{sd}"

    lines = []
    for title, name in STATISTICS.items():
        lines += [f"| {title} | n | mIoU | " + " | ".join(f"− {base}" for base in BASES.values()) + " |",
                  "|---" * (3 + len(BASES)) + "|"]
        values = {row: [results[seed, row][name] for seed in seeds] for row in rows}
        for row in rows:
            cells = [ROWS[row][0], str(len(seeds)), cell(values[row])]
            for base in BASES:
                known = base in rows and base != row
                cells.append(cell([a - b for a, b in zip(values[row], values[base])], "+") if known else "–")
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines) + "\n"


def main(args: Namespace) -> None:
    run_folder.lock_run_dir(Path(args.folder), "working", "--folder")  # until this process ends
    device.setup(train_options.get_arguments(["--device", "cpu"]))
    chosen, origin = tune(args) if args.tune else ({}, "lambda_adv 1 for TAN and CLAN, not tuned (--tune).")
    rows = {}
    for row in args.rows:
        _, method, *options = ROWS[row]
        lambda_adv = ["--lambda-adv", chosen[method]] if method in chosen else []
        rows[row] = [*demo.METHODS[method], *lambda_adv, *options]
    results = run_all(args, args.seeds, rows)
    text = (f"{table(results, args.rows, args.seeds)}{'CamVid to IDD-Lite, ' if args.camvid else ''}"
            f"{args.steps} steps; mean (standard deviation) over seeds {', '.join(map(str, args.seeds))}, "
            "points of mIoU on the target's val set; differences are paired by seed. "
            f"{origin}\n")
    print(f"\n{text}")
    if args.markdown:
        with atomic(args.markdown) as temporary:
            temporary.write_text(text, encoding="utf-8")


def list_of(kind: Callable[[str], object]) -> Callable[[str], list]:
    """Return an argparse type: values of a `kind` with commas between them; repeated ones count once."""
    return lambda text: list(dict.fromkeys(map(kind, text.split(","))))


def get_arguments() -> Namespace:
    parser = Parser(__doc__.splitlines()[0])
    add = parser.add_argument
    add("--tune", action="store_true", help=f"first choose lambda_adv of TAN and CLAN from {', '.join(GRID)} "
        f"on seeds {TUNING_TEXT}; otherwise 1")
    add("--seeds", type=list_of(number(int, 0, 2**31 - 1)), default="1,2,3,4,5", help="with commas between")
    add("--camvid", metavar="DIR", help="CamVid in SegNet's version: {train,val,test} and {...}annot")
    add("--idd", metavar="DIR", help=f"IDD-Lite: leftImg8bit and gtFine; both are converted to {PHOTO_DATA}")
    add("--rows", type=list_of(str), help=f"with commas between, of {', '.join(ROWS)} "
        f"(default: all; with --camvid {', '.join(PHOTOS['rows'])})")
    add("--steps", type=number(int, 1), help="of stage B; stage A takes 2.5 times as many, with --camvid "
        f"3.125 times (default: {DEMO['steps']}, with --camvid {PHOTOS['steps']})")
    add("--jobs", type=number(int, 1), default=1, help="trainings at a time, which share the processors")
    add("--folder", help=f"of all runs (default: {DEMO['folder']}, with --camvid {PHOTOS['folder']})")
    add("--markdown", metavar="FILE", help="also write the table to this file")
    args = parser.parse_args()
    if bool(args.camvid) != bool(args.idd):
        parser.error("--camvid and --idd belong together: name the folders of both data sets")
    if set(args.seeds) & set(TUNING_SEEDS):
        parser.error(f"--seeds: lambda_adv is chosen on {TUNING_TEXT}; take others")
    for name, value in (PHOTOS if args.camvid else DEMO).items():
        setattr(args, name, getattr(args, name) or value)
    if unknown := [row for row in args.rows if row not in ROWS]:
        parser.error(f"--rows {unknown[0]}: no such row; there are {', '.join(ROWS)}")
    return args


if __name__ == "__main__":
    run_script(main, get_arguments())
