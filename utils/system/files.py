"""Files that are written completely or not at all, numbered names for earlier ones, links, JSON."""

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

    Even after a kill or a power failure, `path` has either its old content or the new one. Its permissions
    are those of any new file: MindSpore makes its files read-only for their owner.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.tmp{path.suffix}")
    try:
        temporary.unlink(missing_ok=True)  # of a process that was killed
        temporary.touch()
        mode = temporary.stat().st_mode
        yield temporary
        temporary.chmod(mode)
        flush(temporary)
        os.replace(temporary, path)
        with suppress(OSError):  # not every network file system flushes folders
            flush(path.parent)
    except OSError as error:
        error.filename = error.filename or str(path)  # the error of a full disk has no file name
        raise
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder next to `folder` to fill; at the end rename it."""
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
    """Wait until a file, or the list of names in a folder, is on disk (POSIX only)."""
    if os.name == "posix":
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def rotate_existing(*paths: Path) -> list[Path]:
    """Rename the paths that exist to NAME_1, or the first number free for all; return the new paths."""
    for n in count(1):
        names = [path.with_name(f"{path.stem}_{n}{path.suffix}") for path in paths]
        if not any(name.exists() for name in names):
            return [path.rename(name) for path, name in zip(paths, names) if path.exists()]


def follow_link(path: Path) -> Path:
    """Resolve a link, so that options.json is found next to its target, unless one is next to the link."""
    beside = (path.parent / "options.json").is_file()
    return Path(os.path.realpath(path)) if path.is_symlink() and not beside else path


def read_json(path: str | Path) -> object:
    """Return the content of a JSON file; None if it cannot be read."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None


def write_json(path: str | Path, content: dict) -> None:
    """Write `content` as indented JSON, atomically."""
    with atomic(path) as temporary:
        text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")  # of paths in other encodings
