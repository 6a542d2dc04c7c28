"""Which files are images: found below a folder, or read from a list; and which files are missing."""

import os
import re
from pathlib import Path

import numpy as np

from dataset.transform import open_image
from utils.system.errors import UserError

SUFFIXES = (".png", ".jpg", ".jpeg")  # in any case
OTHER_SUFFIXES = (".bmp", ".tif", ".tiff", ".webp", ".gif", ".jfif", ".jp2", ".heic", ".avif", ".ppm")
# Of Windows, macOS, Linux and network drives: what they hold was deleted, or is a thumbnail.
SYSTEM_FOLDERS = {"$recycle.bin", "system volume information", "__macosx", "lost+found", "@eadir", "#recycle",
                  "@recycle", "#snapshot"}  # fmt: skip
# What --predict has written (utils/visual.py), which no one wants to adapt to.
RESULT = re.compile(r"(.*/)?predict(_\d+)?/(legend\.png|(labelIds|color|overlay)/.*_\4\.png)")
# Parts of names that suggest labels; the content of a few such files decides.
LABEL_WORDS = re.compile(r"(?<![a-z])(gt(?!a)|(anno?|seg|colou?r)(?![a-z]))|label|lbl|mask|annot|segment|"
                         r"semantic|panoptic|truth|instance|trainid", re.IGNORECASE)
MAX_COLOURS = 64  # of an image of labels


def few(names: list[str], count: int = 3) -> str:
    """Return the first of some names, for a message."""
    return ", ".join(names[:count]) + " …" * (len(names) > count)


def list_images(
    where: Path, list_path: str | None = None, infix: str = "", complete: bool = False
) -> tuple[list[str], tuple[str, ...]]:
    """Return the images of a list, or without one all below `where`, and lines that count what is skipped.

    The names are relative to `where`. If any has `infix` before its suffix, all others are skipped. UserError
    if there is no image, if labels are among them, or with `complete` if a format is not read.
    """
    if list_path:
        return read_list(list_path, where), ()
    found, reports = find_images(where)
    if reports and complete:
        raise UserError(f"{reports[0]}; convert them, or move them away")
    names = [name for name in found if infix in Path(name).stem] or found
    if skipped := sorted({*found} - {*names}):
        reports += (f"{where}: {len(skipped)} of {len(found)} images skipped, as others have {infix} in "
                    f"their names: {few(skipped)}",)
    check_no_labels(where, names)
    return names, reports


def read_list(path: str, where: Path) -> list[str]:
    """Return the entries of a list file relative to `where`; UserError for one that is not below it."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")  # some editors begin it with a byte-order mark
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot read this list ({error})") from None
    names, roots = [], (os.path.abspath(where), os.path.realpath(where))
    for entry in filter(None, map(str.strip, text.splitlines())):
        file = os.path.normpath(os.path.join(roots[0], entry))
        below = [file[len(root) + 1 :] for root in roots if file.startswith(root + os.sep)]
        if not below:
            raise UserError(f"{path}: {entry} is not below {where}, the folder of the images")
        names.append(below[0])
    if not names:
        raise UserError(f"{path}: no images in it")
    return names


def find_images(root: Path, locked: list[str] | None = None) -> tuple[list[str], tuple[str, ...]]:
    """Return the images below a folder, as sorted relative names, and a line on those that are not read.

    Hidden files (macOS adds a ._NAME.png to each), what belongs to the system and results of --predict are
    skipped. Each folder is searched once: links may lead in circles. UserError if there is no image, or for
    links that lead nowhere; PermissionError for a folder that may not be read, unless it goes into `locked`.
    """
    images, others, nowhere, seen, folders = [], [], [], set(), [str(root)] if root.is_dir() else []
    for folder in folders:  # which grows
        if (real := os.path.realpath(folder)) in seen:
            continue
        seen.add(real)
        try:
            with os.scandir(folder) as entries:
                visible = [e for e in entries if e.name[0] != "." and e.name.lower() not in SYSTEM_FOLDERS]
        except PermissionError:
            if locked is None:
                raise
            locked.append(folder)
            continue
        for entry in sorted(visible, key=lambda entry: entry.name):  # only for links these calls ask the disk
            suffix = os.path.splitext(entry.name)[1].lower()
            name = os.path.relpath(entry.path, root).replace(os.sep, "/")
            if entry.is_dir():
                folders.append(entry.path)
            elif suffix not in ("", *SUFFIXES, *OTHER_SUFFIXES) or RESULT.fullmatch(name):
                continue
            elif entry.is_symlink() and not entry.is_file():
                nowhere.append(entry.path)
            elif suffix:
                (images if suffix in SUFFIXES else others).append(name)
    if nowhere:
        raise UserError(f"{root}: {len(nowhere)} links below it lead nowhere: {few(sorted(nowhere))}; "
                        "restore their files, or remove them")
    count = f"{len(others)} of {len(others) + len(images)} images skipped, as only PNG and JPEG are read"
    reports = (f"{root}: {count}: {few(sorted(others))}",) if others else ()
    if not images and locked:
        raise UserError(f"no image can be reached, as folders may not be read: {few(locked)}")
    if not images:
        raise UserError("; ".join((f"{root}: no image ({', '.join(SUFFIXES)}) in it", *reports)))
    return sorted(images), reports


def evenly_spaced_indices(total: int, count: int) -> np.ndarray:
    """Return `count` indices, or as many as there are, evenly spaced over `total`."""
    return np.linspace(0, total - 1, min(count, total)).astype(int)


def check_no_labels(root: Path, names: list[str]) -> None:
    """Raise a UserError if there are labels among the images of a folder.

    That is: some names suggest labels, a file of these has few colours, and one of the others has not.
    """

    def sample(names: list[str]) -> list[str]:
        return [names[i] for i in evenly_spaced_indices(len(names), 5)]

    suspects = [name for name in names if LABEL_WORDS.search(name)]
    others = sorted({*names} - {*suspects}) or names
    labels = [name for name in sample(suspects) if is_label(root / name)]
    if labels and any(is_label(root / name) is False for name in sample(others)):
        raise UserError(f"{root / labels[0]}: a label, which would be taken for an image; name the folder of "
                        "the images, or move the labels away")


def is_label(path: Path) -> bool | None:
    """Return whether an image has few colours, or a mode that no photograph has; None if it is damaged."""
    try:
        image = open_image(path)
    except UserError:  # is reported when the image is needed
        return None
    return image.mode not in ("RGB", "RGBA", "L", "LA", "P", "CMYK") or bool(image.getcolors(MAX_COLOURS))


def find_files(paths: list[Path]) -> dict[Path, Path]:
    """Return those of the files that exist, as they are on disk: their suffixes may be in another case."""

    def key(path: str | Path) -> str:
        stem, suffix = os.path.splitext(path)
        return stem + suffix.lower()

    there = {}
    for folder in {os.path.dirname(path) for path in paths}:  # "" is the current one
        if not os.path.isdir(folder or "."):
            continue
        files = [os.path.join(folder, e.name) for e in os.scandir(folder or ".") if e.is_file()]
        there |= {key(file): file for file in files} | {file: file for file in files}
    found = {path: there.get(str(path), there.get(key(path))) for path in paths}
    return {path: Path(file) for path, file in found.items() if file}


def check_files(paths: list[Path], what: str) -> list[Path]:
    """Return the files as they are on disk; UserError with the count and the first few that are missing."""
    found = find_files(paths)
    if missing := [str(path) for path in paths if path not in found]:
        raise UserError(f"{len(missing)} of {len(paths)} {what} files are missing: {few(missing)}")
    return [found[path] for path in paths]


def check_all_used(folder: Path, labels: list[Path], ending: str) -> None:
    """Raise a UserError if a folder has labels, whose names have this ending, that are not among `labels`."""
    found = {folder / name for name in find_images(folder)[0] if name.lower().endswith(ending.lower())}
    if extra := sorted(map(str, found.difference(labels))):
        raise UserError(f"{len(extra)} of {len(found)} labels have no image: {few(extra)}; get the "
                        "images, or move these labels away")
