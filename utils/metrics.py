"""Confusion matrix, IoU and mIoU."""

import numpy as np

from dataset.classes import CLASS_NAMES, CLASS_SETS, NUM_CLASSES


def confusion_matrix(labels: np.ndarray, prediction: np.ndarray) -> np.ndarray:
    """Return the confusion matrix (C, C) int64 of trainIds of one shape, ground truth in rows.

    Pixels labelled 255 do not count.
    """
    index = NUM_CLASSES * labels.astype(np.int64) + prediction
    counts = np.bincount(index.ravel(), minlength=NUM_CLASSES**2)
    return counts[: NUM_CLASSES**2].reshape(NUM_CLASSES, NUM_CLASSES)  # later entries belong to label 255


def class_iou(confusion: np.ndarray) -> np.ndarray:
    """Return TP / (TP + FP + FN) per class, in percent; NaN if neither labels nor predictions have it."""
    tp = np.diag(confusion).astype(float)
    union = confusion.sum(0) + confusion.sum(1) - tp
    return 100 * np.divide(tp, union, out=np.full(len(tp), np.nan), where=union > 0)


def mean_iou(confusion: np.ndarray, classes: int = NUM_CLASSES) -> float:
    """Return the mean IoU over the classes of a set (CLASS_SETS) that have one, in percent; NaN if none has.

    A class's IoU does not depend on the set: pixels of classes outside the set count as its false positives.
    """
    iou = class_iou(confusion)[CLASS_SETS[classes]]
    return float(np.nanmean(iou)) if not np.isnan(iou).all() else float("nan")


def mean_name(classes: int) -> str:
    """Return how tables and files call the mean over so many classes."""
    return "mIoU" if classes == NUM_CLASSES else f"mIoU_{classes}"


def iou_table(confusion: np.ndarray, classes: int = NUM_CLASSES) -> str:
    """Return a line for the IoU of each class of a set and one for their mean, in percent."""
    iou = class_iou(confusion)
    cells = ["–" if np.isnan(v) else f"{v:.2f}" for v in iou]
    rows = [f"{CLASS_NAMES[i]:<14}{cells[i]:>7}" for i in CLASS_SETS[classes]]
    return "\n".join([*rows, f"{mean_name(classes):<14}{mean_iou(confusion, classes):7.2f}"])


def number_or_none(x: float) -> float | None:
    """Return None for NaN, which JSON cannot represent."""
    return None if np.isnan(x) else float(x)
