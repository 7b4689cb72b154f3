"""Analysis of predictions: accuracy by class and superclass, calibration, and which classes are confused."""

from itertools import pairwise

import numpy as np

BINS = 15  # of confidence, as in Guo et al. (2017), "On Calibration of Modern Neural Networks"
PAIRS = 20  # of confused classes to report
MOST = 1000  # classes of a confusion matrix; as text a larger one takes many MB, and as a figure it is a blur


def analyse(
    labels: np.ndarray,
    predicted: np.ndarray,
    confidence: np.ndarray,
    class_names: list[str],
    superclasses: dict[str, str] | None,
) -> dict:
    """All figures of a split that are not plain means over its rows, as values for JSON.

    Args:
        labels, predicted: (N,) classes.
        confidence: (N,) probability of the predicted class.
        superclasses: each class's superclass, by name; None without any.

    Returns:
        `ece` (expected calibration error: the mean gap between a bin's accuracy and confidence, weighted by its rows),
        `reliability` (its bins), `confusion` (rows are true classes, columns predicted ones; empty beyond `MOST`
        classes), `per_class`, `confused` (pairs, most frequent first) and `superclasses` (or None). Accuracies are
        fractions; None where there are no rows.
    """
    hits = labels == predicted
    confusion = np.zeros((len(class_names), len(class_names)), dtype=int)
    np.add.at(confusion, (labels, predicted), 1)
    bins = _reliability(hits, confidence)
    gaps = (each["rows"] * abs(each["accuracy"] - each["confidence"]) for each in bins if each["rows"])
    return {
        "ece": sum(gaps) / len(labels),
        "reliability": bins,
        "class_names": list(class_names),
        "confusion": confusion.tolist() if len(class_names) <= MOST else [],
        "per_class": [
            {"name": name, "rows": int(row.sum()), "top1": _share(row[index], row.sum())}
            for index, (name, row) in enumerate(zip(class_names, confusion, strict=True))
        ],
        "confused": _confused(confusion, class_names),
        "superclasses": _by_superclass(confusion, class_names, superclasses) if superclasses else None,
    }


def _reliability(hits: np.ndarray, confidence: np.ndarray) -> list[dict]:
    """Rows, mean confidence and accuracy per equal-width bin of confidence; bins include their upper edge."""
    edges = np.linspace(0, 1, BINS + 1)
    place = np.clip(np.digitize(confidence, edges, right=True) - 1, 0, BINS - 1)
    bins = []
    for index, (low, high) in enumerate(pairwise(edges)):
        inside = place == index
        rows = int(inside.sum())
        means = {"confidence": _share(confidence[inside].sum(), rows), "accuracy": _share(hits[inside].sum(), rows)}
        bins.append({"low": float(low), "high": float(high), "rows": rows} | means)
    return bins


def _confused(confusion: np.ndarray, class_names: list[str]) -> list[dict]:
    mistakes = confusion * (1 - np.eye(len(confusion), dtype=int))
    order = np.argsort(-mistakes, axis=None, kind="stable")[:PAIRS]
    pairs = zip(*np.unravel_index(order, mistakes.shape), strict=True)
    return [
        {
            "true": class_names[true],
            "predicted": class_names[predicted],
            "rows": int(mistakes[true, predicted]),
            "share": _share(mistakes[true, predicted], confusion[true].sum()),
        }
        for true, predicted in pairs
        if mistakes[true, predicted]
    ]


def _by_superclass(confusion: np.ndarray, class_names: list[str], superclasses: dict[str, str]) -> dict:
    """By superclass: how often the exact class was predicted, and how often any class of the superclass."""
    groups = np.array([superclasses.get(name, "") for name in class_names])
    each, inside_all = [], 0
    for name in sorted(set(superclasses.values())):
        members = groups == name
        rows, inside = confusion[members].sum(), confusion[np.ix_(members, members)].sum()
        right = np.diag(confusion)[members].sum()
        each.append(
            {"name": name, "rows": int(rows), "top1": _share(right, rows), "superclass_top1": _share(inside, rows)}
        )
        inside_all += inside
    return {"top1": _share(inside_all, sum(one["rows"] for one in each)), "per_superclass": each}


def _share(part, whole) -> float | None:
    return float(part / whole) if whole else None
