import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from images import encode, noise, parquet_of

import data
import decoding
import loading
from config import DataConfig
from errors import UserError
from metrics import IGNORED

CPU = torch.device("cpu")


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("streaming", [False, True])
def test_every_validation_row_comes_exactly_once(parquet, streaming, workers):
    config = DataConfig(source=str(parquet), streaming=streaming, workers=workers)
    source = data.load(config)
    batches = list(loading.loader(source, "validation", config, 32))
    labels = sorted(torch.cat([batch["label"] for batch in batches]).tolist())
    assert labels == sorted(row["fine_label"] for row in source.validation)


@pytest.fixture
def corrupted(tmp_path):
    """Thirty rows, of which those with number 7 and 11 are not whole."""
    images = [encode(image) for image in noise(30)]
    images[7]["bytes"] = images[7]["bytes"][:100]
    images[11]["bytes"] = b""
    return parquet_of(tmp_path, images)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("streaming", "where"),
    [
        (False, "the image in row (7|11) of split 'train'"),
        (True, "an (image of 100 bytes|empty image) .*names its row."),
    ],
)
def test_a_corrupt_image_is_told_through_a_worker_too(corrupted, streaming, where):
    config = DataConfig(source=str(corrupted), workers=1, batch_size=2, streaming=streaming)
    source = data.load(config)
    with pytest.raises(
        UserError, match=f"{where} can't be decoded: .*; repair or remove it, or --data.on_corrupt skip"
    ):
        for split in ("train", "validation"):
            list(loading.loader(source, split, config, 2))


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("streaming", [False, True])
def test_corrupt_images_are_skipped_where_that_is_wanted(corrupted, streaming, workers):
    config = DataConfig(
        source=str(corrupted), batch_size=2, on_corrupt="skip", streaming=streaming, workers=workers, folds=2
    )
    source = data.load(config)
    batches = [batch for split in ("train", "validation") for batch in loading.loader(source, split, config, 3)] + list(
        loading.loader(source, "test", config, 30)
    )
    assert all(batch["image"].shape[0] == len(batch["label"]) for batch in batches)
    (test,) = batches[-1:]
    assert [i for i, label in enumerate(test["label"]) if label == IGNORED] == [7, 11]
    assert test["label"].tolist()[:7] == [0, 1, 0, 1, 0, 1, 0]
    assert not test["image"][7].any(), "black, whatever is beside it"
    everything = decoding.Collate("image", "label", 2, (16, 16), None, skip=True)([{"image": None, "label": 1}] * 2)
    assert everything["label"].tolist() == [IGNORED, IGNORED]
    assert not everything["image"].any()


@pytest.mark.parametrize("streaming", [False, True])
def test_training_rows_are_shuffled_and_the_incomplete_batch_is_dropped(parquet, streaming):
    config = DataConfig(source=str(parquet), streaming=streaming, workers=0)
    source = data.load(config)
    rows = [row["fine_label"] for row in source.train]
    loader = loading.loader(source, "train", config, 32)
    seen = torch.cat([batch["label"] for batch in loader]).tolist()
    assert len(seen) == len(rows) // 32 * 32
    assert seen != rows[: len(seen)]


def batches(source, split="train", **values):
    return list(loading.loader(source, split, DataConfig(source="x", workers=0, **values), 8))


@pytest.mark.parametrize("workers", [0, 1])
def test_kept_images_are_the_decoded_ones_in_the_same_order(tmp_path, monkeypatch, workers):
    monkeypatch.setattr(loading, "FEW", 10)
    config = DataConfig(source=str(parquet_of(tmp_path, noise(60))), workers=workers, batch_size=8)
    source = data.load(config)
    kept = loading.keep_decoded(source, config, CPU)
    assert isinstance(kept.train, loading.DecodedImages) and isinstance(kept.validation, loading.DecodedImages)
    assert kept.test is source.test
    assert data.facts(kept) == data.facts(source) and data.describe(kept, config) == data.describe(source, config)
    for split in ("train", "validation"):
        torch.manual_seed(3)
        plain = batches(source, split, batch_size=8)
        torch.manual_seed(3)
        again = batches(kept, split, batch_size=8)
        assert len(plain) == len(again) > 0
        for one, other in zip(plain, again, strict=True):
            assert torch.equal(one["image"], other["image"]) and torch.equal(one["label"], other["label"])


def test_keeping_draws_no_random_numbers(tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "FEW", 10)
    config = DataConfig(source=str(parquet_of(tmp_path, noise(40))), workers=1)
    source, state = data.load(config), torch.get_rng_state()
    loading.keep_decoded(source, config, CPU)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("values", [{"keep_mb": 0}, {"streaming": True}, {"keep_mb": 1, "image_size": 300}])
def test_what_does_not_fit_and_streams_are_left_alone(tmp_path, values):
    images = noise(40, (320, 310) if "image_size" in values else (16, 16))
    config = DataConfig(source=str(parquet_of(tmp_path, images)), workers=0, **values)
    source = data.load(config)
    assert loading.keep_decoded(source, config, CPU) is source
    larger = DataConfig(source=config.source, workers=0, image_size=config.image_size, keep_mb=20)
    assert loading.keep_decoded(data.load(larger), larger, CPU).train.images.shape[2:] == (
        (300, 300) if "image_size" in values else (16, 16)
    )


def test_images_of_several_sizes_are_left_alone_or_told(tmp_path):
    images = noise(30) + noise(30, (20, 16), seed=1)
    config = DataConfig(source=str(parquet_of(tmp_path, images)), workers=0, image_size=32)
    source = data.load(config)
    assert loading.keep_decoded(source, config, CPU) is source
    config = DataConfig(source=config.source, workers=0)
    with pytest.raises(UserError, match="images differ in size"):
        loading.keep_decoded(data.load(config), config, CPU)


def test_a_corrupt_image_is_told_before_training_or_left_out(tmp_path):
    images = [encode(image) for image in noise(40)]
    images[17]["bytes"] = b"no image"
    folder = parquet_of(tmp_path, images)
    config = DataConfig(source=str(folder), workers=0)
    with pytest.raises(UserError, match="row 17 of split 'train' can't be decoded"):
        loading.keep_decoded(data.load(config), config, CPU)
    config = DataConfig(source=str(folder), workers=0, on_corrupt="skip")
    kept = loading.keep_decoded(data.load(config), config, CPU)
    assert sum((split.labels == IGNORED).sum().item() for split in (kept.train, kept.validation)) == 1


@pytest.mark.parametrize("method, most", [("fork", 16), ("spawn", 4)])
def test_there_are_no_more_workers_than_they_are_worth(monkeypatch, method, most):
    """Where they are not forked, each takes seconds to start, and most of a GB."""
    monkeypatch.setattr(loading.multiprocessing, "get_start_method", lambda: method)
    monkeypatch.setattr(loading, "cores_per_process", lambda: 64)
    assert loading.batches(range(1000), DataConfig(), 10).num_workers == most
    assert loading.batches(range(5), DataConfig(), 10).num_workers == 1
    assert loading.batches(range(1000), DataConfig(workers=7), 10).num_workers == 7


def test_a_worker_that_is_not_forked_outlives_signals_from_its_first_imports_on():
    script = """
import runpy, signal, sys

class Stop:
    def find_spec(self, name, *_):
        if name == "torch":
            raise SystemExit(signal.getsignal(signal.SIGINT) is not signal.SIG_IGN)

sys.meta_path.insert(0, Stop())
runpy.run_path("train.py", run_name="__mp_main__")
"""
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT, timeout=60).returncode == 0


def test_workers_end_with_the_command_whatever_ended_it():
    """After an unexpected error Python asks them once to end, and they would live on for two minutes."""
    script = """
import loading
from config import DataConfig

def epoch():
    yield from loading.batches([0, 1, 2, 3], DataConfig(workers=1), 2)

def train():
    steps = epoch()
    for step in steps:
        raise ValueError("odd")

train()
"""
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.stderr.endswith("ValueError: odd\n") and result.returncode == 1
