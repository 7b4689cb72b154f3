import json
import os

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from datasets import ClassLabel, Dataset, Features, Image, Value
from images import encode, noise, parquet_of

import data
import loading
import sources
from config import DataConfig
from decoding import decode
from errors import UserError


def load(source, **values):
    return data.load(DataConfig(source=str(source), **({"workers": 0} | values)))


@pytest.mark.parametrize("option", ["subset", "revision"])
def test_what_only_the_hub_has_is_not_looked_for_elsewhere(option):
    with pytest.raises(UserError, match=f"data.{option}: only datasets on the hub have {option}s, and embedded is not"):
        load("embedded", **{option: "x"})


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
            for i, image in enumerate(noise(12, seed=len(list(tmp_path.rglob("*"))))):
                image.save(tmp_path / split / name / f"{i}.png")
    config = DataConfig(source=str(tmp_path), streaming=streaming, workers=0)
    source = data.load(config)
    assert source.class_names == ["cat", "dog"]
    batch = next(iter(loading.loader(source, "test", config, 24)))
    assert batch["image"].shape == (24, 3, 16, 16)
    assert batch["label"].sum() == 12


def folder_of_classes(folder, counts):
    """Different images in folders of these names, so many in each."""
    images = iter(noise(sum(counts.values())))
    for name, count in counts.items():
        (folder / name).mkdir(parents=True)
        for number in range(count):
            next(images).save(folder / name / f"{number}.png")
    return folder


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", ["train", "test_tube", "validation-set", "tube [1]"])
def test_a_class_may_be_called_like_a_split(tmp_path, name, streaming):
    """CIFAR-100 has trains. `datasets` takes such a folder for a split, and mixes test images into training."""
    counts = {"train/apple": 20, f"train/{name}": 30, "test/apple": 4, f"test/{name}": 6}
    source = load(folder_of_classes(tmp_path, counts), folds=None, streaming=streaming, batch_size=8)
    assert source.class_names == sorted(["apple", name])
    splits = {"train": source.train, "test": source.test}
    paths = {split: [row["image"]["path"] for row in rows] for split, rows in splits.items()}
    assert {split: len(each) for split, each in paths.items()} == {"train": 50, "test": 10}
    assert all(f"{tmp_path}/{split}/" in path for split, each in paths.items() for path in each)


@pytest.mark.parametrize("name", ["train", "test_tube", "tube [1]"])
def test_without_splits_a_class_may_be_called_like_one_too(tmp_path, name):
    source = load(folder_of_classes(tmp_path, {"apple": 20, name: 30}), test_split=None, folds=None)
    assert (source.class_names, len(source.train)) == (sorted(["apple", name]), 50)


def test_hidden_folders_are_neither_splits_nor_classes(tmp_path):
    counts = {"train/a": 20, "train/b": 20, "test/a": 4, "test/b": 4}
    counts |= {".cache/x": 3, "train/.thumbs": 3, "__MACOSX/train": 3}
    source = load(folder_of_classes(tmp_path, counts), folds=None)
    assert (source.class_names, len(source.train), len(source.test)) == (["a", "b"], 40, 8)


@pytest.mark.parametrize("other", ["old-stuff/notes", "all/x", "docs/figures"])
def test_what_lies_beside_the_splits_is_left_alone(tmp_path, other):
    folder = folder_of_classes(tmp_path, {"train/a": 20, "train/b": 20, "test/a": 4, "test/b": 4, other: 3})
    (folder / "misc" / "empty").mkdir(parents=True)
    source = load(folder, folds=None)
    assert (source.class_names, len(source.train), len(source.test)) == (["a", "b"], 40, 8)
    names = ", ".join(sorted([other.split("/")[0], "misc", "test", "train"]))
    with pytest.raises(UserError, match=f"has no split 'validation'; it has {names}"):
        load(folder, test_split="validation")


@pytest.mark.parametrize(
    "odd, options",
    [
        ("pear/crops", {"test_split": None}),
        (".", {"test_split": None}),
        ("train/pear/a/b", {}),
        ("train", {}),
        ("test/pear/images", {}),
    ],
)
def test_an_image_that_is_not_in_a_class_folder_is_told(tmp_path, odd, options):
    """`datasets` would make its own folder a class, or mix the classes of folders of one name."""
    splits = ("",) if options else ("train/", "test/")
    folder_of_classes(tmp_path, {f"{split}{name}": 20 for split in splits for name in ("apple", "pear")})
    (tmp_path / odd).mkdir(parents=True, exist_ok=True)
    next(iter(noise(1))).save(tmp_path / odd / "odd.png")
    with pytest.raises(
        UserError, match=f"{tmp_path / odd / 'odd.png'} is not directly in a class's folder, as .*/apple"
    ):
        load(tmp_path, **options)


@pytest.mark.parametrize("streaming", [False, True])
def test_class_folders_may_be_links(tmp_path, streaming):
    """As in a subset that is made without copying."""
    real = folder_of_classes(tmp_path / "real", {"a": 20, "b": 20, "c": 20})
    for split in ("train", "test"):
        (tmp_path / "few" / split).mkdir(parents=True)
        for name in ("a", "b"):
            (tmp_path / "few" / split / f"my {name}").symlink_to(real / name)
    source = load(tmp_path / "few", folds=None, streaming=streaming, batch_size=8)
    assert source.class_names == ["my a", "my b"]
    assert len([*source.train]) == len([*source.test]) == 40


def test_splits_with_a_table_of_labels(tmp_path):
    folder_of_classes(tmp_path, {"train": 40, "test": 8})
    for split, count in (("train", 40), ("test", 8)):
        lines = [f"{number}.png,{number % 2}" for number in range(count)]
        (tmp_path / split / "metadata.csv").write_text("\n".join(["file_name,label", *lines]))
    source = load(tmp_path, label="label", folds=None)
    assert (source.class_names, len(source.train), len(source.test)) == (["0", "1"], 40, 8)


@pytest.mark.parametrize("name", ["metadata.json", "metadata.txt"])
def test_other_files_of_that_name_make_no_table_of_labels(tmp_path, name):
    folder_of_classes(tmp_path, {"cat": 20, "dog": 20})
    for place in (tmp_path, tmp_path / "cat", tmp_path / "dog"):
        (place / name).write_text("{}")
    assert load(tmp_path, folds=None, test_split=None).class_names == ["cat", "dog"]
    folder_of_classes(tmp_path, {"dog/puppies": 1})
    with pytest.raises(UserError, match=r"dog/puppies/0\.png is not directly in a class's folder"):
        load(tmp_path, folds=None, test_split=None)


def test_a_split_without_images_is_named(tmp_path):
    folder_of_classes(tmp_path, {"train/cat": 20, "train/dog": 20, "test/cat": 0, "test/dog": 0})
    (tmp_path / "test" / "cat" / "0.dng").write_bytes(b"odd")
    with pytest.raises(UserError, match=f"{tmp_path}/test holds no images"):
        load(tmp_path, streaming=False)


def test_a_folder_above_the_splits_is_told(tmp_path):
    folder_of_classes(tmp_path, {"images/train/a": 20, "images/train/b": 20, "images/test/a": 4, "images/test/b": 4})
    with pytest.raises(UserError, match=f"{tmp_path} has no folder 'train', but {tmp_path}/images has: name that one"):
        load(tmp_path)


def test_other_names_of_splits_are_told(tmp_path):
    counts = {"training/a": 20, "training/b": 20, "testing/a": 4, "testing/b": 4}
    folder = folder_of_classes(tmp_path, counts)
    with pytest.raises(UserError, match="has no split 'train'; it has testing, training: name one"):
        load(folder, test_split=None)
    source = load(folder, train_split="training", test_split="testing", folds=None)
    assert (len(source.train), len(source.test)) == (40, 8)


def test_brackets_in_a_path_are_taken_as_they_are(tmp_path):
    folder = tmp_path / "photos [1]"
    folder.mkdir()
    parquet_of(folder, [encode(image) for image in noise(40)])
    assert len(load(folder, folds=None).train) == 40


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


@pytest.mark.parametrize("streaming", [False, True])
def test_a_table_of_text_is_no_source_of_images(monkeypatch, tmp_path, streaming):
    """A dataset on the hub may be one. Streamed, it has no columns before its rows are read."""
    (tmp_path / "train.csv").write_text("a,b\n1,2\n")
    rows = datasets.load_dataset("csv", data_files=str(tmp_path / "train.csv"), streaming=streaming)
    monkeypatch.setattr(sources, "open_splits", lambda config: rows)
    with pytest.raises(UserError, match="data.source: somebody/table does not say" if streaming else "no image column"):
        load("somebody/table", streaming=streaming, test_split=None)


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


@pytest.mark.parametrize("dtype", ["uint8", "uint64", "int8", "int32"])
def test_labels_of_any_whole_number_type(tmp_path, dtype, monkeypatch):
    """And nothing is mapped, which would write all images to disk again."""
    monkeypatch.setattr(datasets.Dataset, "map", lambda *_, **__: pytest.fail("it is mapped"))
    features = Features(image=Image(), label=Value(dtype))
    folder = parquet_of(tmp_path, [encode(image) for image in noise(40)], features=features)
    source = load(folder, label="label")
    assert source.class_names == ["0", "1"]
    assert set(source.test["label"]) == {0, 1} and source.test.features["label"].names == ["0", "1"]


def test_a_test_file_alone_may_have_few_rows_of_many_numbered_classes(tmp_path):
    images, features = [encode(image) for image in noise(20)], Features(image=Image(), label=Value("int64"))
    parquet_of(tmp_path, images, labels=range(0, 100, 5), features=features)
    (tmp_path / "train.parquet").unlink()
    source = data.load(DataConfig(source=str(tmp_path), label="label"), only_test=True)
    assert len(source.test) == 20 and len(source.class_names) == 96


def test_columns_of_a_type_that_is_not_known_are_told(tmp_path):
    table = pa.table({"image": [b""], "label": [0]})
    described = {"info": {"features": {"label": {"_type": "LabelOfTheFuture"}}}}
    pa.parquet.write_table(
        table.replace_schema_metadata({"huggingface": json.dumps(described)}), tmp_path / "train.parquet"
    )
    with pytest.raises(UserError, match=r"data.source: .*train.parquet .*LabelOfTheFuture"):
        load(tmp_path)


def test_a_resumed_run_must_find_its_stream_in_as_many_files(tmp_path):
    """Each file is read by itself, so that their number decides the order of the rows."""
    parquet_of(tmp_path, [encode(image) for image in noise(40)])
    one = data.facts(load(tmp_path, streaming=True, batch_size=8))
    (tmp_path / "train-2.parquet").hardlink_to(tmp_path / "train.parquet")
    two = data.facts(load(tmp_path, streaming=True, batch_size=8))
    assert two == one | {"files of the stream": 2} != one
    assert "files of the stream" not in data.facts(load(tmp_path))


def test_superclasses_that_cannot_be_read_are_told():
    def fails():
        yield {"fine": 0, "coarse": 0}
        raise OSError("a damaged page")

    features = Features(fine=ClassLabel(names=["a", "b", "c"]), coarse=ClassLabel(names=["x", "y"]))
    rows = datasets.IterableDataset.from_generator(fails, features=features)
    source = data.Data(None, None, None, "image", "fine", rows, ["a", "b", "c"], (8, 8))
    with pytest.raises(UserError, match=r"data.train_split: column 'coarse' can't be read: a damaged page"):
        data.superclasses(source)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_column_that_splits_a_class_late_is_no_superclass(streaming):
    """Nor is one of a single value."""
    kinds = Features(fine=ClassLabel(names=["a", "b", "c"]), above=ClassLabel(names=["x", "y"]))

    def found(above):
        rows = Dataset.from_dict({"fine": [0, 1, 2] * 99, "above": above}, features=kinds)
        rows = rows.to_iterable_dataset() if streaming else rows
        return data.superclasses(data.Data(None, None, None, "image", "fine", rows, ["a", "b", "c"], (8, 8)))

    assert found([0, 0, 1] * 99) == {"a": "x", "b": "x", "c": "y"}
    assert found([0, 0, 1] * 98 + [1, 0, 1]) is None
    assert found([0, 0, 0] * 99) is None


def test_test_images_of_another_size_are_told_before_training(tmp_path):
    parquet_of(tmp_path, [encode(image) for image in noise(40, (16, 16))])
    (tmp_path / "test.parquet").rename(tmp_path / "kept")
    parquet_of(tmp_path, [encode(image) for image in noise(40, (16, 12))])
    (tmp_path / "kept").rename(tmp_path / "train.parquet")
    with pytest.raises(UserError, match=r"16x16 pixels in split 'train', 16x12 in 'test'.*--data.test_split null"):
        load(tmp_path)
    assert load(tmp_path, image_size=16).size == load(tmp_path, test_split=None).size == (16, 16)


def test_an_empty_split_is_an_error(tmp_path):
    parquet_of(tmp_path, [])
    with pytest.raises(UserError, match=f"the split 'train' has no rows .{tmp_path}/train.parquet"):
        load(tmp_path)


@pytest.mark.parametrize("content", [b"", b"PAR1 this is not one", None])
def test_a_broken_parquet_file_is_named(tmp_path, content):
    parquet_of(tmp_path, [encode(image) for image in noise(20)])
    broken = tmp_path / "train-00001-of-00002.parquet"
    broken.write_bytes((tmp_path / "train.parquet").read_bytes()[:-9] if content is None else content)
    with pytest.raises(UserError, match=f"data.source: {broken} is not an intact parquet file"):
        load(tmp_path)


def test_only_files_of_the_splits_that_are_wanted_are_read(tmp_path):
    """As in a contest, whose test rows have an id for a label, and beside something else altogether."""
    images = [encode(image) for image in noise(40)]
    parquet_of(tmp_path, images)
    features = Features(id=Value("string"), image=Image())
    test = Dataset.from_dict({"id": [f"row {row}" for row in range(40)], "image": images}, features=features)
    test.to_parquet(tmp_path / "test.parquet")
    (tmp_path / "embeddings.parquet").write_bytes(b"?")
    for streaming in (False, True):
        source = load(tmp_path, streaming=streaming, test_split=None, folds=None, batch_size=8)
        assert source.class_names == ["a", "b"]
        assert sum(1 for _ in source.train) == 40
        with pytest.raises(UserError, match=r"split 'test' has no images and classes in its .*--data.test_split null"):
            load(tmp_path, streaming=streaming)
    with pytest.raises(UserError, match="has no split 'training'; it has embeddings, test, train"):
        load(tmp_path, train_split="training", test_split=None)
    test.rename_column("id", "label").to_parquet(tmp_path / "test.parquet")
    with pytest.raises(UserError, match=r"column 'label' of split 'test' holds string, not classes; .*null"):
        load(tmp_path)
    test.add_column("label", [0, 1] * 20).to_parquet(tmp_path / "test.parquet")
    for streaming in (False, True):
        source = load(tmp_path, streaming=streaming, batch_size=8)
        assert sum(1 for _ in source.test) == 40 and source.class_names == ["a", "b"]


def test_class_names_are_those_of_training_and_the_same_in_all_its_files(tmp_path):
    images, features = [encode(image) for image in noise(40)], Features(image=Image(), label=Value("int64"))
    parquet_of(tmp_path, images)
    plain = Dataset.from_dict({"image": images, "label": [0, 1] * 20}, features=features)
    plain.to_parquet(tmp_path / "test.parquet")
    source = load(tmp_path)
    assert source.class_names == source.test.features["label"].names == ["a", "b"]
    plain.to_parquet(tmp_path / "train-0.parquet")
    with pytest.raises(UserError, match=r"train.parquet names the classes of column 'label', and .*train-0.* does not"):
        load(tmp_path)
    plain.add_column("id", range(40)).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(UserError, match=r"train.parquet has a column 'id', which .*train-0.parquet has not"):
        load(tmp_path)


def test_fewer_rows_than_processes_are_held_out_as_always(tmp_path, monkeypatch):
    rows = load(parquet_of(tmp_path, [encode(image) for image in noise(40)]), folds=None).train.select(range(5))
    monkeypatch.setenv("WORLD_SIZE", "7")
    shares = []
    for rank in range(7):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setattr(data, "on_all", lambda work: shares.append(work()) or [[True] * 5])
        data.split_off_validation(rows, "image", lambda content: len(content) % 2 == 0)
    assert [len(share) for share in shares] == [1] * 5 + [0] * 2
    monkeypatch.setattr(data, "on_all", lambda _: shares)
    training, validation = data.split_off_validation(rows, "image", None)
    assert validation["image"] == [image for image in rows["image"] if len(image["bytes"]) % 2 == 0]
    assert len(training) + len(validation) == 5


def test_classes_of_the_test_split_are_those_of_training(tmp_path):
    images = [encode(image) for image in noise(20)]

    def write(split, names, labels):
        features = Features(image=Image(), label=ClassLabel(names=names))
        rows = Dataset.from_dict({"image": images, "label": labels}, features=features)
        rows.to_parquet(tmp_path / f"{split}.parquet")

    write("train", ["cat", "dog", "eel"], [0, 1] * 10)
    write("test", ["dog", "cat", "eel"], [0, 1] * 10)
    for streaming in (False, True):  # the labels would silently mean something else
        with pytest.raises(UserError, match=r"'label' in .*test.parquet are not those of .*: 3 in an order of its own"):
            load(tmp_path, streaming=streaming)
    write("test", ["cat", "dog", "fox"], [0, 1] * 10)
    with pytest.raises(UserError, match=r"it has fox besides; --data.test_split null does without"):
        load(tmp_path)
    write("test", ["cat", "dog", "eel"], [0, 2] * 10)
    with pytest.raises(UserError, match=r"data.test_split: 'test' has rows of eel, of which 'train' has none"):
        load(tmp_path)
    assert len(load(tmp_path, test_split=None).class_names) == 3


# ---- the validation split ---------------------------------------------------------------------------------------


def pixels(rows, column) -> list[bytes]:
    """What rows show, whether a stream keeps them decoded or not."""
    images = [row[column] for row in rows]
    return sorted((image if isinstance(image, np.ndarray) else np.asarray(decode(image))).tobytes() for image in images)


def test_the_split_is_the_same_rows_streamed_or_not_and_in_any_order(parquet, tmp_path):
    plain = load(parquet)
    for keep_mb in (0, 2048):
        streamed = load(parquet, streaming=True, keep_mb=keep_mb)
        for split in ("train", "validation"):
            assert pixels(getattr(plain, split), "img") == pixels(getattr(streamed, split), "img")
    rows = datasets.load_dataset("parquet", data_files=str(parquet / "train-*.parquet"))["train"].shuffle(seed=1)
    for shard in range(4):
        rows.shard(4, shard).to_parquet(tmp_path / f"train-{shard:05d}-of-00004.parquet")
    for streaming in (False, True):
        sharded = load(tmp_path, streaming=streaming, test_split=None)
        assert pixels(sharded.validation, "img") == pixels(plain.validation, "img")


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


def test_a_corrupt_image_of_a_folder_is_named_by_its_file(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        for i, image in enumerate(noise(12, seed=ord(name[0]))):
            image.save(tmp_path / name / f"{i:02d}.png")
    (tmp_path / "cat" / "00.png").write_bytes(b"not an image")
    for streaming, where in ((False, "the image in row 0 of split 'train' "), (True, "")):
        with pytest.raises(UserError, match=f"{where}.?{tmp_path}/cat/00.png.? can't be decoded: it is in no format"):
            source = load(tmp_path, test_split=None, streaming=streaming, batch_size=2)
            for split in ("train", "validation"):  # a stream's first image is any of them
                list(loading.loader(source, split, DataConfig(source=str(tmp_path), workers=0), 2))


def test_rows_that_fill_no_batch_are_told_before_training(parquet):
    config = DataConfig(source=str(parquet), batch_size=4096)
    with pytest.raises(UserError, match=r"3\d\d training rows are fewer than data.batch_size 4096"):
        data.check_batch(data.load(config), config)


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
