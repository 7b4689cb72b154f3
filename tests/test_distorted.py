import os

import numpy as np
import pytest
import torch

import corruptions
import data
import distorted
from config import DataConfig
from errors import UserError

ROWS = 4  # of each severity, instead of 10,000


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The course's and CIFAR-100-C's files, small. An image's values tell file, severity and row."""
    monkeypatch.setattr(distorted, "SEVERITY_ROWS", ROWS)
    monkeypatch.setattr(distorted, "SHAPE", (5 * ROWS, 8, 8, 3))
    for names in (distorted.COURSE, corruptions.NAMES):
        for number, name in enumerate(names):
            images = np.zeros(distorted.SHAPE, dtype=np.uint8)
            images += (10 * number + np.arange(5 * ROWS) // ROWS)[:, None, None, None].astype(np.uint8)
            images[:, 0, 0, 2] = np.arange(5 * ROWS) % ROWS
            np.save(tmp_path / f"{name}.npy", images)
    np.save(tmp_path / "labels.npy", np.tile(30 * np.arange(ROWS), 5))
    return tmp_path


def test_the_courses_rows_in_their_order(folder):
    files = distorted.course(folder)
    assert len(files) == 19 * 5 * ROWS
    batch = files.__getitems__([0, 5 * ROWS - 1, 5 * ROWS, len(files) - 1])
    assert batch["image"].shape == (4, 3, 8, 8)
    assert batch["image"][:, 0, 1, 1].tolist() == [0, 4, 10, 184]
    assert batch["image"][:, 2, 0, 0].tolist() == [0, 3, 0, 3]
    assert [distorted.course_id(place) for place in (0, 5 * ROWS - 1, 5 * ROWS, len(files) - 1)] == [
        "distortion00_1_0", "distortion00_5_3", "distortion01_1_0", "distortion18_5_3"]  # fmt: skip


def test_ids_of_the_real_size():
    assert distorted.course_id(0) == "distortion00_1_0"
    assert distorted.course_id(49_999) == "distortion00_5_9999"
    assert distorted.course_id(949_999) == "distortion18_5_9999"


@pytest.mark.parametrize("limit", [None, 3, 100])
def test_cifar100c_is_in_the_order_of_the_table(folder, limit):
    files, rows = distorted.cifar100c(folder, limit), min(limit or ROWS, ROWS)
    assert len(files) == distorted.CELLS * rows
    batch = files.__getitems__(list(range(len(files))))
    assert batch["label"].tolist() == [30 * row for row in range(rows)] * distorted.CELLS
    cells = batch["image"][:, 0, 1, 1].view(19, 5, rows)
    assert (cells == cells[:, :, :1]).all()
    assert cells[3].unique().tolist() == [30, 31, 32, 33, 34]


def header(text: str) -> bytes:
    """An .npy file of version 1 that has this text for a header, and nothing behind it."""
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()


def archive(path) -> None:
    with path.open("wb") as file:
        np.savez(file, np.zeros(20))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda path: path.unlink(), "is missing"),
        (lambda path: np.save(path, np.zeros((5, 8, 8, 3), np.uint8)), "has uint8 of shape (5, 8, 8, 3)"),
        (lambda path: np.save(path, np.zeros((20, 8, 8, 3))), "has float64 of shape (20, 8, 8, 3)"),
        (lambda path: path.write_bytes(b"no array"), "can't be read"),
        (lambda path: path.write_bytes(path.read_bytes()[:-9]), "can't be read"),
        (lambda path: np.save(path, np.array([{}] * 20), allow_pickle=True), "can't be read"),
        (archive, "can't be read"),
        (lambda path: path.write_bytes(b"PK\x03\x04 no archive"), "can't be read"),
        (lambda path: path.write_bytes(header("((((")), "can't be read"),
        (
            lambda path: path.write_bytes(
                header(f"{{'descr': '|u1', 'fortran_order': False, 'shape': ({9 * 10**30},)}}")
            ),
            "can't be read",
        ),
    ],
)
def test_each_file_is_looked_at_first(folder, damage, said):
    for names, opened in ((distorted.COURSE, distorted.course), (corruptions.NAMES, distorted.cifar100c)):
        path = folder / f"{names[7]}.npy"
        damage(path)
        with pytest.raises(UserError) as caught:
            opened(folder)
        assert f"{path.name} {said}" in str(caught.value)
        assert caught.value.exit_code == 2


def test_labels_are_looked_at(folder):
    np.save(folder / "labels.npy", np.full(5 * ROWS, 100))
    with pytest.raises(UserError, match="labels from 100 to 100; they must be 0 to 99"):
        distorted.cifar100c(folder)
    np.save(folder / "labels.npy", np.tile(np.arange(ROWS), 5))
    with pytest.raises(UserError, match="no label above 3: this is CIFAR-10-C"):
        distorted.cifar100c(folder)
    np.save(folder / "labels.npy", np.zeros(7, dtype=int))
    with pytest.raises(UserError, match=r"labels.npy has int64 of shape \(7,\); it must be 20 whole numbers"):
        distorted.cifar100c(folder)
    (folder / "labels.npy").write_bytes(header("{'descr': '<i8', 'fortran_order': False, 'shape': (1000000000000,)}"))
    with pytest.raises(UserError, match=r"labels.npy can't be read"):
        distorted.cifar100c(folder)
    (folder / "labels.npy").unlink()
    with pytest.raises(UserError, match=r"labels.npy is missing"):
        distorted.cifar100c(folder)
    with pytest.raises(UserError, match="there is no folder"):
        distorted.course(folder / "nowhere")


def test_labels_are_cifar_100s_classes_or_numbers():
    names = list(distorted.CIFAR100)
    assert len(set(names)) == 100 and names == sorted(names)
    assert distorted.known_classes(names[::-1], "--ood") == names
    of_the_hub = ["cra" if name == "crab" else name for name in names]  # as uoft-cs/cifar100 spells it
    assert distorted.known_classes(of_the_hub[::-1], "--ood") == of_the_hub
    numbers = [str(number) for number in range(100)]
    assert distorted.known_classes(numbers, "--ood") == numbers
    for others in (names[:99], [*names[:99], "unicorn"], ["yes", "no"]):
        with pytest.raises(UserError, match="--ood: its images show CIFAR-100's classes"):
            distorted.known_classes(others, "--ood")


@pytest.mark.real_data
def test_the_classes_are_those_of_the_real_data():
    folder = os.environ.get("CIFAR100")
    if not folder:
        pytest.skip("set CIFAR100 to a folder with CIFAR-100's train-*.parquet and test-*.parquet")
    assert data.load(DataConfig(source=folder)).class_names == list(distorted.CIFAR100)


def test_what_happens_to_an_image_does_not_depend_on_its_batch():
    images = torch.randint(0, 256, (3, 16, 16, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    rows = distorted.Corrupted(images, np.arange(3), seed=1)
    together = rows.__getitems__(list(range(len(rows))))
    alone = rows.__getitems__([200])
    assert (together["image"][200] == alone["image"][0]).all()
    assert together["label"].tolist() == [0, 1, 2] * distorted.CELLS
    other = distorted.Corrupted(images, np.arange(3), seed=2).__getitems__([0])
    assert (other["image"][0] != together["image"][0]).any()
    fewer = distorted.Corrupted(images[:2], np.arange(2), seed=1).__getitems__([2])  # gaussian_noise, severity 2, row 0
    assert (fewer["image"][0] == together["image"][3]).all()


def test_the_table_has_the_means():
    hits = np.zeros((19, 5, 2), dtype=bool)
    hits[0] = True  # one of the 15
    hits[18, 0, 0] = True  # one of the others
    found = distorted.table(hits.ravel())
    assert found["mean15"] == pytest.approx(1 / 15)
    assert found["mean19"] == pytest.approx((1 + 0.1) / 19)
    assert [one["in_mean15"] for one in found["corruptions"]] == [True] * 15 + [False] * 4
    assert found["corruptions"][18] == {
        "name": corruptions.NAMES[18], "in_mean15": False, "top1": [0.5, 0, 0, 0, 0], "mean": 0.1}  # fmt: skip
