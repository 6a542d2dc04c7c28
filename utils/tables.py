"""The tables of a run, loss.csv and miou.csv: one row per step, complete or not there."""

import csv
import math
import re
from pathlib import Path

from utils.system.errors import UserError
from utils.system.files import atomic

LOSSES = ("loss_seg", "loss_adv", "loss_weight", "loss_D_s", "loss_D_t")  # columns of loss.csv


def read(path: Path) -> tuple[list[str], list[list[str]]]:
    """Return the header of a table and its complete rows, numbers as text; ([], []) if there is no table."""
    if not path.is_file():
        return [], []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    header, *table = [line.rstrip("\r\n").split(",") for line in lines if line.endswith("\n")] or [[]]
    numbers = re.compile(r"[0-9]{1,9}(,(nan|-?[0-9]+(\.[0-9]+)?(e[-+]?[0-9]+)?))*")
    return header, [row for row in table if len(row) == len(header) and numbers.fullmatch(",".join(row))]


def rows(path: Path, first: float = math.inf) -> list[list[str]]:
    """Return the complete rows of a table that belong to steps before `first`."""
    return [row for row in read(path)[1] if int(row[0]) < first]


def start(path: Path, header: tuple, first: float = math.inf) -> list[list[str]]:
    """(Re)write a table with its header and the rows of steps before `first`, which are returned.

    UserError if the table has other columns.
    """
    old, kept = read(path)
    if old and old != list(header):  # its rows would no longer be read
        raise UserError(f"{path}: has other columns than this version writes; choose a new folder")
    kept = [row for row in kept if int(row[0]) < first]
    with atomic(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *kept])
    return kept


def append(path: Path, row: list) -> None:
    """Add one row to a table; the file is opened again, so that an error is reported once, and here."""
    with open(path, "a", newline="", encoding="utf-8") as file:
        csv.writer(file).writerow(row)


def best(scores: list[list[str]]) -> list[str] | None:
    """Return the row of miou.csv with the highest mean; None if none has a mean."""
    return max((row for row in scores if row[1] != "nan"), key=lambda row: float(row[1]), default=None)
