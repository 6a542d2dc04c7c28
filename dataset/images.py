"""What the readers of all data sets share."""

from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from dataset.file_lists import check_files
from dataset.labels import open_label
from dataset.transform import LABEL_TO_TRAIN, open_image, to_input


class Images:
    """Images by index: item i is (input,), or (input, label) if there are labels.

    input: float32 (3, H, W), BGR minus mean, at `size` (W, H). label: trainIds (H, W), 255 = ignored; with
    `labels_at_size` int32 at `size`, otherwise uint8 at the file's own size. A reader sets `names` and
    `size`; `reports` has lines for the log. UserError if an image or label is missing.
    """

    reports: tuple[str, ...] = ()
    labels_at_size = False
    upright = False  # whether images are turned by EXIF; labels belong to the pixels as they are stored
    open_label = staticmethod(open_label)
    _warned = False  # of a label whose aspect ratio is not its image's

    def __init__(self, what: str, images: list[Path], labels: list[Path] | None = None):
        self.images = check_files(images, f"{what} image")
        self.labels = None if labels is None else check_files(labels, f"{what} label")

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
        label = self._read_label(i, image)
        return x, np.ascontiguousarray(label[:, ::-1]) if mirror else label

    def _read_label(self, i: int, image: Image.Image) -> np.ndarray:
        label = self.open_label(self.labels[i])
        if abs(label.width * image.height / (label.height * image.width) - 1) > 0.01 and not self._warned:
            self._warned = True
            tqdm.write(f"{self.labels[i]}: {label.width}x{label.height} has another aspect ratio than its "
                       f"image, {image.width}x{image.height}: was one of them cropped? (told only once)")
        if self.labels_at_size:
            label = label.resize(self.size, Image.Resampling.NEAREST)
        trainIds = label.point(LABEL_TO_TRAIN.tolist())
        return np.array(trainIds, np.int32 if self.labels_at_size else np.uint8)
