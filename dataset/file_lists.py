"""Which files are images: found below a folder, or read from a list; and which files are missing."""

import os
import re
from collections import Counter, defaultdict
from functools import cache
from pathlib import Path

from dataset.transform import open_image
from utils.system.errors import UserError

SUFFIXES = (".png", ".jpg", ".jpeg")  # in any case
OTHER_SUFFIXES = tuple(
    ".bmp .tif .tiff .webp .gif .jfif .jpe .jp2 .heic .heif .avif .ppm .pgm .tga .dng .exr".split()
)
# Of Windows, Linux, macOS and network drives: what they hold was deleted, or is a thumbnail.
SYSTEM_FOLDERS = {"$recycle.bin", "recycler", "system volume information", "lost+found", "__macosx"}
SYSTEM_FOLDERS |= {"@eadir", "@recycle", "#recycle", "#snapshot", "~snapshot", "@recently-snapshot"}
# Parts of names that suggest labels; the content of a few such files decides.
LABEL_WORDS = re.compile(
    r"(?<![a-z])(gt(?!a)|(anno?|seg|colou?r)(?![a-z]))"
    r"|label|lbl|mask|annot|segment|semantic|panoptic|truth|instance|trainid",
    re.IGNORECASE,
)
MAX_COLOURS = 64  # of an image of labels


def few(names: list[str], count: int = 3) -> str:
    """Return the first of some names, for a message."""
    return ", ".join(names[:count]) + " …" * (len(names) > count)


def list_images(
    where: Path, list_path: str | None = None, infix: str = "", complete: bool = False
) -> tuple[list[str], tuple[str, ...]]:
    """Return the images of a list, or without one all below `where`, and lines that count what is skipped.

    The names are relative to `where`. If any has `infix` before its suffix, all others are skipped. UserError
    if there are no images, or two of one name, whose results would overwrite each other; if labels are among
    them; and with `complete` if an image has a format that is not read.
    """
    others, reports = [], ()
    if list_path:
        names = read_list(list_path, where)
    else:
        found, others = find_images(where)
        names = [name for name in found if infix in Path(name).stem]
        if not names:
            names = found
            check_no_labels(where, names, str(where))
        elif skipped := sorted({*found} - {*names}):
            reports = (f"{where}: {len(skipped)} of {len(found)} images skipped, as others have {infix} in "
                       f"their names: {few(skipped)}",)  # fmt: skip
    if others:
        reports += (unread(where, others, names),)
    if others and complete:
        raise UserError(f"{reports[-1]}; convert them, or move them away")
    if not names:
        raise UserError(f"{list_path or where}: no images in it" + "".join(f"; {line}" for line in reports))
    check_unique(names, list_path or where)
    return names, reports


def check_unique(names: list[str], origin: str | Path) -> None:
    """Raise a UserError, which begins with `origin`, if two images have one name."""
    stems = Counter(Path(name).stem for name in names)
    duplicates = [name for name in names if stems[Path(name).stem] > 1]
    if duplicates:
        raise UserError(
            f"{origin}: {len(duplicates)} of {len(names)} images share a name with another: "
            + few(sorted(duplicates, key=lambda name: Path(name).stem), 4)
        )


def unread(where: Path, others: list[str], names: list[str]) -> str:
    """Return a line that counts the images of `where` whose formats are not read."""
    count = f"{len(others)} of {len(others) + len(names)}"
    return f"{where}: {count} images skipped, as only PNG and JPEG are read: {few(others)}"


def read_list(path: str, where: Path) -> list[str]:
    """Return the entries of a list file relative to `where`; UserError for one that is not below it."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")  # some editors begin it with a byte-order mark
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot read this list ({error})") from None
    names, absolute = [], os.path.abspath(where)
    real = cache(os.path.realpath)  # as it asks the disk for every folder of a path
    for entry in (line.strip() for line in text.splitlines() if line.strip()):
        file, base = os.path.normpath(os.path.join(absolute, entry)), absolute
        if not file.startswith(base + os.sep) and "\0" not in file:  # perhaps it is, behind links
            file, base = os.path.join(real(os.path.dirname(file)), os.path.basename(file)), real(absolute)
        if not file.startswith(base + os.sep):
            raise UserError(f"{path}: {entry} is not below {where}, the folder of the images")
        names.append(file[len(base) + 1 :])
    return names


def find_images(root: Path) -> tuple[list[str], list[str]]:
    """Return the images below a folder, and those of formats that are not read: relative names, sorted.

    Hidden files (macOS adds a ._NAME.png to each) and what belongs to the system are skipped. Linked folders
    are searched last, and each folder once: links may lead in circles. UserError for links that lead nowhere;
    PermissionError for a folder that may not be read.
    """
    images, others, nowhere, seen = [], [], [], set()
    folders, links = [str(root)] if root.is_dir() else [], []
    while folders or links:
        folder = (folders or links).pop(0)
        if (real := os.path.realpath(folder)) in seen:
            continue
        seen.add(real)
        with os.scandir(folder) as entries:
            visible = [e for e in entries if e.name[0] != "." and e.name.lower() not in SYSTEM_FOLDERS]
        for entry in sorted(visible, key=lambda entry: entry.name):  # only for links these calls ask the disk
            suffix = os.path.splitext(entry.name)[1].lower()
            if entry.is_dir():
                (links if entry.is_symlink() else folders).append(entry.path)
            elif entry.is_file():
                images += [entry.path] * (suffix in SUFFIXES)
                others += [entry.path] * (suffix in OTHER_SUFFIXES)
            elif entry.is_symlink() and not os.path.exists(entry.path):
                nowhere.append(entry.path)
    if nowhere:
        raise UserError(f"{root}: {len(nowhere)} links below it lead nowhere: {few(sorted(nowhere))}; "
                        "restore their files, or remove them")
    start = len(os.path.join(root, ""))
    return sorted(path[start:] for path in images), sorted(path[start:] for path in others)


def check_no_labels(root: Path, names: list[str], what: str) -> None:
    """Raise a UserError, which begins with `what`, if there are labels among the images of a folder.

    That is: a name suggests a kind of labels, a file of this kind has few colours, and one of others has not.
    """
    kinds = defaultdict(list)
    for name in names:
        for word in {match[0].lower() for match in LABEL_WORDS.finditer(os.path.splitext(name)[0])}:
            kinds[word].append(name)
    for kind in kinds.values():
        labels = [name for name in kind[:5] if is_label(root / name)]  # an image may have several of a kind
        others = sorted({*names} - {*kind}) if labels else []
        if any(is_label(root / name) is False for name in others[:: len(others) // 5 + 1]):
            raise UserError(f"{what}: {root / labels[0]} is in it, a label that would be taken for an image; "
                            "name the folder of the images, or move the labels away")


def is_label(path: Path) -> bool | None:
    """Return whether an image has few colours, or a mode that no photograph has; None if it is damaged."""
    try:
        image = open_image(path)
    except UserError:
        return None  # the one who needs it will report it
    return image.mode not in ("RGB", "RGBA", "L", "LA", "P", "CMYK") or bool(image.getcolors(MAX_COLOURS))


def find_files(paths: list[Path]) -> dict[Path, Path]:
    """Return those of the files that exist, as they are on disk: their suffixes may be in another case.

    Every folder is listed once. A link that leads nowhere does not exist.
    """

    def key(name: str) -> str:
        stem, suffix = os.path.splitext(name)
        return stem + suffix.lower()

    there: dict[Path, dict[str, str]] = {}
    for folder in {path.parent for path in paths}:
        names = [e.name for e in os.scandir(folder) if e.is_file()] if folder.is_dir() else []
        there[folder] = {**{key(name): name for name in names}, **{name: name for name in names}}
    found = {}
    for path in paths:
        names = there[path.parent]
        if name := names.get(path.name) or names.get(key(path.name)):
            found[path] = path if name == path.name else path.with_name(name)
    return found


def check_files(paths: list[Path], what: str) -> list[Path]:
    """Return the files as they are on disk; UserError with the count and the first few that are missing."""
    found = find_files(paths)
    missing = [path for path in paths if path not in found]
    if missing:
        shown = [f"{p}, which leads nowhere" if p.is_symlink() else str(p) for p in missing[:4]]
        raise UserError(f"{len(missing)} of {len(paths)} {what} files are missing: {few(shown)}")
    return [found[path] for path in paths]
