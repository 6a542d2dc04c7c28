"""CamVid (Brostow et al., 2009; SegNet's version) and IDD-Lite as the trees that the readers know."""

from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from dataset.file_lists import check_files, find_images
from dataset.transform import open_image
from utils.system import interrupt
from utils.system.errors import UserError
from utils.system.files import atomic_folder

# Ids of both data sets -> raw ids of Cityscapes: road 7, sidewalk 8, building 11 (whatever is far: vegetation
# too), fence 13 (whatever stands at the roadside), sky 23, person 24 (riders too), car 26, not labelled 0.
CAMVID = dict(enumerate((23, 11, 13, 7, 8, 11, 13, 13, 26, 24, 24, 0)))
IDD = {**dict(enumerate((7, 8, 24, 26, 13, 11, 23))), 255: 0}


def convert(camvid: str, idd: str, root: str) -> Path:
    """Write GTA5/, all of CamVid, and Cityscapes/, IDD-Lite, to `root` unless it exists; return that folder.

    UserError if a folder, an image or a label is not in order.
    """
    folder = Path(root)
    if folder.is_dir():
        return folder
    jobs = [*camvid_files(Path(camvid)), *idd_files(Path(idd))]
    labels = check_files([label for _, label, *_ in jobs], "label")  # as on disk
    with atomic_folder(folder) as draft:
        pairs = tqdm(zip(jobs, labels), f"converting to {folder}", len(jobs), disable=None)
        for (image_path, _, ids, *names), label_path in pairs:
            interrupt.exit_if_pending()
            for pixels, name in zip((open_image(image_path), relabel(label_path, ids)), names):
                (draft / name).parent.mkdir(parents=True, exist_ok=True)
                pixels.save(draft / name)  # as PNG, so that nothing more is lost
    return folder


def camvid_files(root: Path) -> list[tuple]:
    """Return (image, label, ids, where the image goes, where the label goes) for all three parts."""
    jobs = []
    for part in ("train", "val", "test"):
        for file in find_images(root / part)[0]:
            name = f"{Path(file).stem}.png"
            jobs.append((root / part / file, root / f"{part}annot" / name, CAMVID,
                         f"GTA5/images/{name}", f"GTA5/labels/{name}"))
    return jobs


def idd_files(root: Path) -> list[tuple]:
    """Return the same for train and val."""
    jobs = []
    for part in ("train", "val"):
        for file in find_images(root / "leftImg8bit" / part)[0]:
            path = root / "leftImg8bit" / part / file
            drive, number = path.parent.name, path.stem.removesuffix("_image")
            name = f"{part}/{drive}/{drive}_{number}"
            jobs.append((path, root / "gtFine" / part / drive / f"{number}_label.png", IDD,
                         f"Cityscapes/leftImg8bit/{name}_leftImg8bit.png",
                         f"Cityscapes/gtFine/{name}_gtFine_labelIds.png"))
    return jobs


def relabel(path: Path, ids: dict[int, int]) -> Image.Image:
    """Return a label with raw ids of Cityscapes; UserError if it has an unknown id."""
    pixels, table = np.asarray(open_image(path)), np.zeros(256, np.uint8)
    if unknown := sorted(set(np.unique(pixels).tolist()) - ids.keys()):
        raise UserError(f"{path}: unknown id {unknown[0]}; this data set has {', '.join(map(str, ids))}")
    table[list(ids)] = list(ids.values())
    return Image.fromarray(table[pixels])
