"""Ablation of CLAN on the demo's domains over seeds, with its baselines.

    python -m utils.tools.ablation [--tune] [--jobs 2] [--markdown FILE] [--chart FILE]
    python -m utils.tools.ablation --camvid DIR --idd DIR --tune ...

The second line runs the baselines and CLAN on photographs: from CamVid to IDD-Lite, both converted once.

Every row is a stage B of the demo (utils/tools/demo.py): equal start, steps, schedule and source images;
evaluated on the target's val set with re-estimated and with running BN statistics. --tune first chooses
lambda_adv of TAN and of CLAN, each from the same values, on seeds that are not reported. Every run is a
process of its own and keeps its result in FOLDER/seedN/ROW/result.json: a second start does what is missing.
On the CPU.
"""

import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from pathlib import Path

from utils.system import device, interrupt  # isort: skip

device.prepare_environment()  # before mindspore is imported
if __name__ == "__main__":
    interrupt.block()  # Ctrl-C and SIGTERM wait for the end of a step

from dataset.cityscapes_dataset import cityscapesDataSet
from model.CLAN_G import generator
from options import Parser, number, train_options
from utils import run_folder
from utils.system.errors import UserError, run_script
from utils.system.files import atomic, atomic_folder, read_json, rotate_existing, write_json
from utils.tools.bars import bars
from utils.tools.camvid_idd import convert
from utils.tools.demo import CLAN, STAGE_A, STAGE_B, TRAIN, build_argv, score, wait_for
from utils.tools.demo_scenes import demo_files, write_demo_data

TAN = ["--method", "tan", "--learning-rate-D", "0.001"]
GRID, TUNING_SEEDS = ("0.3", "1", "3"), (101, 102)
PARTS = {  # what becomes of CLAN when a part is taken away or changed
    "clan": [],
    "untrained_D": ["--learning-rate-D", "1e-12"],  # 500 steps of Adam move a weight by 5e-10 at most
    "no_weight": ["--lambda-weight", "0"],  # no weight discrepancy
    "no_map": ["--lambda-local", "0", "--epsilon", "1"],  # no alignment map: every pixel counts alike
    "not_detached": ["--no-detach-weight-map"],  # gradients flow through M, as in the released code
    "local_10": ["--lambda-local", "10"],
    "local_20": ["--lambda-local", "20"],
    "local_80": ["--lambda-local", "80"],  # 40 is "clan"
    "epsilon_0": ["--epsilon", "0"],
    "epsilon_1": ["--epsilon", "1"],  # 0.4 is "clan"
}
ROWS = ("source", "control", "tan", *PARTS, "oracle")
REAL_ROWS = ("source", "control", "tan", "clan", "oracle")
REAL_DATA, REAL_SIZE = "./data/camvid-idd", ["--input-size", "192,136", "--input-size-target", "192,136"]
BASES = {"source": "source", "control": "control", "tan": "TAN", "clan": "CLAN"}  # to which rows are compared
STATISTICS = {"re-estimated BN statistics": "mIoU", "running BN statistics": "mIoU_running"}
LABELS = {
    "source": "source only", "control": "control: CLAN, lambda_adv 0", "tan": "TAN: vanilla adversarial",
    "clan": "CLAN: lambda_local 40, epsilon 0.4", "untrained_D": "CLAN, D never learns",
    "no_weight": "CLAN, no weight discrepancy", "no_map": "CLAN, no alignment map",
    "not_detached": "CLAN, M not detached", "local_10": "CLAN, lambda_local 10",
    "local_20": "CLAN, lambda_local 20", "local_80": "CLAN, lambda_local 80", "epsilon_0": "CLAN, epsilon 0",
    "epsilon_1": "CLAN, epsilon 1", "oracle": "oracle: the target's labels",
}  # fmt: skip


def options_of(row: str, adv: dict[str, str]) -> list[str]:
    """The options of a row; `adv` holds lambda_adv of TAN and CLAN."""
    if row in ("source", "oracle"):
        return ["--method", "source"]
    if row == "tan":
        return [*TAN, "--lambda-adv", adv["tan"]]
    return [*CLAN, "--lambda-adv", "0" if row == "control" else adv["clan"], *PARTS.get(row, [])]


def key(command: list[str]) -> list[str]:
    """Return what identifies the result of a command. Paths do not: a folder may be moved."""
    return [word for word in command if os.sep not in word]


def read_result(folder: Path, command: list[str] | None = None) -> dict | None:
    """The result of a finished run, if it is one of this command."""
    result = read_json(folder / "result.json")
    if not isinstance(result, dict):
        return None
    return result if command is None or key(result.get("command", [])) == key(command) else None


def evaluate_run(command: list[str]) -> None:
    """Evaluate the last checkpoint of a training, which `command` started, and write its result.json."""
    args = train_options.get_arguments(command)
    folder = Path(args.snapshot_dir)
    started, path = (folder / "options.json").stat().st_mtime, folder / f"GTA5_{args.num_steps_stop}.ckpt"
    device.setup(args)
    city, size = args.data_dir_target, args.input_size_target
    val = cityscapesDataSet(city, "val", size=size, labels=True)
    unlabelled = cityscapesDataSet(city, "train", size=size)
    result = score(generator("small"), path, val, unlabelled)
    write_json(folder / "result.json", {
        **result, "seconds": round(time.time() - started, 1), "command": command,
        "threads": os.environ.get("OMP_NUM_THREADS"), "versions": device.versions()})  # fmt: skip


def draw(seed: int) -> Path:
    """The demo's images of a seed, and Oracle/: the target's labelled train images in GTA5's layout."""
    data = write_demo_data("./data/demo", seed)
    oracle = data / "Oracle"
    if not oracle.is_dir():
        with atomic_folder(oracle) as draft:
            for n in range(len(list((data / "GTA5/images").iterdir()))):
                for kind, name in zip(("images", "labels"), demo_files("train", n)):
                    to = draft / kind / f"{n + 1:05d}.png"
                    to.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(data / name, to)
    return data


def do(folder: Path, command: list[str], jobs: int) -> str:
    """Run a command in a process of its own, unless its result is there; a line that tells the outcome.

    After a signal no process begins, and one that runs is told to end, which it does after its step.
    """
    if interrupt.pending_signal():
        return "stopped"
    if result := read_result(folder, command):
        return f"mIoU {result['mIoU']:.2f} (running {result['mIoU_running']:.2f}), done before"
    if read_result(folder):  # of other options: kept
        rotate_existing(folder)
    # A run may have outlived the process that started it.
    lock = run_folder.lock_run_dir(folder, option="--folder")
    if any(folder.iterdir()) and not (folder / "output.log").exists():
        raise UserError(f"{folder} holds something else than a run of the ablation; choose another --folder")
    shutil.rmtree(folder)  # of a run that was killed
    folder.mkdir()
    if lock is not None:
        os.close(lock)
    environment = {**os.environ, **({"OMP_NUM_THREADS": "1"} if jobs > 1 else {})}
    with open(folder / "output.log", "w", encoding="utf-8") as log:
        log.write(f"python {TRAIN.name} {' '.join(command)}\n")
        log.flush()
        for program in ([TRAIN], ["-m", "utils.tools.ablation", "--evaluate"]):
            child = [sys.executable, *program, *command]
            process = subprocess.Popen(child, env=environment, stdout=log, stderr=subprocess.STDOUT)
            [code] = wait_for([process])
            if code or interrupt.pending_signal():
                break
    if interrupt.pending_signal():
        return "stopped"
    if code or not (result := read_result(folder)):
        raise UserError(f"a run failed (exit code {code}): see {log.name}; the same command resumes")
    return f"mIoU {result['mIoU']:.2f} (running {result['mIoU_running']:.2f}), {result['seconds']:.0f} s"


def do_all(args, seeds: tuple, rows: dict[str, list[str]]) -> dict:
    """Stage A of every seed and, from it, the rows (name: options); returns {(seed, row): result}.

    Seeds are completed one after the other; stage A of the next is under way meanwhile.
    """
    first, more = args.steps * 5 // 2, ["--device", "cpu"]
    if args.camvid:
        first, more = args.steps * 25 // 8, [*REAL_SIZE, *more]
    tasks = {}
    for seed in seeds:
        data = convert(args.camvid, args.idd, REAL_DATA) if args.camvid else draw(seed)
        folder = Path(args.folder) / f"seed{seed}"
        start = ["--restore-from", str(folder / "stage_a" / f"GTA5_{first}.ckpt")]
        every = {"stage_a": STAGE_A, **{row: [*STAGE_B, *options, *start] for row, options in rows.items()}}
        for row, options in every.items():
            steps, source = first if row == "stage_a" else args.steps, "Oracle" if row == "oracle" else "GTA5"
            command = build_argv(data, folder / row, steps, seed, [*options, *more], source)
            if args.camvid and row == "stage_a":
                command += ["--preheat-steps", str(args.steps // 4)]
            tasks[seed, row] = folder / row, command

    def one(task: tuple[Path, list[str]], start: Future | None) -> str:
        if start:
            start.result()  # its error, if it failed; the pool began with it
        return do(*task, args.jobs)

    def turn(name: tuple) -> tuple:
        is_start = name[1] == "stage_a"
        return seeds.index(name[0]) - is_start, not is_start

    pool, futures = ThreadPoolExecutor(args.jobs), {}
    try:
        for name in sorted(tasks, key=turn):
            futures[name] = pool.submit(one, tasks[name], futures.get((name[0], "stage_a")))
        names = {future: name for name, future in futures.items()}
        for n, future in enumerate(as_completed(names), 1):
            interrupt.exit_if_pending()
            seed, row = names[future]
            print(f"{n}/{len(tasks)}  seed {seed}, {row}: {future.result()}", flush=True)
    finally:
        pool.shutdown(cancel_futures=True)
    return {name: read_result(place) for name, (place, _) in tasks.items()}


def tune(args) -> None:
    """Choose lambda_adv of TAN and CLAN by the mean mIoU over the tuning seeds, from the same grid."""
    names = {(method, value): f"{method}_adv_{value}" for method in ("tan", "clan") for value in GRID}
    rows = {name: options_of(method, {method: value}) for (method, value), name in names.items()}
    results = do_all(args, TUNING_SEEDS, rows)
    means = {pair: statistics.fmean(results[seed, name]["mIoU"] for seed in TUNING_SEEDS)
             for pair, name in names.items()}  # fmt: skip
    chosen = {method: max(GRID, key=lambda value: means[method, value]) for method in ("tan", "clan")}
    write_json(Path(args.folder) / "tuned.json", {
        "steps": args.steps, "seeds": TUNING_SEEDS, "lambda_adv": chosen,
        "mIoU": {method: {value: means[method, value] for value in GRID} for method in chosen}})  # fmt: skip


def tuned(folder: Path, steps: int) -> tuple[dict[str, str], str]:
    """lambda_adv of both methods, and a sentence that says where they come from."""
    content = read_json(folder / "tuned.json")
    content = content if isinstance(content, dict) else {}
    if content.get("steps") != steps:
        return {"tan": "1", "clan": "1"}, "lambda_adv 1 for TAN and CLAN, not tuned (--tune)."
    scores = "; ".join(f"{method.upper()} " + ", ".join(f"{value}: {mean:.2f}" for value, mean in by.items())
                       for method, by in content["mIoU"].items())  # fmt: skip
    adv = content["lambda_adv"]
    seeds = ", ".join(map(str, content["seeds"]))
    return adv, (f"lambda_adv {adv['tan']} for TAN, {adv['clan']} for CLAN, each the best of "
                 f"{', '.join(GRID)} on seeds {seeds} (mIoU {scores}).")  # fmt: skip


def summary(results: dict, rows: list[str], seeds: list[int]) -> dict[str, dict[str, tuple]]:
    """For each row and figure (mean, sd, n) over seeds, in points of mIoU; sd None for a single seed.

    Figures: mIoU, mIoU_running, and of both the differences to each of BASES, paired by seed.
    """

    def figure(values: list[float]) -> tuple | None:
        sd = statistics.stdev(values) if len(values) > 1 else None
        return (statistics.fmean(values), sd, len(values)) if values else None

    out = {}
    for row in rows:
        out[row] = {}
        for name in STATISTICS.values():
            out[row][name] = figure([results[seed, row][name] for seed in seeds])
            for other in BASES:
                pairs = [(results[seed, row][name], results[seed, other][name])
                         for seed in seeds if other != row and (seed, other) in results]  # fmt: skip
                out[row][f"{name} - {other}"] = figure([a - b for a, b in pairs])
    return out


def table(figures: dict, note: str) -> str:
    """Markdown: one table for each kind of BN statistics."""
    lines = []
    for title, name in STATISTICS.items():
        lines += [f"| {title} | n | mIoU | " + " | ".join(f"− {base}" for base in BASES.values()) + " |",
                  "|---" * (3 + len(BASES)) + "|"]  # fmt: skip
        for row, by in figures.items():
            cells = [LABELS[row], str(by[name][2])]
            for figure in (name, *(f"{name} - {base}" for base in BASES)):
                mean, sd, _ = by[figure] or (None, None, 0)
                sign = "+" if "-" in figure else ""
                spread = "" if sd is None else f" ({sd:.2f})"
                cells.append("–" if mean is None else f"{mean:{sign}.2f}{spread}")
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    return "\n".join([*lines, note]) + "\n"


def main(args) -> None:
    if args.evaluate:
        return evaluate_run(args.evaluate)
    folder = Path(args.folder)
    lock = run_folder.lock_run_dir(folder, "working", "--folder")
    if args.tune:
        tune(args)
    adv, sentence = tuned(folder, args.steps)
    rows = {row: options_of(row, adv) for row in args.rows}
    results = do_all(args, args.seeds, rows)
    threads = {result["threads"] or "all" for result in results.values()}
    figures = summary(results, args.rows, args.seeds)
    seeds = ", ".join(map(str, args.seeds))
    pair = "CamVid to IDD-Lite, " if args.camvid else ""
    note = (f"{pair}{args.steps} steps; mean (standard deviation) over seeds {seeds}, points of mIoU on"
            f" the target's val set; differences are paired by seed. {sentence} "
            f"OMP threads of a run: {', '.join(sorted(threads))}.")  # fmt: skip
    text = table(figures, note)
    print(f"\n{text}")
    if args.markdown:
        with atomic(args.markdown) as temporary:
            temporary.write_text(text, encoding="utf-8")
    if args.chart:
        values = {label: [figures[row][name][:2] for row in args.rows] for label, name in STATISTICS.items()}
        title = f"mIoU (%) on the target, mean and sd over n = {len(args.seeds)} seeds"
        with atomic(args.chart) as temporary:
            bars(title, [LABELS[row] for row in args.rows], values).save(temporary)
    if lock is not None:
        os.close(lock)


def get_arguments():
    parser = Parser(__doc__.splitlines()[0])
    add = parser.add_argument
    add("--tune", action="store_true", help=f"first choose lambda_adv of TAN and CLAN from {', '.join(GRID)} "
        f"on seeds {', '.join(map(str, TUNING_SEEDS))}; kept for later in FOLDER/tuned.json")  # fmt: skip
    add("--seeds", default="1,2,3,4,5", help="with commas (default: 1,2,3,4,5)")
    add("--camvid", metavar="DIR", help="CamVid in SegNet's version, {train,val,test} with {...}annot")
    add("--idd", metavar="DIR", help="IDD-Lite, leftImg8bit and gtFine; both are converted to "
        f"{REAL_DATA}, unless it exists")  # fmt: skip
    add("--rows", help=f"with commas, of {', '.join(ROWS)} (default: all; with --camvid "
        f"{', '.join(REAL_ROWS)})")  # fmt: skip
    add("--steps", type=number(int, 1), help="of stage B; A takes 2.5 times as many, with --camvid 3.125 "
        "(default: 500, with --camvid 800)")  # fmt: skip
    add("--jobs", type=number(int, 1), default=1,
        help="runs at a time; above 1 each has one thread (default: 1)")  # fmt: skip
    add("--folder", help="of all runs (default: ./checkpoint/ablation, or camvid-idd there)")
    add("--markdown", metavar="FILE", help="also write the table there")
    add("--chart", metavar="FILE", help="also draw it there, .png")
    one = sys.argv[2:] if sys.argv[1:2] == ["--evaluate"] else None  # a child of this script
    args = parser.parse_args([] if one else None)
    if bool(args.camvid) != bool(args.idd):
        parser.error("--camvid and --idd belong together: name the folders of both data sets")
    args.steps = args.steps or (800 if args.camvid else 500)
    args.folder = args.folder or f"./checkpoint/{'camvid-idd' if args.camvid else 'ablation'}"
    args.evaluate, args.rows = one, args.rows.split(",") if args.rows else REAL_ROWS if args.camvid else ROWS
    for row in args.rows:
        if row not in ROWS:
            parser.error(f"--rows {row}: no such row; there are {', '.join(ROWS)}")
    if not re.fullmatch(r"\d{1,9}(,\d{1,9})*", args.seeds):
        parser.error(f"--seeds {args.seeds}: numbers with commas between them, such as 1,2,3")
    args.seeds = [int(seed) for seed in args.seeds.split(",")]
    for name in ("rows", "seeds"):
        if len(set(getattr(args, name))) < len(getattr(args, name)):
            parser.error(f"--{name}: one is there twice")
    if set(args.seeds) & set(TUNING_SEEDS):
        parser.error(f"--seeds: lambda_adv is chosen on {', '.join(map(str, TUNING_SEEDS))}; take others")
    if args.chart and Path(args.chart).suffix != ".png":
        parser.error(f"--chart {args.chart}: the name has to end in .png")
    return args


if __name__ == "__main__":
    run_script(main, get_arguments())
