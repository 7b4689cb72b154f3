"""What a stream gives, in which order, and how often it is read for that."""

import itertools
from functools import partial

import datasets
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from images import encode, noise, parquet_of

import data
import loading
import streaming
from config import DataConfig
from decoding import Collate, decode
from errors import UserError

READ = []  # numbers of the rows that were read, in their order


def count(shards):
    for number in itertools.chain(*shards):
        READ.append(number)
        yield {"image": {"bytes": b"%d" % number, "path": None}, "label": number % 10}


def stream_of(rows=2000, shards=1, seed=0, folds=5, **values):
    READ.clear()
    parts = [range(rows)[shard::shards] for shard in range(shards)]
    dataset = datasets.IterableDataset.from_generator(count, gen_kwargs={"shards": parts})
    config = DataConfig(source="x", **({"shuffle_buffer": 50} | values))
    return streaming.TrainingStream(
        dataset, "image", "label", 10, partial(data.is_validation, folds=folds, fold=0), config, seed
    )


def numbers(part, epoch=0) -> list[int]:
    part.set_epoch(epoch)
    return [int(row["image"]["bytes"]) for row in part]


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("keep_mb", [2048, 0])
def test_every_row_comes_once_an_epoch_on_its_side(shards, keep_mb):
    stream = stream_of(shards=shards, keep_mb=keep_mb)
    held_out = [n for n in range(2000) if data.is_validation(b"%d" % n, folds=5, fold=0)]
    orders = []
    for epoch in range(3):
        orders.append(numbers(stream.training, epoch))
        assert sorted(orders[-1]) == sorted(set(range(2000)) - set(held_out))
        assert sorted(numbers(stream.validation, epoch)) == held_out
    assert len(set(map(tuple, orders))) == 3, "another order in each epoch"


@pytest.mark.parametrize(
    "shuffle_buffer, classes, label, said",
    [
        (50, 20, lambda n: n // 1000, "2 of 20"),
        (20_000, 20, lambda n: n // 1000, None),
        (50, 20, lambda n: n % 20, None),
        (50, 2, lambda n: n // 10_000, "1 of 2"),
        (50, 2, lambda n: n % 2, None),
    ],
)
def test_rows_that_are_sorted_by_class_are_told(capsys, shuffle_buffer, classes, label, said):
    stream = stream_of(20_000, shuffle_buffer=shuffle_buffer)
    stream.classes = classes
    read = stream.shuffled.rows
    read.rows = read.rows.map(lambda row: row | {"label": label(int(row["image"]["bytes"]))})
    for epoch in range(2):
        numbers(stream.training, epoch)
    out = capsys.readouterr().out
    assert out.count("files seem to be sorted by class") == (said is not None)
    assert said is None or f"training rows are of {said} classes" in out


@pytest.mark.parametrize("images", ["bytes", "files"])
def test_the_shuffle_buffer_is_bounded_in_bytes_too(monkeypatch, images):
    monkeypatch.setattr(streaming, "MB", 1)
    monkeypatch.setattr(streaming, "BUFFER_MB", 500)

    def rows():
        for number in range(400):
            READ.append(number)
            content = b"%10d" % number if images == "bytes" else None
            yield {"image": {"bytes": content, "path": str(number)}, "label": 0}

    READ.clear()
    shuffled = streaming.Shuffled(datasets.IterableDataset.from_generator(rows), "image", most=100, seed=0)
    ahead = [len(READ) - given for given, _ in enumerate(shuffled)]
    assert max(ahead) <= (50 if images == "bytes" else 100) + 1 + streaming.PIECE
    assert len(ahead) == 400


def test_what_was_read_once_is_kept_and_shuffled_fully():
    stream = stream_of()
    first, second = numbers(stream.training), numbers(stream.training, 1)
    numbers(stream.validation, 1)
    assert len(READ) == 2000
    moved = [max(abs(place - number * 0.8) for place, number in enumerate(order)) for order in (first, second)]
    assert moved[0] < 500 < moved[1], "within a buffer of 50 rows, and then from one end to the other"
    assert len(stream.training) == len(first)


def test_what_is_too_large_is_read_again_each_epoch_and_the_log_says_so(capsys):
    stream = stream_of(keep_mb=0)
    for epoch in range(2):
        numbers(stream.training, epoch)
    assert len(READ) == 4000
    assert capsys.readouterr().out.count("not kept (data.keep_mb 0), so each epoch reads it again") == 1
    assert not stream.kept
    with pytest.raises(TypeError):
        len(stream.training)


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("keep_mb", [2048, 0])
def test_a_resumed_run_has_the_order_of_the_uninterrupted_one(keep_mb, shards):
    stream = stream_of(keep_mb=keep_mb, shards=shards)
    orders = [numbers(stream.training, epoch) for epoch in range(3)]
    assert numbers(stream_of(keep_mb=keep_mb, shards=shards).training, 2) == orders[2]
    assert numbers(stream_of(keep_mb=keep_mb, shards=shards, seed=1).training, 2) != orders[2]


def test_what_is_kept_is_decoded_as_far_as_it_fits(monkeypatch, capsys):
    coarse = [image.point(lambda level: level // 64 * 64) for image in noise(200, (32, 32))]  # a third as large encoded
    contents = [encode(image)["bytes"] for image in coarse] + [b"no image"]
    sizes = sum(map(len, contents))
    pixels = 3 * 32 * 32
    folds = {"folds": 4, "fold": 0}
    held_out = partial(data.is_validation, **folds)
    for room, decoded in ((0, range(1)), (50 * pixels, range(50, 199)), (200 * pixels, range(200, 201))):
        rows = datasets.IterableDataset.from_generator(
            lambda: ({"image": {"bytes": content, "path": None}, "label": 1} for content in contents)
        )
        monkeypatch.setattr(streaming, "MB", 1)  # keep_mb in bytes
        config = DataConfig(source="x", keep_mb=sizes + room, **folds)
        stream = streaming.TrainingStream(rows, "image", "label", 10, held_out, config, seed=0)
        first = [row["image"]["bytes"] for row in stream.training]
        stream.training.set_epoch(1)
        later = [row["image"] for row in stream.training]
        kept = [row["image"] for part in stream.kept.values() for row in part]
        arrays = [image for image in kept if isinstance(image, np.ndarray)]
        assert len(arrays) in decoded
        assert f"kept in memory, {len(arrays)} of them decoded" in capsys.readouterr().out
        assert sum(len(image["bytes"]) if isinstance(image, dict) else image.nbytes for image in kept) <= sizes + room
        assert len(later) == len(first)
    expected = {np.asarray(decode({"bytes": content})).tobytes() for content in first if content != b"no image"}
    assert {image.tobytes() for image in later if isinstance(image, np.ndarray)} == expected
    collate = Collate("image", "label", 10, (32, 32), None)
    encoded = [{"image": {"bytes": content, "path": None}, "label": 1} for content in contents[:3]]
    pixels = [row | {"image": np.asarray(decode(row["image"]))} for row in encoded]
    assert collate(encoded)["image"].equal(collate(pixels)["image"])


def test_what_the_dataset_says_of_its_rows_is_about_an_epochs_length():
    assert stream_of().expected is None
    said = datasets.SplitInfo("train", num_examples=2000)
    rows = datasets.IterableDataset.from_generator(count, gen_kwargs={"shards": [range(2000)]}, split="train")
    rows.info.splits = datasets.SplitDict({"train": said})
    for folds, number, expected in ((5, 2000, 1600), (None, 2000, 2000), (5, 0, None)):
        said.num_examples = number
        config = DataConfig(source="x", folds=folds)
        stream = streaming.TrainingStream(
            rows, "image", "label", 10, partial(data.is_validation, folds=folds, fold=0), config, 0
        )
        assert stream.expected == expected
        if folds and expected:
            assert len(numbers(stream.training)) == pytest.approx(expected, rel=0.05)


def test_too_few_rows_are_told_at_their_end():
    with pytest.raises(UserError, match=r"x: \d\d training rows are fewer than data.batch_size 64"):
        numbers(stream_of(rows=50).training)
    with pytest.raises(UserError, match=r"x: 0 validation rows \(data.folds, data.fold\) for 1 process"):
        numbers(stream_of(rows=3, folds=2**30).validation)


def test_training_begins_before_the_split_has_arrived():
    first = next(iter(stream_of(rows=20_000).training))
    assert int(first["image"]["bytes"]) < 100
    assert len(READ) < 2000


def test_the_first_rows_are_looked_at_without_reading_them_twice():
    stream = stream_of()
    looked_at = [row["image"]["bytes"] for row in itertools.islice(stream.shuffled.look(), 9)]
    order = numbers(stream.training)
    assert sorted(READ) == list(range(2000))
    trained_on = [int(content) for content in looked_at if not data.is_validation(content, folds=5, fold=0)]
    assert trained_on == order[: len(trained_on)]


def test_a_pass_that_was_broken_off_is_not_taken_for_a_whole_one():
    stream = stream_of()
    next(iter(stream.training))
    assert not stream.whole
    assert len(set(numbers(stream.training))) == len(numbers(stream.training, 1)) > 1500


def fails_at_100():
    for number in range(200):
        if number == 100:
            raise OSError("the line is cut")
        yield {"image": {"bytes": b"%d" % number, "path": None}, "label": 0}


def test_an_error_is_told_where_its_rows_would_have_come():
    stream = streaming.Stream(datasets.IterableDataset.from_generator(fails_at_100), "image", "somewhere")
    seen = []
    with pytest.raises(UserError, match=r"data\.source: somewhere can't be read any further: the line is cut"):
        for row in stream:
            seen.append(row["image"]["bytes"])
    assert len(seen) == 64 and seen[-1] == b"63"  # the chunk before it


def test_a_split_with_fewer_rows_than_processes_is_an_error(monkeypatch):
    stream = stream_of(rows=2).in_order
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert len(list(stream)) == 2
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(UserError, match=r"data\.source: x: 2 rows are too few for 4 process"):
        list(stream)


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_decode_what_the_stream_gives_and_change_nothing(tmp_path, workers):
    """Two shards and two workers drop one incomplete batch, not one each."""
    images = [encode(image) for image in noise(90)]
    (tmp_path / "0").mkdir(), (tmp_path / "1").mkdir()
    parquet_of(tmp_path / "0", images[:45]), parquet_of(tmp_path / "1", images[45:])
    config = DataConfig(source=f"{tmp_path}/*/*.parquet", streaming=True, workers=workers, folds=3, batch_size=8)
    source = data.load(config)
    validation = loading.loader(source, "validation", config, 8)
    training = loading.loader(source, "train", config, 8)
    batches = [list(training) for _ in range(2)]
    rows = len(source.train)
    assert [len(epoch) for epoch in batches] == [rows // 8] * 2
    pixels = {image.sum().item() for epoch in batches for batch in epoch for image in batch["image"]}
    held_out = torch.cat([batch["image"].sum((1, 2, 3)) for batch in validation])
    assert len(held_out) + rows == 90
    assert pixels.isdisjoint(held_out.tolist())


def test_what_is_kept_as_pixels_needs_no_workers(tmp_path):
    """And its batches are what they would have been with one, though the first epoch has its."""
    accelerator, epochs = Accelerator(cpu=True), {}
    accelerator.dataloader_config.dispatch_batches = True
    for spared in (False, True):
        config = DataConfig(
            source=str(parquet_of(tmp_path, noise(90))), streaming=True, workers=1, folds=3, batch_size=8
        )
        source = data.load(config)
        loaders = accelerator.prepare(
            loading.loader(source, "train", config, 8), loading.loader(source, "validation", config, 8)
        )
        epochs[spared] = []
        for epoch in range(2):
            loaders[0].set_epoch(epoch)
            if spared:
                loading.stop_idle_workers(source, *loaders, None)
            assert loaders[0].base_dataloader.num_workers == (0 if spared and epoch else 1)
            epochs[spared].append(torch.cat([batch["image"] for loader in loaders for batch in loader]))
    assert all(map(torch.equal, *epochs.values()))
    assert not epochs[True][0].equal(epochs[True][1])


def test_workers_stay_where_what_is_kept_has_to_be_made_smaller(tmp_path):
    source = str(parquet_of(tmp_path, noise(90, (32, 32))))
    config = DataConfig(source=source, streaming=True, workers=1, folds=3, batch_size=8, image_size=16)
    source = data.load(config)
    loader = Accelerator(cpu=True).prepare(loading.loader(source, "train", config, 8))
    assert list(loader) and source.train.stream.decoded
    loading.stop_idle_workers(source, loader)
    assert loader.base_dataloader.num_workers == 1


def test_the_first_rows_alone(tmp_path):
    config = DataConfig(source=str(parquet_of(tmp_path, noise(30))), streaming=True, workers=0)
    source = data.load(config)
    alone = [row["image"] for row in streaming.First(source.test, 7)]
    assert alone == [row["image"] for row in source.test][:7]


@pytest.mark.parametrize(("mb", "most"), [(0.001, 9 * 64), (4, 9 * 4), (40, 9)])
def test_few_large_images_are_read_in_advance(mb, most):
    image, read = {"bytes": bytes(int(mb * streaming.MB)), "path": None}, []

    def rows():
        for row in range(1000):
            read.append(row)
            yield {"image": image, "label": row}

    stream = iter(streaming.Stream(rows(), "image", "here"))
    assert [next(stream)["label"] for _ in range(3)] == [0, 1, 2]
    stream.close()  # waits for what is being read
    assert 3 <= len(read) <= most + 3
    assert [row["label"] for row in streaming.Stream(rows(), "image", "here")] == list(range(1000))
