"""The rooms of the program: which folder may import which. Imports are read from the source, not executed."""

import ast
from pathlib import Path

import pytest

from tests.scripts import ROOT

FOLDERS = ("dataset", "model", "options", "utils")
# What the files of a room may import of the project; rooms that are not listed may import all but the tools.
MAY_IMPORT = {
    "utils/system": ("utils.system",),
    "dataset": ("dataset", "utils.system"),
    "model": ("model", "utils.system", "dataset.classes"),
    "options": ("options", "utils.system", "dataset.classes"),
}
DEMO = ("CLAN_train_gta5_2_city.py", "utils.tools.demo.demo")  # the one import of a tool, in a function


def imports(path: Path) -> list[tuple[str, bool]]:
    """Return the full names that a file imports, and whether a function or class imports them."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, node not in tree.body) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            found += [(f"{module}.{alias.name}", node not in tree.body) for alias in node.names]
    return found


def within(name: str, modules: tuple[str, ...]) -> bool:
    """Return whether an imported name is one of the modules or below one."""
    return any(f"{name}.".startswith(f"{module}.") for module in modules)


def forbidden(root: Path) -> list[str]:
    """Return "file imports name" for each import that the rules of the rooms forbid."""
    scripts = tuple(path.stem for path in root.glob("*.py"))
    project, found = (*FOLDERS, *scripts, "tests"), []
    for path in [*root.glob("*.py"), *(path for folder in FOLDERS for path in (root / folder).rglob("*.py"))]:
        place = path.relative_to(root).as_posix()
        allowed = next((names for room, names in MAY_IMPORT.items() if place.startswith(f"{room}/")), None)
        for name, in_function in imports(path):
            if name.startswith("."):  # not used here: full names say which room they are of
                good = False
            elif not within(name, project):
                good = True
            elif within(name, ("utils.tools",)):
                good = place.startswith("utils/tools/") or (in_function and (place, name) == DEMO)
            else:
                good = not within(name, ("tests",)) and (allowed is None or within(name, allowed))
            found += [] if good else [f"{place} imports {name}"]
    return found


def test_arrows_point_down():
    assert len(imports(ROOT / "utils" / "run.py")) > 20
    assert forbidden(ROOT) == []


@pytest.mark.parametrize(
    "place, line",
    [
        ("utils/system/files.py", "from dataset import classes"),
        ("utils/system/files.py", "import utils.tables"),
        ("dataset/transform.py", "from utils import metrics"),
        ("dataset/transform.py", "def read():\n    from options import Parser"),
        ("model/CLAN_D.py", "from dataset.transform import IMG_MEAN"),
        ("options/resume.py", "from utils.run_folder import snapshots"),
        ("utils/visual.py", "from utils.tools.bars import bars"),
        ("utils/visual.py", "from utils import tools"),
        ("utils/run.py", "from .tables import LOSSES"),
        ("utils/run.py", "from tests.scripts import ROOT"),
        ("CLAN_evaluate_city.py", "from utils.tools.demo import demo"),
        ("CLAN_train_gta5_2_city.py", "from utils.tools.demo import demo"),  # on top, not in a function
    ],
)
def test_an_arrow_that_points_up_is_found(tmp_path, place, line):
    (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / place).write_text(f"import os\nfrom utils.system.files import atomic\n{line}\n")
    assert len(forbidden(tmp_path)) == 1 and forbidden(tmp_path)[0].startswith(f"{place} imports ")
