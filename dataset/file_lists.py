"""Names of image files: found below a folder, or read from a list."""

import os
from collections import Counter
from fnmatch import fnmatch
from pathlib import Path

from utils.system.errors import UserError


def few(names: list[str], count: int = 3) -> str:
    """The first of some names, for an error message."""
    return ", ".join(names[:count]) + " …" * (len(names) > count)


def read_list(path: str | None, found: list[str], where: Path) -> list[str]:
    """The names in a list file, or without one all `found` below `where`.

    UserError if there are none, or two images of one name: results would overwrite each other.
    """
    if path is None:
        names = found
    else:
        try:
            text = Path(path).read_text(encoding="utf-8-sig")  # some editors begin it with a byte-order mark
            names = [line.strip() for line in text.splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: cannot read this list ({error})") from None
    if not names:
        raise UserError(f"{path or where}: no images in it")
    stems = Counter(Path(name).stem for name in names)
    duplicates = [name for name in names if stems[Path(name).stem] > 1]
    if duplicates:
        raise UserError(
            f"{path or where}: {len(duplicates)} of {len(names)} images share a name with another: "
            + few(sorted(duplicates, key=lambda name: Path(name).stem), 4)
        )
    return names


def png_files(folder: Path, pattern: str = "*.png") -> list[str]:
    """The files below `folder` that fit, sorted, without hidden ones: macOS adds a ._NAME.png to each.

    PermissionError for a folder that may not be read; Path.glob would leave it out.
    """
    places, (*levels, name) = [folder] if folder.is_dir() else [], pattern.split("/")
    for _ in levels:
        below = [path for place in places for path in place.iterdir()]
        places = [path for path in below if path.is_dir() and path.name[0] != "."]
    files = [place / file for place in places for file in os.listdir(place) if file[0] != "."]
    return sorted(str(path.relative_to(folder)) for path in files if fnmatch(path.name, name))


def missing_files(paths: list[Path]) -> list[Path]:
    """Those of the files that do not exist; every folder is listed once."""
    folders: dict[Path, set[str]] = {}
    for folder in {path.parent for path in paths}:
        folders[folder] = {p.name for p in folder.iterdir()} if folder.is_dir() else set()
    return [path for path in paths if path.name not in folders[path.parent]]


def check_files(paths: list[Path], what: str) -> None:
    """One UserError with the count and the first few of the files that do not exist."""
    missing = list(map(str, missing_files(paths)))
    if missing:
        raise UserError(f"{len(missing)} of {len(paths)} {what} files are missing: {few(missing)}")
