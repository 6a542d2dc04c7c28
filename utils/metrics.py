"""Confusion matrix, IoU and mIoU."""

import numpy as np

from dataset.classes import CLASS_NAMES, CLASS_SETS, NUM_CLASSES


def confusion_matrix(labels: np.ndarray, prediction: np.ndarray) -> np.ndarray:
    """Counts (C, C) int64 of trainIds of the same shape; pixels labelled 255 do not count."""
    index = NUM_CLASSES * labels.astype(np.int64) + prediction
    counts = np.bincount(index.ravel(), minlength=NUM_CLASSES**2)
    return counts[: NUM_CLASSES**2].reshape(NUM_CLASSES, NUM_CLASSES)  # behind them come those of label 255


def class_iou(confusion: np.ndarray) -> np.ndarray:
    """TP / (TP + FP + FN) in percent for each class, NaN for one in neither ground truth nor prediction."""
    tp = np.diag(confusion).astype(float)
    union = confusion.sum(0) + confusion.sum(1) - tp
    return 100 * np.divide(tp, union, out=np.full(len(tp), np.nan), where=union > 0)


def mean_iou(confusion: np.ndarray, classes: int = NUM_CLASSES) -> float:
    """The mean over the classes of a set (CLASS_SETS) that have an IoU, in percent; NaN if none has.

    A class's IoU does not depend on the set: pixels of other classes count where they are mistaken for it.
    """
    iou = class_iou(confusion)[CLASS_SETS[classes]]
    return float(np.nanmean(iou)) if not np.isnan(iou).all() else float("nan")


def mean_name(classes: int) -> str:
    """Return the name of the mean over so many classes in tables and files."""
    return "mIoU" if classes == NUM_CLASSES else f"mIoU_{classes}"


def unlabelled_classes(confusion: np.ndarray, classes: int = NUM_CLASSES) -> list[str]:
    """Return the names of the classes of a set (CLASS_SETS) that no pixel is labelled as."""
    return [CLASS_NAMES[i] for i in CLASS_SETS[classes] if not confusion[i].any()]


def iou_table(confusion: np.ndarray, classes: int = NUM_CLASSES) -> str:
    """A line for each class of the set and one for the mean, in percent."""
    iou = class_iou(confusion)
    cells = ["–" if np.isnan(v) else f"{v:.2f}" for v in iou]
    rows = [f"{CLASS_NAMES[i]:<14}{cells[i]:>7}" for i in CLASS_SETS[classes]]
    return "\n".join([*rows, f"{mean_name(classes):<14}{mean_iou(confusion, classes):7.2f}"])


def number_or_none(x: float) -> float | None:
    """Return None for NaN, which JSON cannot represent."""
    return None if np.isnan(x) else float(x)
