"""The folder of a run: options.json, GTA5_<steps>.ckpt, GTA5_best.ckpt, loss.csv, miou.csv, Train_log.log.

The tables and the log are appended to, a complete line at a time; every other file is written next to its
place, flushed to disk and renamed. So a run that is killed at any moment can be resumed from its newest
checkpoint.
"""

import json
import os
import shutil
from argparse import Namespace
from dataclasses import dataclass, field
from pathlib import Path
from re import fullmatch
from shlex import quote
from tempfile import TemporaryFile

import numpy as np

from utils import checkpoint, tables
from utils.system import parallel
from utils.system.errors import UserError
from utils.system.files import atomic, follow_link, rotate_existing, write_json

BEST = "GTA5_best.ckpt"
TABLES = ("loss.csv", "miou.csv")
results_locks: list[int] = []  # at most one: see lock_results_dir
locked: set[Path] = set()  # folders that this process has kept others out of, which not all file systems can


@dataclass
class ResumePoint:
    """What a run starts from: all that is read of the run to resume, or nothing for a new run."""

    folder: Path | None = None  # of the run to resume
    checkpoint: Path | None = None  # None: the run has none that can be read, it starts from scratch
    content: dict[str, np.ndarray | str] = field(default_factory=dict)  # of the checkpoint
    steps: int = 0  # that led to the checkpoint
    damaged: dict[Path, str] = field(default_factory=dict)  # the error of each that cannot be read
    options: dict = field(default_factory=dict)  # its options.json
    rows: dict[str, list[list[str]]] = field(default_factory=dict)  # of each table, up to the checkpoint
    other_val: bool = False  # another val set, whose scores cannot be compared with the rows of miou.csv


def snapshots(folder: Path, suffix: str = "ckpt") -> list[tuple[int, Path]]:
    """Return (steps, path) of a folder's numbered checkpoints, newest first; `suffix` may be a pattern."""
    found = [(fullmatch(rf"GTA5_(\d+)\.({suffix})", path.name), path) for path in folder.glob("GTA5_*")]
    return sorted(((int(match[1]), path) for match, path in found if match), reverse=True)


def lock_run_dir(folder: Path, task: str = "training", option: str = "--snapshot-dir") -> int:
    """Keep other processes out of the folder until the descriptor is closed; UserError if one is in it.

    The folder is created; UserError if that is not possible, or it cannot be written. Of several processes,
    rank 0 keeps it for all.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        TemporaryFile(dir=folder).close()
    except OSError as error:
        reason = "is a file" if folder.is_file() else error.strerror
        raise UserError(f"{option} {folder}: {reason}; choose a folder that can be written") from None
    if os.name != "posix" or parallel.rank() > 0:
        return os.open(os.devnull, os.O_RDONLY)
    import fcntl

    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        locked.add(folder.resolve())
    except BlockingIOError:
        os.close(lock)
        what = f"another process is {task} there"
        raise UserError(f"{folder}: {what}; wait for it, or choose another {option}") from None
    except OSError:
        pass  # some network file systems have no locks
    return lock


def lock_results_dir(folder: str | Path) -> None:
    """Keep other evaluations, and trainings, out of the folder of the results until `release_results_dir`."""
    results_locks.append(lock_run_dir(Path(folder), "evaluating or training", "--save-path"))


def release_results_dir() -> None:
    """Give back the folder of the results, if it is locked: a notebook's process goes on."""
    while results_locks:
        os.close(results_locks.pop())


def archive_old_results(*results: Path) -> None:
    """Rename earlier results and report it; all processes continue once that is done."""
    if parallel.rank() == 0:
        results[0].parent.mkdir(parents=True, exist_ok=True)  # if it cannot be, better now than at the end
        if old := rotate_existing(*results):
            print(f"earlier results are now {', '.join(map(str, old))}")
    parallel.barrier()


def check_new(folder: Path) -> None:
    """Raise UserError if the folder holds a run: options, a table or a checkpoint, which nothing overwrites.

    What a run leaves that ended before its first step, neither a checkpoint nor a row, is free if the folder
    is locked. Other files, such as nohup.out, may be there and stay as they are.
    """
    there = [folder / name for name in ("options.json", BEST, *TABLES) if (folder / name).exists()]
    there += [path for _, path in snapshots(folder)]
    begun = any(path.suffix == ".ckpt" or path.suffix == ".csv" and len(path.read_bytes().splitlines()) > 1
                for path in there)  # fmt: skip
    if begun or (there and folder.resolve() not in locked):
        resumable = any(path.suffix != ".csv" for path in there)
        hint = f", or resume it: --resume {quote(str(folder))}" if resumable else ""
        raise UserError(f"{folder} already holds a run; choose another --snapshot-dir or move it away{hint}")


def find_resume_point(args: Namespace) -> ResumePoint:
    """Read all that the run starts from; options.json was read with the options. The folder has to be locked.

    UserError if there is no run to resume, or if --snapshot-dir holds another run.
    """
    point = find_resumable(args.continue_train) if args.continue_train else ResumePoint()
    if parallel.rank() == 0 and point.folder != Path(args.snapshot_dir).resolve():
        check_new(Path(args.snapshot_dir))
    if not point.folder:
        return point
    point.options = args._saved_options
    # loss.csv counts steps from 0, miou.csv those that are done.
    for (name, columns), last in zip(tables.columns(args.source).items(), (point.steps - 1, point.steps)):
        path = point.folder / name
        header, rows = tables.read(path)
        if header and header != list(columns):  # its rows would no longer be read
            raise UserError(f"{path}: has other columns than this version writes; choose a new folder")
        point.rows[name] = [row for row in rows if int(row[0]) <= last]
    return point


def find_resumable(given: str) -> ResumePoint:
    """Return a run's folder, the checkpoint to resume from, its content and steps, and the damaged ones.

    `given` is a checkpoint, or a folder: of this, the newest one that can be read, at last GTA5_best.ckpt.
    UserError if a checkpoint that was named cannot be read, or there is no run.
    """
    path = follow_link(Path(given if Path(given).is_dir() else checkpoint.find(given)))
    if path.is_file():
        point = ResumePoint(path.parent.resolve())
        candidates = [point.folder / path.name]
    else:
        point = ResumePoint(path.resolve())
        candidates = [*(numbered for _, numbered in snapshots(path.resolve())), point.folder / BEST]
    for candidate in filter(Path.exists, candidates):
        try:
            point.content = checkpoint.read_training(candidate)
        except (UserError, OSError) as error:
            point.damaged[candidate] = str(error)
            continue
        point.checkpoint, point.steps = candidate, int(point.content["step"])
        return point
    if path.is_file():
        raise UserError(f"{point.damaged[candidates[0]]}; to resume from the newest that can be read: "
                        f"--resume {quote(str(point.folder))}")
    if not (path / "options.json").is_file():
        hint = f"{path}: no run in it to resume; start one without --resume"
        raise UserError(next(iter(point.damaged.values()), hint))
    return point


def check_images(point: ResumePoint, args: Namespace, names_crc32: dict[str, int]) -> list[str]:
    """Raise UserError if a list chooses other images, or another order, than in the run to resume.

    names_crc32: checksums of the names of "source", "target" and "val". Without options.json there is nothing
    to compare. Returns a line for the log for data without a list that changed; for another val set the rows
    of miou.csv go, too.
    """
    before = point.options.get("names_crc32", {})
    changed = [data for data, crc in names_crc32.items() if before.get(data, crc) != crc]
    for name, data in (("data_list", "source"), ("gta5_split", "source"), ("data_list_target", "target")):
        if data in changed and (path := getattr(args, name)):
            raise UserError(f"--{name.replace('_', '-')} {path}: chooses other images, or another order, "
                            f"than in the run of {point.folder}; give the list that it had")
    note = "images are not those of the run before: their order differs from here on"
    notes = [f"the {data} {note}" for data in changed if data != "val"]
    if "val" in changed:
        point.rows["miou.csv"], point.other_val = [], True
        notes.append("the val set is not that of the run before: miou.csv and the best begin anew")
    return notes


def copy(path: Path, to: Path) -> None:
    """Copy a file, atomically."""
    with atomic(to) as temporary:
        shutil.copyfile(path, temporary)


def truncate_run(point: ResumePoint) -> list[str]:
    """Take a run back to the checkpoint: move newer and damaged checkpoints to after_<steps>/.

    If any moves, or the tables lose lines, options and tables are copied there. Returns lines for the log.
    """
    folder, place, best = point.folder, point.folder / f"after_{point.steps}", point.folder / BEST
    for path in folder.glob(".GTA5_*.tmp*"):  # of a process that was killed while writing
        path.unlink()
    moved = [path for steps, path in snapshots(folder) if steps > point.steps or path in point.damaged]
    if best.exists():
        steps = checkpoint.step_of(best)
        if point.other_val or steps is None or steps > point.steps:
            moved.append(best)
    kept = [folder / name for name in ("options.json", *TABLES) if (folder / name).exists()]
    lost = [f"rows of {path.name}" for path in kept if path.name in point.rows
            and len(path.read_bytes().splitlines()) > 1 + len(point.rows[path.name])]  # fmt: skip
    if not moved and not lost:
        return []
    rotate_existing(place)
    place.mkdir()
    for path in kept:
        shutil.copy2(path, place)
    for path in moved:
        path.replace(place / path.name)
    return [f"moved to {place}: {', '.join([*(path.name for path in moved), *lost])}"]


def restore_best(point: ResumePoint, folder: Path, step: str) -> None:
    """Copy the checkpoint after `step` steps to GTA5_best.ckpt if that is missing and the run has it."""
    for path in (point.folder / BEST, point.folder / f"GTA5_{step}.ckpt"):
        if not (folder / BEST).exists() and checkpoint.step_of(path) == int(step):
            copy(path, folder / BEST)


def write_options(folder: Path, options: dict, saved: dict, done: int) -> None:
    """Write options.json; those of earlier segments of the run are listed under "before" if they differ.

    saved: the content of the file of the run that is resumed after `done` steps; {} for a new run.
    """
    last = dict(saved)
    segments = last.pop("before", [])
    if last and last != json.loads(json.dumps(options)):
        segments = [*segments, {**last, "until_step": done}]
    write_json(folder / "options.json", options | ({"before": segments} if segments else {}))
