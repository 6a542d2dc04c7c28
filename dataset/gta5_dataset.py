"""GTA5 (Richter et al., ECCV 2016): 24,966 labelled images of a game, 1914x1052; 24,941 as downloaded."""

from pathlib import Path

import numpy as np

from dataset.file_lists import few, find_files, list_images
from dataset.images import Images
from utils.system.errors import UserError


class GTA5DataSet(Images):
    """images/NNNNN.png with labels/NNNNN.png below `root`.

    The images are all of them, those of a list file, or a `subset` of the file split.mat (`split`). Up to 1 %
    of the pairs that a list or split names may be absent, as downloads lack 25 numbers that split.mat and the
    authors' lists name: they are skipped, and `reports` lists them.
    UserError if a folder, more pairs, or only the image or only the label of a pair is missing.
    """

    what, folders, max_absent = "GTA5", ("images", "labels"), 0.01
    home = "https://download.visinf.tu-darmstadt.de/data/from_games/"
    labels_at_size = True

    def __init__(self, root: str, list_path: str | None = None, size: tuple[int, int] = (1280, 720),
                 split: str | None = None, subset: str = "all"):
        images, labels = (Path(root) / folder for folder in self.folders)
        if not images.is_dir() or not labels.is_dir():
            raise UserError(f"{self.what} not found: no folders {images} and {labels} (--data-dir); "
                            f"download: {self.home} — or try --demo, which needs no data")
        names, self.reports = list_images(images, list_path)
        if split:
            names = read_split(split, subset, names)
        label_of = {name: labels / Path(name).with_suffix(".png") for name in names}
        if split or list_path:
            there = find_files([*(images / name for name in names), *label_of.values()])
            absent = [name for name in names if not {images / name, label_of[name]} & there.keys()]
            if 0 < len(absent) <= self.max_absent * len(names):
                self.reports += (f"{split or list_path}: {len(absent)} of {len(names)} images skipped: "
                                 f"{self.what} here has neither image nor label of {few(absent, 25)}",)
                names = [name for name in names if name not in absent]
        self.names, self.size = names, size
        super().__init__(self.what, [images / name for name in names], [label_of[name] for name in names])


def read_split(path: str, subset: str, found: list[str]) -> list[str]:
    """Return the images of `subset`, "train" or "val", of GTA5's split.mat, in order of their numbers.

    Its trainIds and valIds are numbers of images, counted from 1, of any shape and numeric type; `found` are
    the images that are there. UserError if it is no such file.
    """
    from scipy.io import loadmat

    key = f"{subset}Ids"
    try:
        content = loadmat(path, appendmat=False)
    except MemoryError:
        raise
    except Exception as error:  # SciPy raises many kinds for a damaged file
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise UserError(f"{path}: cannot read this .mat file of --gta5-split ({reason}); it comes with GTA5: "
                        f"{GTA5DataSet.home}") from None
    values = np.ravel(content.get(key, []))
    numbers = values.dtype.kind in "uif" and ((values >= 1) & (values < 2**31) & (values % 1 == 0)).all()
    if not len(values) or not numbers:
        raise UserError(f"{path}: {key} in it are not the numbers of images, from 1; take GTA5's split.mat")
    there = {Path(name).stem: name for name in found}
    stems = [f"{number:05d}" for number in np.unique(values).astype(np.int64)]
    return [there.get(stem, f"{stem}.png") for stem in stems]
