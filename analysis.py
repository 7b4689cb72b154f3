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
    hits, count = labels == predicted, len(class_names)
    rows, right = (np.bincount(these, minlength=count) for these in (labels, labels[hits]))
    bins = _reliability(hits, confidence)
    gaps = (each["rows"] * abs(each["accuracy"] - each["confidence"]) for each in bins if each["rows"])
    return {
        "ece": sum(gaps) / len(labels),
        "reliability": bins,
        "class_names": list(class_names),
        "confusion": _confusion(labels, predicted, count).tolist() if count <= MOST else [],
        "per_class": [
            {"name": name, "rows": int(of_class), "top1": _share(hit, of_class)}
            for name, of_class, hit in zip(class_names, rows, right, strict=True)
        ],
        "confused": _confused(labels, predicted, rows, class_names),
        "superclasses": _by_superclass(labels, predicted, class_names, superclasses) if superclasses else None,
    }


def _confusion(labels: np.ndarray, predicted: np.ndarray, count: int) -> np.ndarray:
    return np.bincount(labels * count + predicted, minlength=count**2).reshape(count, count)


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


def _confused(labels: np.ndarray, predicted: np.ndarray, rows: np.ndarray, class_names: list[str]) -> list[dict]:
    """Pairs are counted, not looked up in a matrix: of ten thousand classes it would take a gigabyte."""
    wrong, count = labels != predicted, len(class_names)
    pairs, times = np.unique(labels[wrong] * count + predicted[wrong], return_counts=True)
    order = np.argsort(-times, kind="stable")[:PAIRS]
    return [
        {
            "true": class_names[pair // count],
            "predicted": class_names[pair % count],
            "rows": int(often),
            "share": _share(often, rows[pair // count]),
        }
        for pair, often in zip(pairs[order], times[order], strict=True)
    ]


def _by_superclass(
    labels: np.ndarray, predicted: np.ndarray, class_names: list[str], superclasses: dict[str, str]
) -> dict:
    """By superclass: how often the exact class was predicted, and how often any class of the superclass."""
    groups = np.array([superclasses.get(name, "") for name in class_names])
    true_group, predicted_group = groups[labels], groups[predicted]
    each, inside_all = [], 0
    for name in sorted(set(superclasses.values())):
        members = true_group == name
        rows, inside = members.sum(), (predicted_group[members] == name).sum()
        right = (labels[members] == predicted[members]).sum()
        each.append(
            {"name": name, "rows": int(rows), "top1": _share(right, rows), "superclass_top1": _share(inside, rows)}
        )
        inside_all += inside
    return {"top1": _share(inside_all, sum(one["rows"] for one in each)), "per_superclass": each}


def _share(part, whole) -> float | None:
    return float(part / whole) if whole else None
