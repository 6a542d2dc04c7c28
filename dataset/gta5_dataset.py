"""GTA5 (Richter et al., ECCV 2016): 24,966 labelled images of a game, 1914x1052; 24,941 as downloaded."""

import os
from pathlib import Path

import numpy as np

from dataset.file_lists import check_all_used, few, find_files, list_images
from dataset.images import Images
from utils.system.errors import UserError


class GTA5DataSet(Images):
    """images/NAME.png or .jpg with labels/NAME.png below `root`, in folders of the same names, too.

    The images are all of them, those of a list file, or a `subset` of the file split.mat (`split`). Up to 1 %
    of the pairs may be absent, as downloads lack 25 that split.mat and the authors' lists name: they are
    skipped, and `reports` lists them. UserError if a folder, more pairs or the label of an image is missing.
    With `evaluation` labels keep their size, and labels without image and unread formats are errors, too.
    """

    what, folders = "GTA5", ("images", "labels")
    home = "https://download.visinf.tu-darmstadt.de/data/from_games/"

    def __init__(self, root: str, list_path: str | None = None, size: tuple[int, int] = (1280, 720),
                 split: str | None = None, subset: str = "all", evaluation: bool = False):
        images, labels = (Path(root) / folder for folder in self.folders)
        if not images.is_dir() or not labels.is_dir():
            raise UserError(f"{self.what} not found: no folders {images} and {labels} (--data-dir); "
                            f"download: {self.home} — or try --demo, which needs no data")
        files, reports = list_images(images, list_path, complete=evaluation)
        if split:
            files = read_split(split, subset, files)
        names = [os.path.splitext(file)[0] for file in files]
        pairs = [(name, images / file, labels / f"{name}.png") for name, file in zip(names, files)]
        if split or list_path:  # otherwise each image has been found
            there = find_files([path for _, *pair in pairs for path in pair]).keys()
            absent = [name for name, *pair in pairs if there.isdisjoint(pair)]
            if 0 < len(absent) <= 0.01 * len(pairs):
                reports += (f"{split or list_path}: {len(absent)} of {len(pairs)} images skipped, as "
                            f"neither image nor label is there: {few(absent, 25)}",)
                pairs = [pair for pair in pairs if pair[0] not in absent]
        super().__init__(size, *map(list, zip(*pairs)), reports)
        self.labels_at_size = not evaluation
        if evaluation and not list_path:
            check_all_used(labels, self.labels, ".png")


def read_split(path: str, subset: str, found: list[str]) -> list[str]:
    """Return the images of `subset`, "train" or "val", of GTA5's split.mat, in order of their numbers.

    Its trainIds and valIds are numbers of images, counted from 1, of any shape and numeric type; `found` are
    the images that are there. UserError if it is no such file.
    """
    from scipy.io import loadmat

    try:
        numbers = np.unique(loadmat(path, appendmat=False)[f"{subset}Ids"]).astype(np.int64)
        if not len(numbers):
            raise ValueError("there are none")
    except MemoryError:
        raise
    except Exception as error:  # SciPy raises many kinds for a damaged file
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise UserError(f"{path}: cannot read the numbers {subset}Ids in this .mat file of --gta5-split "
                        f"({reason}); it comes with GTA5: {GTA5DataSet.home}") from None
    there = {Path(name).stem: name for name in found}
    return [there.get(f"{number:05d}", f"{number:05d}.png") for number in numbers]
