"""The classes of the project, their number, names and subsets, from dataset/cityscapes_list/info.json."""

import json
import sys
from pathlib import Path

from utils.system.errors import UserError

INFO_PATH = Path(__file__).parent / "cityscapes_list" / "info.json"
IGNORE_LABEL = 255


def read_classes(path: Path) -> dict:
    """Return the content of info.json, which people edit for their own classes.

    UserError with all that is wrong.
    """
    wrong = []

    def need(fits: bool, what: str) -> None:
        if not fits:
            wrong.append(what)

    def colours(value: list) -> set[tuple]:
        need(all(len(c) == 3 and set(c) <= set(range(256)) for c in value), "a colour is [R, G, B], 0 to 255")
        return set(map(tuple, value))

    try:
        info = json.loads(path.read_text(encoding="utf-8"))
        n, names, sets = info["classes"], info["label"], info.get("subsets", [])
        palette, void = colours(info["palette"]), colours(info.get("void", []))
        need(n == len(names) == len(set(names)), f'"classes" is {n}, but "label" has {len(set(names))} names')
        need(len(info["palette"]) == n == len(palette - void),
             f'"palette" has to be {n} different colours, none of them in "void"')
        need(not set(",\"\n\r") & set("".join(names)) and names == [name.strip() for name in names],
             '"label" has names with a comma, quote, line break or blanks around them')
        for key, top, hint in (("label2train", 256, ""),
                               ("synthia2train", 2**16, "; delete it unless you use SYNTHIA")):
            need(all(type(i) is type(t) is int and -1 <= i < top and (0 <= t < n or t == IGNORE_LABEL)
                     for i, t in info.get(key, [])),
                 f'"{key}" has to be pairs [id below {top}, trainId below {n} or 255]{hint}')
        trainIds = dict(info["label2train"])
        need(len(trainIds) == len(info["label2train"]) and set(trainIds.values()).issuperset(range(n)),
             f'"label2train" needs an id for each trainId below {n}, and no id twice')
        need(len({n, *map(len, sets)}) == 1 + len(sets) and set(names).issuperset(sum(sets, [])),
             '"subsets" has to be lists of names in "label", each of another length')
    except (OSError, ValueError, TypeError, KeyError) as error:
        wrong.append(f"cannot read the classes ({type(error).__name__}: {error})")
    if wrong:
        raise UserError(f"{path}: {'; '.join(wrong)}")
    return info


try:
    INFO = read_classes(INFO_PATH)
except UserError as error:  # at import, before a script can report it
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)
CLASS_NAMES: list[str] = INFO["label"]
NUM_CLASSES = len(CLASS_NAMES)
# Number of classes -> their trainIds: all, then the subsets of 16 and 13 that results from SYNTHIA use.
_sets = (CLASS_NAMES, *INFO.get("subsets", []))
CLASS_SETS = {len(names): [CLASS_NAMES.index(name) for name in names] for names in _sets}
