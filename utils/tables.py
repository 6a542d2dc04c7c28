"""The tables of a run, loss.csv and miou.csv, one row per step. A row that a kill has torn is no row."""

import csv
import re
from pathlib import Path

from dataset.classes import CLASS_NAMES, CLASS_SETS
from utils.metrics import mean_name
from utils.system.files import atomic

LOSSES = ("loss_seg", "loss_adv", "loss_weight", "loss_D_s", "loss_D_t")  # columns of loss.csv


def class_counts(source: str) -> list[int]:
    """Return the keys of CLASS_SETS over which a validation takes means; the first decides on the best."""
    every, *subsets = CLASS_SETS
    return subsets if source == "synthia" and subsets else [every]


def columns(source: str) -> dict[str, tuple[str, ...]]:
    """Return the columns of loss.csv and miou.csv in a run from this source."""
    return {
        "loss.csv": ("step", *LOSSES, "lr", "lr_D", "seconds"),
        "miou.csv": ("step", *map(mean_name, class_counts(source)), *CLASS_NAMES),
    }


def read(path: Path) -> tuple[list[str], list[list[str]]]:
    """Return the header of a table and its rows in the format of `append`; ([], []) if there is no table.

    A spreadsheet may have saved it, with a byte-order mark, quotes, E-05, semicolons and decimal commas.
    Lines that are no rows are left out, as is the last one without its end, which was torn by a kill.
    """
    if not path.is_file():
        return [], []
    *lines, _ = path.read_text(encoding="utf-8-sig", errors="replace").split("\n")
    separator = ";" if lines and re.match('"?step"?;', lines[0]) else ","
    header, *table = [[cell.strip('" ') for cell in line.split(separator)] for line in lines] or [[]]
    return header, [row for cells in table if len(cells) == len(header) and (row := numbers(cells))]


def numbers(cells: list[str]) -> list[str] | None:
    """Return the step and the values of a row as this program writes them; None if one is no number."""
    try:
        step, *values = [float(cell.replace(",", ".")) for cell in cells]
    except ValueError:
        return None
    is_step = step.is_integer() and 0 <= step < 10**9
    return [f"{step:.0f}", *(f"{value:.9g}" for value in values)] if is_step else None


def write(path: Path, header: tuple[str, ...], rows: list[list[str]]) -> None:
    """Write a whole table, atomically."""
    with atomic(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])


def append(path: Path, row: list) -> None:
    """Open a table, add one row and close it, so that a write error is raised here."""
    with open(path, "a", newline="", encoding="utf-8") as file:
        csv.writer(file).writerow(row)
