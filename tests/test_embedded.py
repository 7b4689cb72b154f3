import io
from collections import Counter

import numpy as np
from PIL import Image

import embedded


def test_it_is_the_same_every_time_and_for_every_number_of_rows():
    first = list(embedded.rows("train", 0, 400))
    assert first == list(embedded.rows("train", 0, 400))
    assert first[200:] == list(embedded.rows("train", 200, 400))


def test_it_has_cifar_100s_columns_and_classes():
    rows = list(embedded.rows("train", 0, 400))
    assert list(rows[0]) == ["img", "fine_label", "coarse_label"]
    assert len(embedded.FINE_NAMES) == len(set(embedded.FINE_NAMES)) == 100
    assert len(embedded.COARSE_NAMES) == len(set(embedded.COARSE_NAMES)) == 20
    assert set(Counter(row["fine_label"] for row in rows).values()) == {4}
    for row in rows:
        fine, coarse = embedded.FINE_NAMES[row["fine_label"]], embedded.COARSE_NAMES[row["coarse_label"]]
        assert fine.endswith(coarse)
    image = Image.open(io.BytesIO(rows[0]["img"]["bytes"]))
    assert (image.size, image.mode, image.format) == ((32, 32), "RGB", "PNG")


def test_no_two_images_are_alike_within_or_across_splits():
    images = [row["img"]["bytes"] for split in ("train", "test") for row in embedded.rows(split, 0, 600)]
    assert len(set(images)) == len(images)


def test_colour_alone_does_not_tell_the_class():
    """Mean colours of the classes' images differ by no more than chance: the model has to look at shapes."""
    by_class = {}
    for row in embedded.rows("train", 0, 4000):
        pixels = np.asarray(Image.open(io.BytesIO(row["img"]["bytes"])), dtype=float)
        by_class.setdefault(row["coarse_label"], []).append(pixels.mean((0, 1)))
    means = np.array([np.mean(colours, axis=0) for colours in by_class.values()])
    spread_of_images = np.std(np.concatenate(list(by_class.values())), axis=0)
    assert (means.std(axis=0) < 3 * spread_of_images / np.sqrt(200)).all()
