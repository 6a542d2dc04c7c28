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
from pathlib import Path
from shlex import quote

import numpy as np

from utils import checkpoint, tables
from utils.system import parallel
from utils.system.errors import UserError
from utils.system.files import atomic, follow_link, read_json, rotate_existing, write_json

BEST = "GTA5_best.ckpt"
TABLES = ("loss.csv", "miou.csv")


def snapshots(folder: Path, suffix: str = "ckpt") -> list[tuple[int, Path]]:
    """(steps, path) of the numbered checkpoints in a folder, the newest first; `suffix` may be a pattern."""
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
        what = f"another process is {task} there"
        raise UserError(f"{folder}: {what}; wait for it, or choose another {option}") from None
    except OSError:
        pass  # some network file systems have no locks
    return lock


def lock_results_dir(folder: str | Path) -> None:
    """Keep other evaluations, and trainings, out of the folder of the results until this process ends."""
    if parallel.rank() == 0:
        lock_run_dir(Path(folder), "evaluating or training", "--save-path")


def archive_old_results(*results: Path) -> None:
    """Rename earlier results and report it; all processes continue once that is done."""
    if parallel.rank() == 0:
        results[0].parent.mkdir(parents=True, exist_ok=True)  # if it cannot be, better now than at the end
        if old := rotate_existing(*results):
            print(f"earlier results are now {', '.join(map(str, old))}")
    parallel.barrier()


def check_new(folder: Path) -> None:
    """UserError if the folder holds a run: nothing is overwritten."""
    if any((folder / name).exists() for name in ("options.json", BEST, *TABLES)) or snapshots(folder):
        resumable = (folder / "options.json").exists() or snapshots(folder)
        hint = f", or resume it: --continue-train {quote(str(folder))}" if resumable else ""
        raise UserError(
            f"{folder} already holds a run; choose another --snapshot-dir or move it away{hint}"
        )


def find_resumable(given: str) -> tuple[Path, Path | None, dict, dict[Path, str]]:
    """A run's folder, the checkpoint to resume from, its content, and what is wrong with unreadable ones.

    `given` is a checkpoint, or a folder for the newest in it. Instead of a damaged one the newest readable
    one before it is taken; None if the run in the folder has none yet. UserError if there is no run, or none
    before a damaged checkpoint that was named.
    """
    path = follow_link(Path(given if Path(given).is_dir() else checkpoint.find(given)))
    folder = (path if path.is_dir() else path.parent).resolve()
    path = folder if path.is_dir() else folder / path.name
    numbered = {other: steps for steps, other in snapshots(folder)}
    newest = 10**9 if path.is_dir() else numbered.get(path, -1)  # of what is called otherwise: unknown
    others = [other for other, steps in numbered.items() if other != path and steps <= newest]
    damaged: dict[Path, str] = {}

    def read(candidate: Path) -> dict:
        try:
            content = checkpoint.read(str(candidate))
            step, score = content.get("step"), content.get("best_mIoU")
            numbers = all(isinstance(v, np.ndarray) and v.size == 1 for v in (step, score))
            # NaN: what older versions wrote after a validation without labels.
            if not numbers or not 0 <= step < 10**9 or not (0 <= score < 10**9 or np.isnan(score)):
                raise UserError(f"{candidate}: not a checkpoint of this project's training")
            return content
        except (UserError, OSError) as error:
            damaged[candidate] = str(error)
            return {}

    chosen, content = None, {}
    for candidate in others if path.is_dir() else [path, *others]:
        if content := read(candidate):
            chosen = candidate
            break
    best = folder / BEST
    if (damaged or not chosen) and best.exists() and best not in damaged:  # newer than what is left?
        if (other := read(best)) and int(content.get("step", 0)) < int(other["step"]) <= newest:
            chosen, content = best, other
    if chosen is None and not (path.is_dir() and (folder / "options.json").is_file()):
        hint = f"{folder}: no run in it to resume; start one without --continue-train"
        raise UserError(next(iter(damaged.values()), hint))
    return folder, chosen, content, damaged


def copy(path: Path, to: Path) -> None:
    with atomic(to) as temporary:
        shutil.copyfile(path, temporary)


def check_images(folder: Path, args: Namespace, names_crc32: dict[str, int]) -> list[str]:
    """UserError if a list chooses other images, or another order, than in the run of `folder`.

    names_crc32: checksums of the names of "source" and "target". Runs of older versions have none to compare.
    Returns a line for the log for data without a list that changed.
    """
    saved = read_json(folder / "options.json")
    before = saved.get("names_crc32") if isinstance(saved, dict) else None
    lists = {"data_list": "source", "gta5_split": "source", "data_list_target": "target"}
    before = before if isinstance(before, dict) else names_crc32
    changed = [data for data, crc in names_crc32.items() if before.get(data) != crc]
    for name, data in lists.items():
        if (path := getattr(args, name)) and data in changed:
            raise UserError(
                f"--{name.replace('_', '-')} {path}: chooses other images, or another order, than in the "
                f"run of {folder}; give the list that it had"
            )
    return [f"the {data} images are not those of the run before: their order differs from here on"
            for data in changed]  # fmt: skip


def fork_run(origin: Path, folder: Path, last: str, done: int) -> None:
    """Begin `folder`, existing and empty, with copies of a run's checkpoint `last`, tables and options.

    `done`: its steps. Whatever its name, the copy is found when the new run is resumed.

    The folder itself is not replaced: it may be the working directory or a mount. Its files are moved in at
    the end, the checkpoint first: after a kill in between nothing there starts again from step 0.
    """
    temporary = folder / ".adopt.tmp"
    shutil.rmtree(temporary, ignore_errors=True)  # of a process that was killed
    if any(folder.iterdir()):
        raise UserError(f"{folder} is not empty; choose a new --snapshot-dir")
    names = {last: last if last == BEST else f"GTA5_{done}.ckpt"}
    names |= {name: name for name in ("options.json", *TABLES) if (origin / name).exists()}
    for name, new in names.items():
        copy(origin / name, temporary / new)
    for new in names.values():
        (temporary / new).replace(folder / new)
    temporary.rmdir()


def truncate_run(folder: Path, origin: Path, first: int, damaged: dict[Path, str]) -> list[str]:
    """Take a run back to its first steps: move what is newer or damaged into FOLDER/after_<first>.

    Returns a line for the log, if there was any. The tables are copied there before their later rows go; of a
    run that was killed, those after its last checkpoint are not worth it. A newer best checkpoint is replaced
    by the one before it, if `origin` (the folder itself, or the one it began from) still has it.
    """
    for path in folder.iterdir():  # of a process that was killed while writing
        if re.fullmatch(r"\.(GTA5_\w+|options|loss|miou)\.tmp(\.\w+)?", path.name):
            path.unlink()
    folder = folder.resolve()
    aside = [path for steps, path in snapshots(folder) if steps > first or path in damaged]
    best = folder / BEST
    if best.exists() and not 0 <= (checkpoint.step_of(best) or -1) <= first:
        aside.append(best)
    place = folder / f"after_{first}"
    later = origin.resolve() == folder and has_later_checkpoint(folder, first)  # which is gone
    if aside or later:
        rotate_existing(place)
        place.mkdir()
        for name in (*TABLES, "options.json"):
            if (folder / name).exists():
                shutil.copy2(folder / name, place)
        for path in aside:
            path.replace(place / path.name)
    row = tables.best(tables.rows(folder / "miou.csv", first + 1))
    if row and not best.exists():
        candidates = origin / BEST, origin / f"GTA5_{row[0]}.ckpt"
        known = [path for path in candidates if checkpoint.step_of(path) == int(row[0])]
        for path in known[:1]:
            copy(path, best)
    moved = ", ".join(path.name for path in aside) or "copies of the tables, whose later steps are lost"
    return [f"moved to {place}: {moved}"] if aside or later else []


def has_later_checkpoint(folder: Path, first: int) -> bool:
    """Return whether a run had a checkpoint of more than `first` steps, as its tables tell."""
    saved, losses = read_json(folder / "options.json"), tables.rows(folder / "loss.csv")
    interval = saved.get("save_pred_every", 0) if isinstance(saved, dict) else 0
    validated = any(int(row[0]) > first for row in tables.rows(folder / "miou.csv"))
    return validated or bool(losses) and int(losses[-1][0]) >= first + interval


def write_options(folder: Path, options: dict, first: int) -> None:
    """options.json, with those of the run's earlier segments, if they differ, under "before"."""
    path, segments = folder / "options.json", []
    if path.exists():
        old = json.loads(path.read_text(encoding="utf-8"))
        segments = old.pop("before", [])
        segments = segments if isinstance(segments, list) else []
        if old != json.loads(json.dumps(options)):
            segments.append({**old, "until_step": first})
    write_json(path, {**options, **({"before": segments} if segments else {})})
