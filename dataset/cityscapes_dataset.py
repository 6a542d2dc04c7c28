"""Cityscapes (Cordts et al., CVPR 2016): 2,975 / 500 / 1,525 images of streets, 2048x1024."""

import os
import re
from pathlib import Path

from dataset.file_lists import few, find_images, list_images
from dataset.images import Images
from utils.system.errors import UserError

TREES = ("leftImg8bit", "leftimg8bit", "data/leftImg8bit", "data/leftimg8bit")  # where images may lie
INFIX, LABEL_END = "_leftImg8bit", "_gtFine_labelIds.png"


class cityscapesDataSet(Images):
    """leftImg8bit/SET/CITY/*_leftImg8bit.png below `root` or `root`/data; with `labels=True`, their labels.

    `names`: "CITY_NNNNNN_NNNNNN_leftImg8bit". Images of one's own may be called NAME.png or NAME.jpg, with
    NAME_gtFine_labelIds.png. UserError if the folders, a file of the list, a label or the image of a label is
    missing.
    """

    def __init__(self, root: str, set: str = "train", list_path: str | None = None,
                 size: tuple[int, int] = (1024, 512), labels: bool = False):
        folder, truth = find_tree(Path(root), set)
        names, self.reports = list_images(folder, list_path, INFIX, complete=labels)
        # Images of Foggy Cityscapes, NAME_leftImg8bit_foggy_beta_0.02.png, share the label of NAME.
        stems = [os.path.splitext(name)[0] for name in names]
        truths = [truth / (re.sub(f"{INFIX}[^/]*$", "", stem) + LABEL_END) for stem in stems]
        super().__init__("Cityscapes", [folder / name for name in names], truths if labels else None)
        self.names, self.size = [path.stem for path in self.images], size
        if labels and not list_path:
            ending = LABEL_END.lower()
            found = {truth / name for name in find_images(truth)[0] if name.lower().endswith(ending)}
            if extra := sorted(map(str, found.difference(self.labels))):
                raise UserError(f"{len(extra)} of {len(found)} labels have no image: {few(extra)}; get the "
                                "images, or move these labels away")


def find_tree(root: Path, set: str) -> tuple[Path, Path]:
    """Return the image and the label folder of one set, in any of TREES; UserError if it has none."""
    places = [root / tree for tree in TREES if (root / tree).is_dir()]
    for place in places:
        if (place / set).is_dir():
            return place / set, place.parent / "gtFine" / set
    if places:
        raise UserError(f"{places[0]}: no folder {set} in it; --set names another, or it is incomplete; "
                        "a training with --not-val needs no val")
    raise UserError(
        f"Cityscapes not found: no folder {root / TREES[0] / set} or {root / TREES[3] / set} "
        "(--data-dir-target in training, --data-dir in evaluation); download: "
        "https://www.cityscapes-dataset.com/ — or try CLAN_train_gta5_2_city.py --demo, which needs no data"
    )
