import io
import os
import struct
import zlib

import datasets
import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image, Value
from PIL import ExifTags
from PIL import Image as PILImage

import data
import decoding
from config import DataConfig
from errors import UserError
from metrics import IGNORED


def load(source, **values):
    return data.load(DataConfig(source=str(source), **({"workers": 0} | values)))


def encode(image: PILImage.Image, format="PNG") -> dict:
    buffer = io.BytesIO()
    image.save(buffer, format)
    return {"bytes": buffer.getvalue(), "path": None}


def parquet_of(folder, images, labels=None, features=None, **columns):
    labels = labels if labels is not None else [i % 2 for i in range(len(images))]
    features = features or Features(image=Image(), label=ClassLabel(names=["a", "b"]))
    rows = Dataset.from_dict({"image": images, "label": labels} | columns, features=features)
    for split in ("train", "test"):
        rows.to_parquet(folder / f"{split}.parquet")
    return folder


def noise(count, size=(16, 16), seed=0):
    rng = np.random.default_rng(seed)
    return [PILImage.fromarray(rng.integers(0, 256, (*size[::-1], 3), dtype=np.uint8)) for _ in range(count)]


def encoded(dataset, column):
    return sorted(row[column]["bytes"] for row in dataset)


# ---- sources and columns ----------------------------------------------------------------------------------------


def test_embedded_has_two_labels_and_the_finer_one_is_taken():
    source = load("embedded", embedded_rows=200)
    assert (source.image, source.label, len(source.class_names), source.size) == ("img", "fine_label", 100, (32, 32))
    assert len(load("embedded", embedded_rows=200, label="coarse_label").class_names) == 20
    assert len(source.train) + len(source.validation) == 200
    assert len(source.test) == 40


def test_a_folder_and_a_glob_of_parquet_are_the_same(parquet):
    folder, pattern = load(parquet), load(f"{parquet}/*.parquet")
    assert encoded(folder.train, "img") == encoded(pattern.train, "img")
    assert len(folder.train) + len(folder.validation) == 400
    assert len(folder.test) == 80


@pytest.mark.parametrize("streaming", [False, True])
def test_a_folder_of_images_one_subfolder_a_class(tmp_path, streaming):
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            (tmp_path / split / name).mkdir(parents=True)
            for i, image in enumerate(noise(12, seed=hash((split, name)) % 1000)):
                image.save(tmp_path / split / name / f"{i}.png")
    config = DataConfig(source=str(tmp_path), streaming=streaming, workers=0)
    source = data.load(config)
    assert source.class_names == ["cat", "dog"]
    batch = next(iter(data.loader(source, "test", config, 24, seed=0)))
    assert batch["image"].shape == (24, 3, 16, 16)
    assert batch["label"].sum() == 12


def test_class_folders_alone_have_no_test_split_and_say_the_way_on(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        for i, image in enumerate(noise(12, seed=len(name) + ord(name[0]))):
            image.save(tmp_path / name / f"{i}.png")
    with pytest.raises(UserError, match="has no split 'test'; it has train: name one of them, or null"):
        load(tmp_path)
    source = load(tmp_path, test_split=None)
    assert source.test is None
    assert len(source.train) + len(source.validation) == 24


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"image": "picture"}, "data.image: there is no column 'picture'; .* has img, fine_label, coarse_label"),
        ({"label": "kind"}, "data.label: there is no column 'kind'"),
        ({"train_split": "training"}, "data.train_split: .* has no split 'training'; it has test, train"),
        ({"label": "img"}, "data.label: column 'img' .* holds images, not classes"),
    ],
)
def test_columns_and_splits_that_are_not_there(parquet, values, message):
    with pytest.raises(UserError, match=message) as caught:
        load(parquet, **values)
    assert caught.value.exit_code == 2


def test_several_or_no_image_columns_must_be_named(tmp_path):
    (tmp_path / "two").mkdir(), (tmp_path / "none").mkdir()
    images = [encode(image) for image in noise(10)]
    features = Features(image=Image(), label=ClassLabel(names=["a", "b"]), depth=Image())
    parquet_of(tmp_path / "two", images, features=features, depth=images)
    with pytest.raises(UserError, match=r"2 image columns \(image, depth\): name it with data.image"):
        load(tmp_path / "two")
    assert load(tmp_path / "two", image="depth").image == "depth"
    Dataset.from_dict({"x": [1, 2]}).to_parquet(tmp_path / "none" / "train.parquet")
    with pytest.raises(UserError, match="no image column"):
        load(tmp_path / "none", test_split=None)


def test_parquet_made_elsewhere_with_plain_bytes_and_whole_numbers(tmp_path):
    images = [encode(image) for image in noise(30)]
    features = Features(image={"bytes": Value("binary"), "path": Value("string")}, label=Value("int64"))
    parquet_of(tmp_path, images, labels=[i % 3 for i in range(30)], features=features)
    source = load(tmp_path, image="image", label="label")
    assert source.class_names == ["0", "1", "2"]
    parquet_of(tmp_path, images, labels=[-1] * 30, features=features)
    with pytest.raises(UserError, match=r"holds -1 in row 0 of split 'train', .* \(they count from 0\)"):
        load(tmp_path, image="image", label="label")


def test_an_empty_split_is_an_error(tmp_path):
    parquet_of(tmp_path, [])
    with pytest.raises(UserError, match=f"the split 'test' has no rows .{tmp_path}/test.parquet"):
        load(tmp_path)


@pytest.mark.parametrize("content", [b"", b"PAR1 this is not one", None])
def test_a_broken_parquet_file_is_named(tmp_path, content):
    parquet_of(tmp_path, [encode(image) for image in noise(20)])
    broken = tmp_path / "train-00001-of-00002.parquet"
    broken.write_bytes((tmp_path / "train.parquet").read_bytes()[:-9] if content is None else content)
    with pytest.raises(UserError, match=f"data.source: {broken} is no whole parquet file"):
        load(tmp_path)


def test_classes_of_the_test_split_are_those_of_training(tmp_path):
    images = [encode(image) for image in noise(20)]

    def write(split, names, labels):
        features = Features(image=Image(), label=ClassLabel(names=names))
        rows = Dataset.from_dict({"image": images, "label": labels}, features=features)
        rows.to_parquet(tmp_path / f"{split}.parquet")

    write("train", ["cat", "dog", "eel"], [0, 1] * 10)
    write("test", ["dog", "cat", "eel"], [0, 1] * 10)
    for streaming in (False, True):  # the labels would silently mean something else
        with pytest.raises(
            UserError, match=r"'label' in .*train.parquet are not those of .*: 3 in an order of its own"
        ):
            load(tmp_path, streaming=streaming)
    write("test", ["cat", "dog", "fox"], [0, 1] * 10)
    with pytest.raises(UserError, match="it has eel besides"):
        load(tmp_path)
    write("test", ["cat", "dog", "eel"], [0, 2] * 10)
    with pytest.raises(UserError, match=r"data.test_split: 'test' has rows of eel, of which 'train' has none"):
        load(tmp_path)
    assert len(load(tmp_path, test_split=None).class_names) == 3


# ---- the validation split ---------------------------------------------------------------------------------------


def test_the_split_is_the_same_rows_streamed_or_not_and_in_any_order(parquet, tmp_path):
    plain, streamed = load(parquet), load(parquet, streaming=True)
    for split in ("train", "validation"):
        assert encoded(getattr(plain, split), "img") == encoded(getattr(streamed, split), "img")
    rows = datasets.load_dataset("parquet", data_files=str(parquet / "train-*.parquet"))["train"].shuffle(seed=1)
    for shard in range(4):
        rows.shard(4, shard).to_parquet(tmp_path / f"train-{shard:05d}-of-00004.parquet")
    for streaming in (False, True):
        sharded = load(tmp_path, streaming=streaming, test_split=None)
        assert encoded(sharded.validation, "img") == encoded(plain.validation, "img")


def test_the_folds_part_the_rows(parquet):
    everything = encoded(datasets.load_dataset("parquet", data_files=str(parquet / "train-*"))["train"].cast_column(
        "img", Image(decode=False)), "img")  # fmt: skip
    folds = [load(parquet, fold=fold, folds=4) for fold in range(4)]
    assert sorted(row for fold in folds for row in encoded(fold.validation, "img")) == everything
    for fold in folds:
        assert sorted(encoded(fold.validation, "img") + encoded(fold.train, "img")) == everything
        assert 60 < len(fold.validation) < 140


def test_a_fifth_is_validation_by_default():
    source = load("embedded", embedded_rows=4000)
    assert len(source.validation) / 4000 == pytest.approx(0.2, abs=0.02)


def test_copies_of_an_image_fall_on_one_side(tmp_path):
    images = [encode(image) for image in noise(40)]
    parquet_of(tmp_path, images * 3, labels=[0, 1] * 60)
    source = load(tmp_path)
    train, validation = (set(encoded(rows, "image")) for rows in (source.train, source.validation))
    assert train.isdisjoint(validation)
    assert train | validation == {image["bytes"] for image in images}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("streaming", [False, True])
def test_every_validation_row_comes_exactly_once(parquet, streaming, workers):
    config = DataConfig(source=str(parquet), streaming=streaming, workers=workers)
    source = data.load(config)
    batches = list(data.loader(source, "validation", config, 32, seed=0))
    labels = sorted(torch.cat([batch["label"] for batch in batches]).tolist())
    assert labels == sorted(row["fine_label"] for row in source.validation)


# ---- decoding and batches ---------------------------------------------------------------------------------------


def test_16_bits_a_pixel_become_8():
    """Pillow's own conversion cuts off what is above 255, and so makes nearly all of it white."""
    ramp = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    image = np.asarray(decoding.decode(encode(PILImage.fromarray(ramp), "PNG")))
    assert (image == (ramp // 257)[..., None]).all()
    assert image.max() == 255 and len(np.unique(image)) == 64


def test_a_photo_stands_as_the_camera_was_held():
    upright = PILImage.new("RGB", (8, 16), (250, 10, 10))
    upright.paste((10, 10, 250), (0, 0, 8, 4))
    exif = PILImage.Exif()
    exif[ExifTags.Base.Orientation] = 6  # stored lying on its left side
    file = io.BytesIO()
    upright.transpose(PILImage.Transpose.ROTATE_90).save(file, "PNG", exif=exif)
    assert np.array_equal(decoding.decode({"bytes": file.getvalue(), "path": None}), upright)


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "CMYK", "1", "LA"])
def test_every_mode_becomes_rgb(mode):
    red = PILImage.new("RGB", (8, 8), (250, 10, 10)).convert(mode, palette=PILImage.Palette.ADAPTIVE)
    image = decoding.decode(encode(red, "TIFF" if mode in ("CMYK", "LA") else "PNG"))
    assert image.mode == "RGB"
    if mode in ("P", "RGBA", "CMYK"):
        assert np.abs(np.asarray(image)[0, 0].astype(int) - (250, 10, 10)).max() < 8


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
    [(False, "the image in row (7|11) of split 'train'"), (True, "an image of (100|0) bytes .* names its row.")],
)
def test_a_corrupt_image_is_told_through_a_worker_too(corrupted, streaming, where):
    config = DataConfig(source=str(corrupted), workers=1, batch_size=2, streaming=streaming)
    source = data.load(config)
    with pytest.raises(UserError, match=f"{where} can't be decoded: .*; mend or remove it, or --data.on_corrupt skip"):
        for split in ("train", "validation"):
            list(data.loader(source, split, config, 2, seed=0))


def test_a_corrupt_image_of_a_folder_is_named_by_its_file(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        for i, image in enumerate(noise(12, seed=ord(name[0]))):
            image.save(tmp_path / name / f"{i:02d}.png")
    (tmp_path / "cat" / "00.png").write_bytes(b"not an image")
    for streaming, where in ((False, "the image in row 0 of split 'train' "), (True, "")):
        with pytest.raises(UserError, match=f"{where}.?{tmp_path}/cat/00.png.? can't be decoded: it is in no format"):
            load(tmp_path, test_split=None, streaming=streaming)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("streaming", [False, True])
def test_corrupt_images_are_skipped_where_that_is_wanted(corrupted, streaming, workers):
    config = DataConfig(
        source=str(corrupted), batch_size=2, on_corrupt="skip", streaming=streaming, workers=workers, folds=2
    )
    source = data.load(config)
    batches = [
        batch for split in ("train", "validation") for batch in data.loader(source, split, config, 3, seed=0)
    ] + list(data.loader(source, "test", config, 30, seed=0))
    assert all(batch["image"].shape[0] == len(batch["label"]) for batch in batches)
    (test,) = batches[-1:]
    assert [i for i, label in enumerate(test["label"]) if label == IGNORED] == [7, 11]
    assert test["label"].tolist()[:7] == [0, 1, 0, 1, 0, 1, 0]
    assert not test["image"][7].any(), "black, whatever is beside it"
    everything = decoding.Collate("image", "label", 2, (16, 16), None, skip=True)([{"image": None, "label": 1}] * 2)
    assert everything["label"].tolist() == [IGNORED, IGNORED]
    assert not everything["image"].any()


def test_an_image_that_unpacks_to_a_bomb_is_told():
    with pytest.raises(decoding.CorruptImage, match="could be decompression bomb"):
        decoding.decode({"bytes": png_header(20_000, 20_000), "path": None})


def png_header(width: int, height: int) -> bytes:
    """The beginning of a PNG that claims to be that large."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">II", zlib.crc32(header), 9) + b"IDAT"


def test_rows_that_fill_no_batch_are_told_before_training(parquet):
    config = DataConfig(source=str(parquet), batch_size=4096)
    with pytest.raises(UserError, match=r"3\d\d training rows are fewer rows than data.batch_size 4096"):
        data.check_batch(data.load(config), config)


def test_batches_are_uint8_of_the_stored_pixels(tiny_data):
    collate = decoding.Collate("img", "fine_label", 100, (32, 32), None)
    rows = [tiny_data.train[i] for i in range(3)]
    batch = collate(rows)
    assert batch["image"].dtype == torch.uint8
    assert batch["label"].dtype == torch.int64
    first = np.asarray(PILImage.open(io.BytesIO(rows[0]["img"]["bytes"])))
    assert np.array_equal(batch["image"][0].permute(1, 2, 0).numpy(), first)


def mixed_rows():
    return [{"image": encode(noise(1, size)[0]), "label": 0} for size in ((16, 16), (40, 20))]


def test_images_of_mixed_sizes_need_image_size():
    with pytest.raises(UserError, match=r"16x16 and 40x20 pixels\): set the size .* --data.image_size"):
        decoding.Collate("image", "label", 1, (16, 16), None)(mixed_rows())
    assert decoding.Collate("image", "label", 1, (16, 16), 24)(mixed_rows())["image"].shape == (2, 3, 24, 24)


@pytest.mark.parametrize("label", [-1, None, 2])
def test_a_label_that_is_none_of_the_classes_is_told(label):
    rows = [{"image": encode(noise(1)[0]), "label": label}]
    with pytest.raises(
        UserError, match=f"column 'label' holds {label} in split 'train', which is none of the 2 classes"
    ):
        decoding.Collate("image", "label", 2, (16, 16), None)(rows)


def test_small_images_are_left_to_the_device_to_enlarge_and_large_ones_shrink_in_the_worker():
    small, large = mixed_rows()
    assert decoding.Collate("image", "label", 1, (16, 16), 64)([small])["image"].shape == (1, 3, 16, 16)
    assert decoding.Collate("image", "label", 1, (20, 40), 8)([large])["image"].shape == (1, 3, 8, 8)


@pytest.mark.parametrize("streaming", [False, True])
def test_training_rows_are_shuffled_and_the_incomplete_batch_is_dropped(parquet, streaming):
    config = DataConfig(source=str(parquet), streaming=streaming, workers=0)
    source = data.load(config)
    rows = [row["fine_label"] for row in source.train]
    loader = data.loader(source, "train", config, 32, seed=0)
    seen = torch.cat([batch["label"] for batch in loader]).tolist()
    assert len(seen) == len(rows) // 32 * 32
    assert seen != rows[: len(seen)]


@pytest.mark.real_data
def test_real_cifar_100():
    """CIFAR100 names a folder with CIFAR-100 as parquet, laid out as on the hub."""
    folder = os.environ.get("CIFAR100")
    if not folder:
        pytest.skip("set CIFAR100 to a folder with CIFAR-100's train-*.parquet and test-*.parquet")
    source = load(folder)
    assert (source.image, source.label, source.size) == ("img", "fine_label", (32, 32))
    assert (len(source.train), len(source.validation), len(source.test)) == (40069, 9931, 10000)
    assert source.class_names[:2] == ["apple", "aquarium_fish"]


# ---- decoded once and kept ----------------------------------------------------------------------------------------


def batches(source, split="train", **values):
    return list(data.loader(source, split, DataConfig(source="x", workers=0, **values), 8, 0))


@pytest.mark.parametrize("workers", [0, 1])
def test_kept_images_are_the_decoded_ones_in_the_same_order(tmp_path, monkeypatch, workers):
    monkeypatch.setattr(data, "FEW", 10)
    config = DataConfig(source=str(parquet_of(tmp_path, noise(60))), workers=workers, batch_size=8)
    source = data.load(config)
    kept = data.keep_decoded(source, config)
    assert isinstance(kept.train, data.Pixels) and isinstance(kept.validation, data.Pixels)
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
    monkeypatch.setattr(data, "FEW", 10)
    config = DataConfig(source=str(parquet_of(tmp_path, noise(40))), workers=1)
    source, state = data.load(config), torch.get_rng_state()
    data.keep_decoded(source, config)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("values", [{"keep_mb": 0}, {"streaming": True}, {"keep_mb": 1, "image_size": 300}])
def test_what_does_not_fit_and_streams_are_left_alone(tmp_path, values):
    images = noise(40, (320, 310) if "image_size" in values else (16, 16))
    config = DataConfig(source=str(parquet_of(tmp_path, images)), workers=0, **values)
    source = data.load(config)
    assert data.keep_decoded(source, config) is source
    larger = DataConfig(source=config.source, workers=0, image_size=config.image_size, keep_mb=20)
    assert data.keep_decoded(data.load(larger), larger).train.images.shape[2:] == (
        (300, 300) if "image_size" in values else (16, 16)
    )


def test_images_of_several_sizes_are_left_alone_or_told(tmp_path):
    images = noise(30) + noise(30, (20, 16), seed=1)
    config = DataConfig(source=str(parquet_of(tmp_path, images)), workers=0, image_size=32)
    source = data.load(config)
    assert data.keep_decoded(source, config) is source
    config = DataConfig(source=config.source, workers=0)
    with pytest.raises(UserError, match="images differ in size"):
        data.keep_decoded(data.load(config), config)


def test_a_corrupt_image_is_told_before_training_or_left_out(tmp_path):
    images = [encode(image) for image in noise(40)]
    images[17]["bytes"] = b"no image"
    folder = parquet_of(tmp_path, images)
    config = DataConfig(source=str(folder), workers=0)
    with pytest.raises(UserError, match="row 17 of split 'train' can't be decoded"):
        data.keep_decoded(data.load(config), config)
    config = DataConfig(source=str(folder), workers=0, on_corrupt="skip")
    kept = data.keep_decoded(data.load(config), config)
    assert sum((split.labels == IGNORED).sum().item() for split in (kept.train, kept.validation)) == 1
