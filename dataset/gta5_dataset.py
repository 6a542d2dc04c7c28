"""GTA5 (Richter et al., ECCV 2016): 24,966 labelled images of a game, 1914x1052; 24,941 as downloaded."""

from pathlib import Path

import numpy as np

from dataset.file_lists import check_files, few, find_files, list_images
from dataset.labels import open_label, read_label
from dataset.transform import open_image, to_input
from utils.system.errors import UserError

HOME = "https://download.visinf.tu-darmstadt.de/data/from_games/"
MAX_ABSENT = 0.01  # of the pairs of a list


class GTA5DataSet:
    """images/NNNNN.png with labels/NNNNN.png below `root`; item i is (image, label).

    image: float32 (3, H, W), BGR minus mean. label: int32 (H, W), trainIds, 255 = ignored.
    The images are all of them, those of a list file, or a `subset` of the file split.mat (`split`). Up to 1 %
    of the pairs that a list or split names may be absent: they are skipped, and `reports` lists them.
    UserError if a folder, more pairs, or only the image or only the label of a pair is missing.
    """

    reports: tuple[str, ...] = ()
    open_label = staticmethod(open_label)
    warned = False  # of a label whose aspect ratio is not its image's

    def __init__(self, root: str, list_path: str | None = None, size: tuple[int, int] = (1280, 720),
                 split: str | None = None, subset: str = "all"):
        images, labels = Path(root) / "images", Path(root) / "labels"
        self.size = size
        if not images.is_dir() or not labels.is_dir():
            raise UserError(f"GTA5 not found: no folders {images} and {labels} (--data-dir); "
                            f"download: {HOME} — or try --demo, which needs no data")
        names, self.reports = list_images(images, list_path)
        if split:
            names = read_split(split, subset, names, images)
        if (split or list_path) and (absent := absent_pairs(names, images, labels)):
            self.reports += (
                f"{split or list_path}: {len(absent)} of {len(names)} images skipped: GTA5 here has neither "
                f"image nor label of {few(absent, 25)}",
            )
            names = [name for name in names if name not in set(absent)]
        self._set_files("GTA5", images, labels, names)

    def _set_files(self, what: str, images: Path, labels: Path, names: list[str]):
        """Set names, images and labels; UserError if an image or label is missing."""
        self.names = names
        self.images = check_files([images / name for name in names], f"{what} image")
        self.labels = check_files(label_paths(labels, names), f"{what} label")

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        return self.read(i)

    def read(self, i: int, scale: float = 1.0, mirror: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """Return item i; `scale` resizes only the image, as the released code does, `mirror` flips both."""
        image = open_image(self.images[i])
        label = read_label(self, i, image.size, self.size).astype(np.int32)
        label = np.ascontiguousarray(label[:, ::-1]) if mirror else label
        return to_input(image, self.size, scale, mirror), label


def absent_pairs(names: list[str], images: Path, labels: Path) -> list[str]:
    """Return the names with neither image nor label, or none if these are more than 1 %.

    Downloads of GTA5 lack 25 numbers that its own split.mat and the authors' lists name.
    """
    there = find_files([images / name for name in names]), find_files(label_paths(labels, names))
    pairs = zip(names, label_paths(labels, names))
    absent = [name for name, label in pairs if images / name not in there[0] and label not in there[1]]
    return absent if len(absent) <= MAX_ABSENT * len(names) else []


def label_paths(labels: Path, names: list[str]) -> list[Path]:
    """Return the labels of some images, which may be JPEG: PNG files of the same stems."""
    return [labels / Path(name).with_suffix(".png") for name in names]


def read_split(path: str, subset: str, found: list[str], where: Path) -> list[str]:
    """Return the images of `subset`, "train" or "val", of GTA5's split.mat, in order of their numbers.

    Its trainIds and valIds are numbers of images, counted from 1, of any shape and numeric type.
    UserError if it is no such file, or if more than 1 % have no image among the names `found` in `where`.
    """
    from scipy.io import loadmat, whosmat

    if not Path(path).is_file():
        raise UserError(f"--gta5-split {path}: no such file; split.mat comes with GTA5: {HOME}")
    key = f"{subset}Ids"
    try:
        content = loadmat(path, appendmat=False, variable_names=[key])
        keys = [] if key in content else [name for name, *_ in whosmat(path, appendmat=False)]
    except MemoryError:
        raise
    except Exception as error:  # SciPy raises many kinds for a damaged file
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise UserError(f"{path}: cannot read this .mat file of --gta5-split ({reason})") from None
    if key not in content:
        raise UserError(f"{path}: no {key} in it, only {', '.join(keys) or 'nothing'}; take GTA5's split.mat")
    values = np.asarray(content[key]).ravel()
    numbers = len(values) and values.dtype.kind in "uif" and ((values >= 1) & (values < 2**31)).all()
    if not numbers or (values % 1 != 0).any():
        raise UserError(f"{path}: {key} are not the numbers of images, counted from 1")
    there = {Path(name).stem: name for name in found}
    numbers = [f"{number:05d}" for number in np.unique(values).astype(np.int64)]
    names = [there.get(number, f"{number}.png") for number in numbers]
    missing = [f"{number}.png" for number in numbers if number not in there]
    if len(missing) > MAX_ABSENT * len(names):
        count = f"{len(missing)} of {len(names)}"
        raise UserError(f"{path}: {count} {key} have no image in {where}: {few(missing)}")
    return names
