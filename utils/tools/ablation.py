"""Ablation of CLAN on the demo's domains over seeds, with its baselines, on the CPU.

    python -m utils.tools.ablation [--tune] [--jobs 2] [--markdown FILE] [--chart FILE]
    python -m utils.tools.ablation --camvid DIR --idd DIR --tune ...

The second command compares the baselines and CLAN on photographs: from CamVid to IDD-Lite.

`runs_of_seed` says what is run: per seed one stage A, which trains on the source from scratch, and from its
checkpoint one stage B for each of ROWS, all with equal steps, schedule and source images. `do_run` says how:
the training script in one process, then the evaluation of its last checkpoint on the target's val set in
another, which writes FOLDER/seed<seed>/<row>/result.json. A second start does only what has no result yet.
With --tune, lambda_adv of TAN and CLAN is first chosen, each from the same values, on seeds not reported.
"""

import os
import shutil
import statistics
import subprocess
import sys
import time
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

from model.CLAN_G import generator
from options import Parser, number, train_options
from utils import run_folder
from utils.system.errors import UserError, run_script
from utils.system.files import atomic, atomic_folder, read_json, rotate_existing, write_json
from utils.tools import demo
from utils.tools.bars import bars
from utils.tools.camvid_idd import convert
from utils.tools.demo_scenes import write_demo_data

METHODS = {
    "source": ["--method", "source"],
    "control": [*demo.CLAN, "--lambda-adv", "0"],
    "tan": ["--method", "tan", "--learning-rate-D", "0.001"],  # lambda_adv of this one and the next is tuned
    "clan": demo.CLAN,
}
ROWS = {  # row: its label in the table, its method, further options
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
STEPS, FOLDER = 500, "./checkpoint/ablation"
PHOTO_STEPS, PHOTO_FOLDER, PHOTO_DATA = 800, "./checkpoint/camvid-idd", "./data/camvid-idd"
PHOTO_ROWS = ["source", "control", "tan", "clan", "oracle"]
PHOTO_SIZE = ["--input-size", "192,136", "--input-size-target", "192,136"]
TUNED, GRID, TUNING_SEEDS = ("tan", "clan"), ("0.3", "1", "3"), [101, 102]
BASES = {"source": "source", "control": "control", "tan": "TAN", "clan": "CLAN"}  # to which rows are compared
STATISTICS = {"re-estimated BN statistics": "mIoU", "running BN statistics": "mIoU_running"}


def options_of(row: str, lambda_adv: dict[str, str]) -> list[str]:
    """Return the method's options of a row; `lambda_adv` has the tuned value of TAN and of CLAN."""
    _, method, *options = ROWS[row]
    tuned = ["--lambda-adv", lambda_adv[method]] if method in TUNED else []
    return [*METHODS[method], *tuned, *options]


def runs_of_seed(args: Namespace, seed: int, rows: dict[str, list[str]]) -> dict[str, tuple[Path, list[str]]]:
    """Return all runs of a seed, {name: (folder, options of the training script)}; generate missing images.

    `rows`: the method's options of each row.
    """
    if args.camvid:
        data, steps_a = convert(args.camvid, args.idd, PHOTO_DATA), args.steps * 25 // 8
        warm_up, common = ["--preheat-steps", str(args.steps // 4)], [*PHOTO_SIZE, "--device", "cpu"]
    else:
        data, steps_a = demo_data(seed), args.steps * 5 // 2
        warm_up, common = [], ["--device", "cpu"]
    folder = Path(args.folder) / f"seed{seed}"
    place, options = folder / "stage_a", [*demo.STAGE_A, *common]
    runs = {"stage_a": (place, [*demo.build_argv(data, place, steps_a, seed, options), *warm_up])}
    start = ["--restore-from", str(place / f"GTA5_{steps_a}.ckpt")]
    for row, method in rows.items():
        options, source = [*demo.STAGE_B, *method, *start, *common], "Oracle" if row == "oracle" else "GTA5"
        runs[row] = folder / row, demo.build_argv(data, folder / row, args.steps, seed, options, source)
    return runs


def demo_data(seed: int) -> Path:
    """Return the folder of the demo's images of a seed; generate it if it is missing.

    Oracle/ in it has the labelled train images of the target, in GTA5's layout.
    """
    data = write_demo_data("./data/demo", seed)
    if not (data / "Oracle").is_dir():
        with atomic_folder(data / "Oracle") as draft:
            for kind, place in (("images", "leftImg8bit"), ("labels", "gtFine")):
                (draft / kind).mkdir()
                for n, path in enumerate(sorted((data / "Cityscapes" / place / "train").rglob("*.png")), 1):
                    shutil.copyfile(path, draft / kind / f"{n:05d}.png")
    return data


def run_all(args: Namespace, seeds: list[int], rows: dict[str, list[str]]) -> dict[tuple[int, str], dict]:
    """Do the runs of all seeds, --jobs at a time; return {(seed, name): result}."""
    runs = {(seed, name): run for seed in seeds for name, run in runs_of_seed(args, seed, rows).items()}
    results = {}
    for names in (["stage_a"], rows):  # the rows start from the checkpoints of stage A
        keys = [(seed, name) for seed in seeds for name in names]
        with ThreadPoolExecutor(args.jobs) as pool:
            for key, result in zip(keys, pool.map(lambda key: do_run(*runs[key], args.jobs), keys)):
                interrupt.exit_if_pending()
                results[key] = result
                text = f"mIoU {result['mIoU']:.2f} (running {result['mIoU_running']:.2f})"
                print(f"{len(results)}/{len(runs)}  seed {key[0]}, {key[1]}: {text}", flush=True)
    return results


def do_run(folder: Path, command: list[str], jobs: int) -> dict | None:
    """Train and evaluate in processes of their own, unless that is done; return the content of result.json.

    A folder with anything else, such as a result of other options, is renamed. UserError if a process fails.
    After a signal the result is None: a running process is told to end, which it does after its step.
    """
    result = read_json(folder / "result.json")
    if result and result.get("command") == command:
        return result
    if folder.exists():
        # A run may outlive the process that started it.
        lock = run_folder.lock_run_dir(folder, option="--folder")
        rotate_existing(folder)
        os.close(lock)
    folder.mkdir(parents=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"} if jobs > 1 else None
    with open(folder / "output.log", "w", encoding="utf-8") as log:
        for program in ([demo.TRAIN], [__file__, "--evaluate"]):
            if interrupt.pending_signal():
                return None
            child = [sys.executable, *program, *command]
            process = subprocess.Popen(child, env=environment, stdout=log, stderr=subprocess.STDOUT)
            [code] = demo.wait_for([process])
            if code and not interrupt.pending_signal():
                raise UserError(f"a run failed (exit code {code}): see {log.name}; the same command resumes")
    return read_json(folder / "result.json")


def evaluate_run(args: Namespace) -> None:
    """Evaluate the last checkpoint of a training with these options, and write its result.json."""
    folder = Path(args.snapshot_dir)
    path, started = folder / f"GTA5_{args.num_steps_stop}.ckpt", (folder / "options.json").stat().st_mtime
    device.setup(args)
    result = demo.evaluate_both_bn(generator("small"), path, args.data_dir_target, args.input_size_target)
    write_json(folder / "result.json", {
        **result, "seconds": round(time.time() - started, 1), "command": sys.argv[2:],
        "threads": os.environ.get("OMP_NUM_THREADS"), "versions": device.versions()})


def tune(args: Namespace) -> tuple[dict[str, str], str]:
    """Choose lambda_adv of TAN and of CLAN by the mean mIoU over the tuning seeds.

    Returns {method: lambda_adv}, and a sentence for the table.
    """
    rows = {f"{method}_adv_{value}": options_of(method, {method: value})
            for method in TUNED for value in GRID}
    results = run_all(args, TUNING_SEEDS, rows)
    chosen, texts = {}, []
    for method in TUNED:
        means = {v: statistics.fmean(results[seed, f"{method}_adv_{v}"]["mIoU"] for seed in TUNING_SEEDS)
                 for v in GRID}
        chosen[method] = max(GRID, key=means.get)
        texts.append(f"{method.upper()} " + ", ".join(f"{v}: {mean:.2f}" for v, mean in means.items()))
    seeds = ", ".join(map(str, TUNING_SEEDS))
    return chosen, (f"lambda_adv {chosen['tan']} for TAN, {chosen['clan']} for CLAN, each the best of "
                    f"{', '.join(GRID)} on seeds {seeds} (mIoU {'; '.join(texts)}).")


def mean_sd(values: list[float]) -> tuple[float, float | None]:
    """Return mean and standard deviation, None for one value."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def table(results: dict, rows: list[str], seeds: list[int]) -> str:
    """Return Markdown, in points of mIoU: a table for each kind of BN statistics.

    Cells are mean (sd) over seeds of mIoU, and of its differences to BASES, paired by seed.
    """

    def cell(values: list[float], sign: str = "") -> str:
        mean, sd = mean_sd(values)
        return f"{mean:{sign}.2f}" + ("" if sd is None else f" ({sd:.2f})")

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
    lambda_adv, origin = {"tan": "1", "clan": "1"}, "lambda_adv 1 for TAN and CLAN, not tuned (--tune)."
    if args.tune:
        lambda_adv, origin = tune(args)
    results = run_all(args, args.seeds, {row: options_of(row, lambda_adv) for row in args.rows})

    threads = sorted({result["threads"] or "all" for result in results.values()})
    text = (f"{table(results, args.rows, args.seeds)}{'CamVid to IDD-Lite, ' if args.camvid else ''}"
            f"{args.steps} steps; mean (standard deviation) over seeds {', '.join(map(str, args.seeds))}, "
            "points of mIoU on the target's val set; differences are paired by seed. "
            f"{origin} OMP threads of a run: {', '.join(threads)}.\n")
    print(f"\n{text}")
    if args.markdown:
        with atomic(args.markdown) as temporary:
            temporary.write_text(text, encoding="utf-8")
    if args.chart:
        series = {label: [mean_sd([results[seed, row][name] for seed in args.seeds]) for row in args.rows]
                  for label, name in STATISTICS.items()}
        title = f"mIoU (%) on the target, mean and sd over n = {len(args.seeds)} seeds"
        with atomic(args.chart) as temporary:
            bars(title, [ROWS[row][0] for row in args.rows], series).save(temporary)


def list_of(kind: Callable[[str], object]) -> Callable[[str], list]:
    """Return an argparse type: values of a `kind` with commas between them; repeated ones count once."""
    return lambda text: list(dict.fromkeys(map(kind, text.split(","))))


def get_arguments() -> Namespace:
    parser = Parser(__doc__.splitlines()[0])
    add = parser.add_argument
    grid, tuning_seeds = ", ".join(GRID), ", ".join(map(str, TUNING_SEEDS))
    add("--tune", action="store_true",
        help=f"first choose lambda_adv of TAN and CLAN from {grid} on seeds {tuning_seeds}; otherwise 1")
    add("--seeds", type=list_of(number(int, 0, 2**31 - 1)), default="1,2,3,4,5", help="with commas between")
    add("--camvid", metavar="DIR", help="CamVid in SegNet's version: {train,val,test} and {...}annot")
    add("--idd", metavar="DIR", help=f"IDD-Lite: leftImg8bit and gtFine; both are converted to {PHOTO_DATA}")
    add("--rows", type=list_of(str), help=f"with commas between, of {', '.join(ROWS)} "
        f"(default: all; with --camvid {', '.join(PHOTO_ROWS)})")
    add("--steps", type=number(int, 1), help="of stage B; stage A takes 2.5 times as many, with --camvid "
        f"3.125 times (default: {STEPS}, with --camvid {PHOTO_STEPS})")
    add("--jobs", type=number(int, 1), default=1, help="runs at a time; above 1 each has one thread")
    add("--folder", help=f"of all runs (default: {FOLDER}, with --camvid {PHOTO_FOLDER})")
    add("--markdown", metavar="FILE", help="also write the table to this file")
    add("--chart", metavar="FILE", help="also write a bar chart to this file, .png")
    args = parser.parse_args()
    if bool(args.camvid) != bool(args.idd):
        parser.error("--camvid and --idd belong together: name the folders of both data sets")
    if set(args.seeds) & set(TUNING_SEEDS):
        parser.error(f"--seeds: lambda_adv is chosen on {tuning_seeds}; take others")
    if args.chart and Path(args.chart).suffix != ".png":
        parser.error(f"--chart {args.chart}: the name has to end in .png")
    args.steps = args.steps or (PHOTO_STEPS if args.camvid else STEPS)
    args.folder = args.folder or (PHOTO_FOLDER if args.camvid else FOLDER)
    args.rows = args.rows or (PHOTO_ROWS if args.camvid else list(ROWS))
    if unknown := [row for row in args.rows if row not in ROWS]:
        parser.error(f"--rows {unknown[0]}: no such row; there are {', '.join(ROWS)}")
    return args


if __name__ == "__main__":
    if sys.argv[1:2] == ["--evaluate"]:  # a process of `do_run`
        run_script(evaluate_run, train_options.get_arguments(sys.argv[2:]))
    else:
        run_script(main, get_arguments())
