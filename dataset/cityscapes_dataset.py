"""Cityscapes (Cordts et al., CVPR 2016): 2,975 / 500 / 1,525 images of streets, 2048x1024."""

import os
import re
from pathlib import Path

from dataset.file_lists import check_all_used, list_images
from dataset.images import Images
from utils.system.errors import UserError

TREES = ("leftImg8bit", "leftimg8bit", "data/leftImg8bit", "data/leftimg8bit")  # where images may lie
INFIX, LABEL_END = "_leftImg8bit", "_gtFine_labelIds.png"


class cityscapesDataSet(Images):
    """leftImg8bit/SET/CITY/*_leftImg8bit.png below `root` or `root`/data; with `labels=True`, their labels.

    `names`: "CITY_NNNNNN_NNNNNN_leftImg8bit". Images of one's own may be called NAME.png or NAME.jpg, with
    NAME_gtFine_labelIds.png. UserError if a folder or file, or the image of a label, is missing.
    """

    def __init__(self, root: str, set: str = "train", list_path: str | None = None,
                 size: tuple[int, int] = (1024, 512), labels: bool = False):
        folder, truth = find_tree(Path(root), set)
        files, reports = list_images(folder, list_path, INFIX, complete=labels)
        # Images of Foggy Cityscapes, NAME_leftImg8bit_foggy_beta_0.02.png, share the label of NAME.
        stems = [os.path.splitext(file)[0] for file in files]
        truths = [truth / (re.sub(f"{INFIX}[^/]*$", "", stem) + LABEL_END) for stem in stems]
        names, images = [os.path.basename(stem) for stem in stems], [folder / file for file in files]
        super().__init__(size, names, images, truths if labels else None, reports)
        if labels and not list_path:
            check_all_used(truth, self.labels, LABEL_END)


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
        "(--data-dir-target in training, not needed with --method source --not-val; --data-dir in "
        "evaluation); download: "
        "https://www.cityscapes-dataset.com/ — or try CLAN_train_gta5_2_city.py --demo, which needs no data"
    )
