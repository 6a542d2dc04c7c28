"""GTA5 (Richter et al., ECCV 2016): 24,966 labelled images of a game, 1914x1052; 24,941 as downloaded."""

import warnings
from pathlib import Path

import numpy as np

from dataset.file_lists import check_files, few, find_files, list_images
from dataset.transform import open_image, to_input, to_trainIds
from utils.system.errors import UserError

HOME = "https://download.visinf.tu-darmstadt.de/data/from_games/"
MAX_ABSENT = 0.01  # of the pairs of a list


class GTA5DataSet:
    """images/NNNNN.png with labels/NNNNN.png below `root`; item i is (image, label).

    image: float32 (3, H, W), BGR minus mean. label: int32 (H, W), trainIds, 255 = ignored.
    Without `list_path` all images, or with `split` and `subset` those of a subset of the file split.mat.
    Both may name a few pairs that are not there, up to 1 % of theirs: `reports` says which were skipped.
    UserError if the folders, more files of the list or the split, or a label alone is missing.
    """

    reports: tuple[str, ...] = ()

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
        self._warned = False

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
        """Item i; `scale` resizes the image alone (as the released code does), `mirror` flips both."""
        image = open_image(self.images[i])
        label = self._label(i, image.size).astype(np.int32)
        label = np.ascontiguousarray(label[:, ::-1]) if mirror else label
        return to_input(image, self.size, scale, mirror), label

    def _label(self, i: int, image_size: tuple[int, int]) -> np.ndarray:
        """trainIds (H, W) of item i at `size`, nearest."""
        ids = open_image(self.labels[i])
        if image_size != ids.size and not self._warned:
            self._warned = True  # the data set has a few such pairs: both are resized, so the pair is usable
            warnings.warn(
                f"{self.labels[i]}: the label's size differs from the image's; both are resized "
                "(further cases are not reported)",
                stacklevel=3,
            )
        return to_trainIds(ids, self.size)


def absent_pairs(names: list[str], images: Path, labels: Path) -> list[str]:
    """The names with neither image nor label; none if more than 1 %: the data set is incomplete then.

    GTA5 as it is downloaded lacks 25 numbers that its own split.mat and the authors' lists name.
    """
    there = find_files([images / name for name in names]), find_files(label_paths(labels, names))
    pairs = zip(names, label_paths(labels, names))
    absent = [name for name, label in pairs if images / name not in there[0] and label not in there[1]]
    return absent if len(absent) <= MAX_ABSENT * len(names) else []


def label_paths(labels: Path, names: list[str]) -> list[Path]:
    """Return the labels of some images, which may be JPEG: PNG files of the same stems."""
    return [labels / Path(name).with_suffix(".png") for name in names]


def read_split(path: str, subset: str, found: list[str], where: Path) -> list[str]:
    """The images that GTA5's split.mat has in `subset`, "train" or "val", in order of their numbers.

    Its trainIds and valIds count from 1, as the names of the images do; shape and type do not matter.
    UserError if it is no such file, or more than a few have no image among the names `found` in `where`.
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
    except Exception as error:  # a damaged file can trip any check of SciPy
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
