"""What the readers of all data sets share, and images without labels."""

import os
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from dataset.file_lists import check_files, check_no_labels, few, find_images
from dataset.labels import open_label
from dataset.transform import LABEL_TO_TRAIN, open_image, to_input
from utils.system.errors import UserError


class Images:
    """Images by index: item i is (input,), or (input, label) if there are labels.

    input: float32 (3, H, W), BGR minus mean, at `size` (W, H). label: trainIds (H, W), 255 = ignored; with
    `labels_at_size` int32 at `size`, otherwise uint8 at the file's own size. `names`: of the images, for
    messages and results; `reports`: lines for the log.
    """

    labels_at_size = False
    upright = False  # whether images are turned by EXIF; labels belong to the pixels as they are stored
    open_label = staticmethod(open_label)
    _warned = False  # of a label whose aspect ratio is not its image's

    def __init__(self, size: tuple[int, int], names: list[str], images: list[Path],
                 labels: list[Path] | None = None, reports: tuple[str, ...] = ()):
        """UserError if a file is missing, or two images share a name: their results would be one file."""
        self.size, self.names, self.reports = size, names, reports
        self.images = check_files(images, "image")
        self.labels = None if labels is None else check_files(labels, "label")
        count = Counter(names)
        if twice := [str(path) for path, name in zip(self.images, names) if count[name] > 1]:
            raise UserError(f"{len(twice)} of {len(names)} images share a name with another: "
                            f"{few(twice, 4)}; rename them or leave them out")

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, i: int) -> tuple[np.ndarray, ...]:
        return self.read(i)

    def read(self, i: int, scale: float = 1.0, mirror: bool = False) -> tuple[np.ndarray, ...]:
        """Return item i; `scale` resizes the image alone, as the released code does, `mirror` flips both."""
        image = open_image(self.images[i], self.upright)
        x = to_input(image, self.size, scale, mirror)
        if self.labels is None:
            return (x,)
        trainIds = self._read_label(i, image)
        return x, np.ascontiguousarray(trainIds[:, ::-1]) if mirror else trainIds

    def read_scales(self, i: int, scales: tuple[float, ...]) -> tuple[list[np.ndarray], np.ndarray]:
        """Return the inputs of item i at several scales of `size`, and its label.

        Without labels, its image at its own size instead, uint8 RGB (h, w, 3).
        """
        image = open_image(self.images[i], self.upright)
        shown = np.asarray(image.convert("RGB")) if self.labels is None else self._read_label(i, image)
        return [to_input(image, self.size, scale) for scale in scales], shown

    def _read_label(self, i: int, image: Image.Image) -> np.ndarray:
        label = self.open_label(self.labels[i])
        if abs(label.width * image.height / (label.height * image.width) - 1) > 0.01 and not self._warned:
            self._warned = True
            tqdm.write(f"{self.labels[i]}: {label.width}x{label.height} has another aspect ratio than its "
                       f"image, {image.width}x{image.height}: was one of them cropped? (told only once)")
        if self.labels_at_size:
            label = label.resize(self.size, Image.Resampling.NEAREST)
        dtype = np.int32 if self.labels_at_size else np.uint8
        return np.array(label.point(LABEL_TO_TRAIN.tolist()), dtype)


class ImageFolder(Images):
    """`path`, or all PNG and JPEG files below it, sorted; items are (input,), turned upright (EXIF).

    `names`: paths below `path` without suffix, or all of them with it if two would be alike. UserError if
    there is no image, or if labels are among them. `locked`: for --predict, the folders that may not be read.
    """

    upright = True

    def __init__(self, path: str, size: tuple[int, int], option: str = "--predict"):
        root, reports, self.locked = Path(path), (), []
        if not root.exists():
            raise UserError(f"{option} {path}: no such file or folder")
        if root.is_dir():
            files, reports = find_images(root, self.locked if option == "--predict" else None)
            check_no_labels(root, files)
        else:
            root, files = root.parent, [root.name]
        names = [os.path.splitext(file)[0] for file in files]
        names = names if len(set(names)) == len(names) else files
        super().__init__(size, names, [root / file for file in files], reports=reports)


def names_crc32(data: Images, labels: bool = False) -> int:
    """Return a checksum of the names of a data set's images, in order, and of the sizes of its `labels`."""
    sizes = [str(path.stat().st_size) for path in data.labels] if labels else []
    return zlib.crc32("\n".join([*data.names, *sizes]).encode(errors="surrogateescape"))  # of any encoding
