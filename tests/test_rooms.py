"""The rooms of the program: which folder may import which. Imports are read from the source, not executed."""

import ast
from pathlib import Path

from tests.scripts import ROOT

PROJECT = ("dataset.", "model.", "options.", "utils.", "CLAN_", "tests.", ".")  # full names say the room
MAY_IMPORT = {  # the first room that fits; of the tools, see `forbidden`
    "utils/system/": ("utils.system.",),
    "dataset/": ("dataset.", "utils.system."),
    "model/": ("model.", "utils.system.", "dataset.classes."),
    "options/": ("options.", "utils.system.", "dataset.classes."),
    "": ("dataset.", "model.", "options.", "utils.", "CLAN_"),
}
DEMO = ("CLAN_train_gta5_2_city.py", "utils.tools.demo.demo.")  # the one import of a tool, in a function


def forbidden(root: Path) -> list[str]:
    """Return "file imports name" for each import that the rules of the rooms forbid."""
    found, folders = [], ("dataset", "model", "options", "utils")
    for path in [*root.glob("*.py"), *(path for folder in folders for path in (root / folder).rglob("*.py"))]:
        place, tree = path.relative_to(root).as_posix(), ast.parse(path.read_text(encoding="utf-8"))
        allowed = next(names for room, names in MAY_IMPORT.items() if place.startswith(room))
        for node in ast.walk(tree):
            if not isinstance(node, (ast.Import, ast.ImportFrom)):
                continue
            module = f"{'.' * node.level}{node.module or ''}." if isinstance(node, ast.ImportFrom) else ""
            for name in (f"{module}{alias.name}." for alias in node.names):
                if name.startswith("utils.tools."):
                    demo = (place, name) == DEMO and node not in tree.body
                    good = demo or place.startswith("utils/tools/")
                else:
                    good = name.startswith(allowed) or not name.startswith(PROJECT)
                found += [] if good else [f"{place} imports {name}"]
    return found


def test_arrows_point_down(tmp_path):
    assert forbidden(ROOT) == []
    up = {
        "utils/system/files.py": "import utils.tables",
        "dataset/transform.py": "def read():\n    from options import Parser",
        "model/CLAN_D.py": "from dataset.transform import IMG_MEAN",
        "options/resume.py": "from utils.run_folder import snapshots",
        "utils/visual.py": "from utils import tools",
        "utils/run.py": "from .tables import LOSSES",
        "CLAN_train_gta5_2_city.py": "from utils.tools.demo import demo",  # on top, not in a function
    }
    for place, line in up.items():
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / place).write_text(f"import os\nfrom utils.system.files import atomic\n{line}\n")
    assert sorted(line.split()[0] for line in forbidden(tmp_path)) == sorted(up)
