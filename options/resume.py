"""Options of a resumed run: those of its options.json, and what the command line may change."""

import argparse
import json
import os
import sys
from pathlib import Path

from options import Parser
from utils.system.device import process_count
from utils.system.files import follow_link


def read_saved_options(parser: Parser, path: Path, args: argparse.Namespace) -> tuple[dict, bool, int]:
    """Return the restored options of a run's options.json, whether its lists may move, and its processes.

    Exit with one line if the file is damaged, or has a value that is no longer offered.
    """
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        processes, lists_may_move = int(saved.get("processes", 1)), isinstance(saved.get("names_crc32"), dict)
        saved = {"source": "gta5", "gta5_split": None, "gta5_subset": "all", **saved}  # older runs lack them
        restored = {name for name, option in parser.options.items() if option.resume != "new"}
        saved = {name: value for name, value in saved.items() if name in restored and value != ""}
    except (ValueError, TypeError, AttributeError, RecursionError):
        parser.error(f"{path} is damaged; move it away and give the options of the run by hand")
    if args.mode == "pynative":  # where it has no effect
        saved.pop("jit_level", None)
    if saved.get("jit_level") == "O2":  # MindSpore's GE backend, deprecated since its 2.9
        if not args.jit_level:
            parser.error(f"{path} says --jit-level O2, which is no longer offered: add --jit-level O0 or O1")
        del saved["jit_level"]
    return saved, lists_may_move, processes


def merge_resume_options(
    parser: Parser, args: argparse.Namespace, argv: list[str] | None
) -> argparse.Namespace:
    """Return the options of a resumed run: its options.json, and what the command line may change."""
    given = follow_link(Path(args.continue_train))
    folder = given if given.is_dir() else given.parent
    path = folder / "options.json"
    if not path.is_file():
        if args.restore_from or args.restore_from_D:
            parser.error("--continue-train resumes from the checkpoint: leave out --restore-from")
        begins = "GTA5_", f"{given.stem}."  # the suffix of a checkpoint may be left out
        checkpoints = [p for p in folder.glob("*") if p.suffix in (".ckpt", ".pth", ".pt")]
        if not args.snapshot_dir and any(p.name.startswith(begins) for p in checkpoints):
            parser.error(f"{path} is missing: give the options of the run by hand, --snapshot-dir too")
        return args
    saved, lists_may_move, processes_then = read_saved_options(parser, path, args)
    # Replay saved options as argv so that they pass the same checks; the user's own come last and win.
    replayed = ["--snapshot-dir", str(folder)]
    for name, value in saved.items():
        option = parser.options[name]
        if name != "snapshot_dir" and value != option.default:
            text = ",".join(map(str, value)) if isinstance(value, list) else value
            flag = option.option_strings[0] if value is True else option.option_strings[-1]
            replayed.append(flag if isinstance(value, bool) else f"{option.option_strings[0]}={text}")
    before = parser.parse_args(replayed)
    args = parser.parse_args(replayed + (sys.argv[1:] if argv is None else argv))
    for name, option in parser.options.items():  # one that an older run lacks has its default
        given, there = getattr(args, name), getattr(before, name)
        if option.path and given and there:  # one file has many spellings
            given, there = os.path.realpath(given), os.path.realpath(there)
        may_change = option.resume in ("mutable", "new") or (option.resume == "list" and lists_may_move)
        if given != there and not may_change:
            parser.error(f"{option.option_strings[0]} {given} contradicts the run of {args.continue_train}: "
                         f"there it is {there}")
    processes = process_count()
    per_step = args.batch_size * args.iter_size * processes
    per_step_then = before.batch_size * before.iter_size * processes_then
    if per_step != per_step_then:
        parser.error(f"images per step: --batch-size {args.batch_size} x --iter-size {args.iter_size} x "
                     f"{processes} processes = {per_step}, but {args.continue_train} is of a run with "
                     f"{per_step_then}; change one of them so that it stays")
    return args
