import tracemalloc

import numpy as np
import pytest
import torch
from torchmetrics.functional.classification import multiclass_calibration_error, multiclass_confusion_matrix

from analysis import analyse

NAMES = ["oak", "elm", "cat", "dog"]
ABOVE = {"oak": "tree", "elm": "tree", "cat": "animal", "dog": "animal"}


@pytest.fixture
def predictions():
    """500 rows of 4 classes as (labels, predicted, confidence), and their probabilities."""
    generator = torch.Generator().manual_seed(0)
    probabilities = (2 * torch.randn(500, 4, generator=generator)).softmax(1)
    labels = torch.randint(0, 4, (500,), generator=generator)
    labels[::2] = probabilities.argmax(1)[::2]
    confidence, predicted = probabilities.max(1)
    return (labels.numpy(), predicted.numpy(), confidence.numpy()), probabilities


def test_of_very_many_classes_there_is_no_matrix():
    labels = np.array([5, 1000, 1000])
    found = analyse(labels, np.array([5, 1000, 7]), np.full(3, 0.5), [str(i) for i in range(1001)], None)
    assert found["confusion"] == [] and found["per_class"][1000]["top1"] == 0.5
    assert [(it["true"], it["predicted"]) for it in found["confused"]] == [("1000", "7")]


def test_very_many_classes_take_no_room_for_their_pairs():
    labels, count = np.array([5, 99_999, 99_999]), 100_000
    tracemalloc.start()
    found = analyse(labels, np.array([5, 7, 7]), np.full(3, 0.5), [str(i) for i in range(count)], None)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert found["confused"] == [{"true": "99999", "predicted": "7", "rows": 2, "share": 1.0}]
    assert peak < 100 * 2**20, "a matrix of them would take 80 GB"


def test_calibration_and_confusion_are_the_librarys(predictions):
    rows, probabilities = predictions
    found, labels = analyse(*rows, NAMES, None), torch.from_numpy(rows[0])
    expected = multiclass_calibration_error(probabilities, labels, num_classes=4, n_bins=15, norm="l1")
    assert found["ece"] == pytest.approx(expected.item(), rel=1e-4)
    assert found["confusion"] == multiclass_confusion_matrix(torch.from_numpy(rows[1]), labels, 4).tolist()
    assert sum(each["rows"] for each in found["reliability"]) == 500
    assert len(found["reliability"]) == 15
    assert found["superclasses"] is None


def test_edges_of_confidence():
    """0 and 1 have their bins, and a bin's upper edge is its own."""
    ones = np.array([0, 0, 0])
    found = analyse(ones, ones, np.array([0.0, 1 / 15, 1.0]), NAMES, None)["reliability"]
    assert [each["rows"] for each in found] == [2] + [0] * 13 + [1]
    assert found[1]["accuracy"] is None


def test_accuracy_by_class_and_superclass():
    labels = np.array([0, 0, 0, 0, 1, 2, 2])
    predicted = np.array([0, 1, 1, 2, 1, 3, 2])
    found = analyse(labels, predicted, np.full(7, 0.5), NAMES, ABOVE)
    assert found["per_class"] == [
        {"name": "oak", "rows": 4, "top1": 0.25},
        {"name": "elm", "rows": 1, "top1": 1.0},
        {"name": "cat", "rows": 2, "top1": 0.5},
        {"name": "dog", "rows": 0, "top1": None},
    ]
    assert found["superclasses"] == {
        "top1": pytest.approx(6 / 7),
        "per_superclass": [
            {"name": "animal", "rows": 2, "top1": 0.5, "superclass_top1": 1.0},
            {"name": "tree", "rows": 5, "top1": pytest.approx(0.4), "superclass_top1": pytest.approx(0.8)},
        ],
    }
    assert found["confused"] == [
        {"true": "oak", "predicted": "elm", "rows": 2, "share": 0.5},
        {"true": "oak", "predicted": "cat", "rows": 1, "share": 0.25},
        {"true": "cat", "predicted": "dog", "rows": 1, "share": 0.5},
    ]


def test_no_mistakes_no_pairs():
    ones = np.array([1, 1])
    assert analyse(ones, ones, np.array([1.0, 1.0]), NAMES, None)["confused"] == []
