"""Confusion matrix, IoU and mIoU."""

import numpy as np

from dataset.classes import CLASS_NAMES, CLASS_SETS, NUM_CLASSES


def confusion_matrix(labels: np.ndarray, prediction: np.ndarray) -> np.ndarray:
    """Return counts (C, C) int64, rows ground truth, of trainIds of one shape; label 255 does not count."""
    index = NUM_CLASSES * labels.astype(np.int64) + prediction
    counts = np.bincount(index.ravel(), minlength=NUM_CLASSES**2)
    return counts[: NUM_CLASSES**2].reshape(NUM_CLASSES, NUM_CLASSES)  # the others are of label 255


def class_iou(confusion: np.ndarray) -> np.ndarray:
    """Return TP / (TP + FP + FN) in percent for each class; NaN if it is neither labelled nor predicted."""
    tp = np.diag(confusion).astype(float)
    union = confusion.sum(0) + confusion.sum(1) - tp
    return 100 * np.divide(tp, union, out=np.full(len(tp), np.nan), where=union > 0)


def mean_iou(confusion: np.ndarray, classes: int = NUM_CLASSES) -> float:
    """Return the mean over the classes of a set (CLASS_SETS) that have an IoU, in percent; NaN if none has.

    A class's IoU does not depend on the set: it counts pixels of all classes that are mistaken for it.
    """
    iou = class_iou(confusion)[CLASS_SETS[classes]]
    return float(np.nanmean(iou)) if not np.isnan(iou).all() else float("nan")


def mean_name(classes: int) -> str:
    """Return the name that the mean over a set of so many classes has in tables and files."""
    return "mIoU" if classes == NUM_CLASSES else f"mIoU_{classes}"


def unlabelled_classes(confusion: np.ndarray, classes: int = NUM_CLASSES) -> list[str]:
    """Return the names of the classes of a set (CLASS_SETS) that no pixel is labelled as."""
    return [CLASS_NAMES[i] for i in CLASS_SETS[classes] if not confusion[i].any()]


def summary(confusion: np.ndarray) -> dict:
    """Return the mean over each set of classes and each class's IoU in percent, for JSON: None for NaN.

    Classes without a label are listed, because those that were predicted count in the means as 0.
    """
    return {
        **{mean_name(n): number_or_none(mean_iou(confusion, n)) for n in CLASS_SETS},
        "classes without a label": unlabelled_classes(confusion),
        "IoU": {name: number_or_none(iou) for name, iou in zip(CLASS_NAMES, class_iou(confusion))},
    }


def number_or_none(x: float) -> float | None:
    """Return None for NaN, which JSON cannot represent."""
    return None if np.isnan(x) else float(x)


def percent(x: float | None, digits: int = 2) -> str:
    """Return a number of a `summary` as text, a dash for None."""
    return "–" if x is None else f"{x:.{digits}f}"


def iou_table(result: dict, classes: int = NUM_CLASSES) -> str:
    """Return a `summary` as a table: a line for each class of the set, the mean, classes without a label."""
    names, mean = [CLASS_NAMES[i] for i in CLASS_SETS[classes]], mean_name(classes)
    values = {**{name: result["IoU"][name] for name in names}, mean: result[mean]}
    return "".join(f"{name:<14}{percent(v):>7}\n" for name, v in values.items()) + without_label(result)


def without_label(result: dict) -> str:
    """Return a line with the classes that have no label by a `summary`; nothing if all have."""
    names = ", ".join(result["classes without a label"])
    return f"without a label: {names}\n" if names else ""
