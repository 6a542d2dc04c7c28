"""Atomic file writing."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory


@contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path next to `path` to write to; at the end flush it to disk and rename it.

    Whatever happens, a kill or a power failure, `path` holds the old content or the new one.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.tmp{path.suffix}")
    try:
        yield temporary
        flush(temporary)
        os.replace(temporary, path)
        with suppress(OSError):  # not every network file system flushes folders
            flush(path.parent)
    except OSError as error:
        error.filename = error.filename or str(path)  # a full disk does not say where
        raise
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder next to `folder` to fill; at the end rename it, unless another process did."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as scratch:
        draft = Path(scratch) / folder.name
        draft.mkdir()
        yield draft
        try:
            draft.rename(folder)
        except OSError:
            if not folder.is_dir():  # if it is there, another process was faster
                raise


def flush(path: str | Path) -> None:
    """Wait until a file, or the names in a folder, are on disk (POSIX only)."""
    if os.name != "posix":
        return
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def rotate_existing(*paths: Path) -> list[Path]:
    """Rename those that are there to NAME_1, or the first number that is free for all; the new paths."""
    for n in count(1):
        names = [path.with_name(f"{path.stem}_{n}{path.suffix}") for path in paths]
        if not any(name.exists() for name in names):
            return [path.rename(name) for path, name in zip(paths, names) if path.exists()]


def follow_link(path: Path) -> Path:
    """A link to a checkpoint or a run leads to its run, unless options.json is beside the link itself."""
    beside = (path.parent / "options.json").is_file()
    return Path(os.path.realpath(path)) if path.is_symlink() and not beside else path


def read_json(path: str | Path) -> object:
    """The content of a JSON file; None if it cannot be read."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None


def write_json(path: str | Path, content: dict) -> None:
    """`content` as indented JSON, atomically."""
    with atomic(path) as temporary:
        text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        # Paths can be of any encoding; what is no text becomes an escape of JSON.
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")
