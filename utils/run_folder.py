"""The folder of a run: options.json, GTA5_<steps>.ckpt, GTA5_best.ckpt, loss.csv, miou.csv, Train_log.log.

The tables and the log are appended to, a complete line at a time; every other file is written next to its
place, flushed to disk and renamed. So a run that is killed at any moment can be resumed from its newest
checkpoint.
"""

import json
import os
import re
import shutil
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from shlex import quote

import numpy as np

from utils import checkpoint, tables
from utils.system import parallel
from utils.system.errors import UserError
from utils.system.files import atomic, follow_link, rotate_existing, write_json

BEST = "GTA5_best.ckpt"
TABLES = ("loss.csv", "miou.csv")
results_locks: list[int] = []  # at most one: see lock_results_dir


@dataclass
class ResumePoint:
    """What a run starts from: all that is read of the run to resume, or nothing for a new run."""

    folder: Path | None = None  # of the run to resume
    checkpoint: Path | None = None  # None: the run has none that can be read, it starts from scratch
    content: dict[str, np.ndarray | str] = field(default_factory=dict)  # of the checkpoint
    damaged: dict[Path, str] = field(default_factory=dict)  # the error of each that cannot be read
    options: dict = field(default_factory=dict)  # its options.json
    rows: dict[str, list[list[str]]] = field(default_factory=dict)  # of each table
    unreadable: dict[str, int] = field(default_factory=dict)  # lines of each table that are no rows

    def report(self) -> list[str]:
        """Return lines for the log."""
        if not self.folder:
            return []
        scratch = f"{self.folder}: no readable checkpoint, starting from scratch"
        chosen = f"resuming from {self.checkpoint}" if self.checkpoint else scratch
        lines = [f"incomplete or unreadable rows of {name}, left out: {n}"
                 for name, n in self.unreadable.items() if n]  # fmt: skip
        return [*(f"skipped {error}" for error in self.damaged.values()), chosen, *lines]


def snapshots(folder: Path, suffix: str = "ckpt") -> list[tuple[int, Path]]:
    """Return (steps, path) of a folder's numbered checkpoints, newest first; `suffix` may be a pattern."""
    found = [(re.fullmatch(rf"GTA5_(\d+)\.({suffix})", path.name), path) for path in folder.glob("GTA5_*")]
    return sorted(((int(match[1]), path) for match, path in found if match), reverse=True)


def lock_run_dir(folder: Path, task: str = "training", option: str = "--snapshot-dir") -> int | None:
    """Keep other processes out of the folder until the descriptor is closed; UserError if one is in it."""
    folder.mkdir(parents=True, exist_ok=True)
    if os.name != "posix":
        return None
    import fcntl

    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        what = f"another process is {task} there"
        raise UserError(f"{folder}: {what}; wait for it, or choose another {option}") from None
    except OSError:
        pass  # some network file systems have no locks
    return lock


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Create the folder of a run and keep other processes out of it; rank 0 does this for all.

    At the end, also after an error, the lock is given back, and a folder that is still empty is removed.
    """
    if parallel.rank() > 0:
        yield
        return
    created = [path for path in (folder, *folder.parents) if not path.exists()]
    lock = lock_run_dir(folder)
    try:
        yield
    finally:
        for path in created:
            with suppress(OSError):  # not empty
                path.rmdir()
        if lock is not None:
            os.close(lock)


def lock_results_dir(folder: str | Path) -> None:
    """Keep other evaluations, and trainings, out of the folder of the results, in rank 0.

    The lock is held until this process ends, or until it writes other results, as a notebook does.
    """
    if parallel.rank() > 0:
        return
    while results_locks:
        os.close(results_locks.pop())
    lock = lock_run_dir(Path(folder), "evaluating or training", "--save-path")
    results_locks.extend([] if lock is None else [lock])


def archive_old_results(*results: Path) -> None:
    """Rename earlier results and report it; all processes continue once that is done."""
    if parallel.rank() == 0:
        results[0].parent.mkdir(parents=True, exist_ok=True)  # if it cannot be, better now than at the end
        if old := rotate_existing(*results):
            print(f"earlier results are now {', '.join(map(str, old))}")
    parallel.barrier()


def check_new(folder: Path) -> None:
    """Raise UserError if the folder holds a run: options, a table or a checkpoint, which nothing overwrites.

    Other files, such as nohup.out, may be there and stay as they are.
    """
    resumable = (folder / "options.json").exists() or snapshots(folder)
    if resumable or any((folder / name).exists() for name in (BEST, *TABLES)):
        hint = f", or resume it: --resume {quote(str(folder))}" if resumable else ""
        raise UserError(f"{folder} already holds a run; choose another --snapshot-dir or move it away{hint}")


def find_resume_point(args: Namespace) -> ResumePoint:
    """Read, once, all that the run starts from; --snapshot-dir has to be locked.

    UserError if there is no run to resume, or if --snapshot-dir holds another run.
    """
    point = find_resumable(args.continue_train) if args.continue_train else ResumePoint()
    if parallel.rank() == 0 and point.folder != Path(args.snapshot_dir).resolve():
        check_new(Path(args.snapshot_dir))
    if point.folder:
        point.options = args._saved_options
        for name, columns in tables.columns(args.source).items():
            path = point.folder / name
            header, point.rows[name], point.unreadable[name] = tables.parse(path)
            if header and header != list(columns):  # its rows would no longer be read
                raise UserError(f"{path}: has other columns than this version writes; choose a new folder")
    return point


def find_resumable(given: str) -> ResumePoint:
    """Return a run's folder, the checkpoint to resume from and its content, and the damaged ones.

    `given` is a checkpoint, or a folder for the newest in it. Instead of a damaged one the newest readable
    one before it is taken. UserError if there is no run, or none before a damaged checkpoint that was named.
    """
    path = follow_link(Path(given if Path(given).is_dir() else checkpoint.find(given)))
    point = ResumePoint((path if path.is_dir() else path.parent).resolve())
    numbered = {other: steps for steps, other in snapshots(point.folder)}
    candidates, newest = list(numbered), 10**9
    if not path.is_dir():
        named = point.folder / path.name
        # The age of a file without a number is unknown, so nothing may replace it.
        newest = numbered.get(named, -1)
        candidates = [named, *(p for p, steps in numbered.items() if p != named and steps <= newest)]
    point.checkpoint, point.content = first_readable(candidates, point.damaged)
    best = point.folder / BEST
    if (point.damaged or not point.checkpoint) and best.exists() and best not in point.damaged:
        found, content = first_readable([best], point.damaged)
        if found and int(point.content.get("step", 0)) < int(content["step"]) <= newest:
            point.checkpoint, point.content = found, content
    if not point.checkpoint and not (path.is_dir() and (path / "options.json").is_file()):
        hint = f"{point.folder}: no run in it to resume; start one without --resume"
        raise UserError(next(iter(point.damaged.values()), hint))
    return point


def first_readable(paths: list[Path], damaged: dict[Path, str]) -> tuple[Path | None, dict]:
    """Return the first readable checkpoint of a training, and its content; list others in `damaged`."""
    for path in paths:
        try:
            content = checkpoint.read(str(path))
            numbers = [content.get("step"), content.get("best_mIoU")]
            if not all(isinstance(v, np.ndarray) and v.size == 1 and 0 <= v < 10**9 for v in numbers):
                raise UserError(f"{path}: not a checkpoint of this project's training")
            return path, content
        except (UserError, OSError) as error:
            damaged[path] = str(error)
    return None, {}


def copy(path: Path, to: Path) -> None:
    """Copy a file, atomically."""
    with atomic(to) as temporary:
        shutil.copyfile(path, temporary)


def check_images(point: ResumePoint, args: Namespace, names_crc32: dict[str, int]) -> list[str]:
    """Raise UserError if a list chooses other images, or another order, than in the run to resume.

    names_crc32: checksums of the names of "source" and "target". Without options.json there is nothing to
    compare. Returns a line for the log for data without a list that changed.
    """
    before = point.options.get("names_crc32", names_crc32)
    lists = {"data_list": "source", "gta5_split": "source", "data_list_target": "target"}
    changed = [data for data, crc in names_crc32.items() if before.get(data) != crc]
    for name, data in lists.items():
        if (path := getattr(args, name)) and data in changed:
            raise UserError(
                f"--{name.replace('_', '-')} {path}: chooses other images, or another order, than in the "
                f"run of {point.folder}; give the list that it had"
            )
    return [f"the {data} images are not those of the run before: their order differs from here on"
            for data in changed]  # fmt: skip


def rows_until(point: ResumePoint, done: int) -> dict[str, list[list[str]]]:
    """Return the rows of each table that belong to the first `done` steps."""
    ends = {"loss.csv": done, "miou.csv": done + 1}  # one counts steps from 0, the other those that are done
    return {name: [row for row in point.rows.get(name, []) if int(row[0]) < ends[name]] for name in TABLES}


def fork_run(point: ResumePoint, folder: Path, done: int) -> None:
    """Begin `folder` with a run's checkpoint of `done` steps, first, and the rows of its tables up to it.

    Whatever the checkpoint is called, the copy is found when the new run is resumed.
    """
    name = BEST if point.checkpoint.name == BEST else f"GTA5_{done}.ckpt"
    copy(point.checkpoint, folder / name)
    for table in TABLES:
        if (point.folder / table).exists():
            copy(point.folder / table, folder / table)


def truncate_run(point: ResumePoint, done: int) -> list[str]:
    """Take a run back to its first `done` steps: move newer and damaged checkpoints to after_<done>/.

    The tables and options are copied there if rows or unreadable lines of a table are about to go. Returns
    lines for the log.
    """
    folder, place, kept = point.folder, point.folder / f"after_{done}", rows_until(point, done)
    for path in folder.iterdir():  # of a process that was killed while writing
        if re.fullmatch(r"\.(GTA5_\w+|options|loss|miou)\.tmp(\.\w+)?", path.name):
            path.unlink()
    moved = [path for steps, path in snapshots(folder) if steps > done or path in point.damaged]
    best = folder / BEST
    if best.exists() and ((steps := checkpoint.step_of(best)) is None or steps > done):
        moved.append(best)
    going = [name for name in TABLES if point.rows[name] != kept[name] or point.unreadable[name]]
    if not moved and not going:
        return []
    rotate_existing(place)
    place.mkdir()
    for name in ("options.json", *TABLES):
        if (folder / name).exists():
            shutil.copy2(folder / name, place)
    for path in moved:
        path.replace(place / path.name)
    report = [f"moved to {place}: {', '.join(path.name for path in moved)}"] if moved else []
    copied = f"copied to {place}: {' and '.join(going)}, of which the rows after {done} steps go"
    return [*report, *([copied] if going else [])]


def restore_best(point: ResumePoint, folder: Path, scores: list[list[str]]) -> None:
    """Copy the checkpoint of the best validation to GTA5_best.ckpt if that is missing and the run has it.

    scores: the rows of miou.csv that are kept.
    """
    row, best = tables.best(scores), folder / BEST
    if not row or best.exists():
        return
    for path in (point.folder / BEST, point.folder / f"GTA5_{row[0]}.ckpt"):
        if checkpoint.step_of(path) == int(row[0]):
            copy(path, best)
            return


def write_options(folder: Path, options: dict, saved: dict, done: int) -> None:
    """Write options.json; those of earlier segments of the run are listed under "before" if they differ.

    saved: the content of the file of the run that is resumed after `done` steps; {} for a new run.
    """
    segments = saved.get("before", [])
    last = {name: value for name, value in saved.items() if name != "before"}
    if last and last != json.loads(json.dumps(options)):
        segments = [*segments, {**last, "until_step": done}]
    write_json(folder / "options.json", {**options, **({"before": segments} if segments else {})})
