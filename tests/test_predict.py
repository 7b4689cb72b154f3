import csv
import io
import json
import os
import shutil

import datasets
import numpy as np
import pytest
import run_folders
import torch
import yaml
from conftest import forget_accelerate, phase
from PIL import Image, features
from safetensors.torch import load_file
from test_launch import TORCHRUN, TWO_PROCESSES

import corruptions
import data
import decoding
import distorted
import folding
import predict
import train
from config import DataConfig
from errors import UserError
from predictions import describe
from recipe import check

ROWS = 3  # of each severity of the small .npy files


@pytest.fixture(scope="module")
def trained(parquet, tmp_path_factory):
    """A short run, at 40 pixels from images of 32, which this module's tests copy."""
    tree = {
        "model": {"name": "test_resnet"},
        "data": {"source": str(parquet), "batch_size": 32, "workers": 0, "image_size": 40},
        "phases": {"only": phase(epochs=4, lr=0.01)},
        "output_dir": str(tmp_path_factory.mktemp("trained")),
        "run_name": "run",
        "tracking": "none",
    }
    return train.train(check(tree, "test"))


@pytest.fixture
def run(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "run", ignore=shutil.ignore_patterns("predictions"))


def judge(run, *options: str) -> None:
    predict.predict(*predict.parse([str(run), *map(str, options)]))


def figures(run, name: str = "test") -> dict:
    return json.loads((run / "predictions" / f"{name}.json").read_text())


def table(path) -> list[dict]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_its_figures_are_the_trainings(run, forked_command):
    result = forked_command("predict.py", str(run))
    assert result.returncode == 0, result.stderr
    judge(run, "--split", "validation")
    summary = json.loads((run / "summary.json").read_text())
    for key in ("loss", "top1", "top5"):
        assert figures(run)[key] == pytest.approx(summary[f"test_{key}"], rel=1e-5)
    assert figures(run, "validation")["top1"] == summary["best_val_top1"]


def test_it_folds_batch_norms_which_changes_predictions_by_rounding_alone(run, monkeypatch):
    fold, counts = folding.fold, []
    monkeypatch.setattr(folding, "fold", lambda *given: counts.append(fold(*given)) or counts[-1])
    judge(run)
    folded = table(run / "predictions" / "test.csv")
    assert counts == [sum(name.endswith("running_mean") for name in load_file(run / "best" / "model.safetensors"))]
    monkeypatch.setattr(folding, "fold", lambda *_: 0)
    judge(run)
    for one, other in zip(folded, table(run / "predictions" / "test.csv"), strict=True):
        assert float(one["probability"]) == pytest.approx(float(other["probability"]), abs=1e-4)


def test_in_bf16_too_its_figures_are_the_trainings(make_config, monkeypatch):
    """Where one of the two folded less, they would differ."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    run = train.train(make_config({"only": phase(lr=0.01)}))
    judge(run)
    assert figures(run)["precision"] == "bf16"
    summary = json.loads((run / "summary.json").read_text())
    assert figures(run)["loss"] == pytest.approx(summary["test_loss"], rel=1e-5)


# ---- labelled images ------------------------------------------------------------------------------------------------


def test_json_csv_and_pictures_agree(run, parquet, capsys):
    judge(run)
    found, rows = figures(run), table(run / "predictions" / "test.csv")
    source = data.load(DataConfig(source=str(parquet)))
    labels = np.array(source.test["fine_label"])
    assert [int(row["id"]) for row in rows] == list(range(len(labels)))
    predicted = np.array([int(row["label"]) for row in rows])
    assert (predicted == labels).mean() == found["top1"]
    assert np.trace(np.array(found["confusion"])) == (predicted == labels).sum()
    top5 = [list(map(int, row["top5"].split())) for row in rows]
    assert np.mean([label in five for label, five in zip(labels, top5, strict=True)]) == pytest.approx(found["top5"])
    assert all(row["name"] == source.class_names[five[0]] for row, five in zip(rows, top5, strict=True))
    assert found["rows"] == 80 and found["precision"] == "no" and found["kind"] == "split"
    above = found["superclasses"]["per_superclass"]
    assert len(above) == 20 and sum(one["rows"] for one in above) == 80

    wrong = sorted((float(row["probability"]) for row in np.array(rows)[predicted != labels]), reverse=True)[:24]
    assert [one["probability"] for one in found["mistakes"]] == pytest.approx(wrong, abs=1e-6)
    for mistake in found["mistakes"]:
        row = source.test[int(mistake["id"])]
        assert mistake["true"] == source.class_names[row["fine_label"]]
        with Image.open(run / "predictions" / mistake["thumbnail"]) as shown:
            assert np.array_equal(shown, np.asarray(decoding.decode(row["img"])))
    said = capsys.readouterr().out
    assert f"top-1 {found['top1']:.2%}" in said and "superclass" in said


def test_a_validation_rows_id_is_its_row_in_the_training_split(run, parquet):
    judge(run, "--split", "validation")
    source = data.load(DataConfig(source=str(parquet)))
    ids = [int(row["id"]) for row in table(run / "predictions" / "validation.csv")]
    assert ids == list(source.validation[decoding.ROW])
    assert ids != list(range(len(ids)))


def test_a_link_stays_one(run, tmp_path):
    (tmp_path / "link.csv").symlink_to(tmp_path / "real.csv")
    judge(run, "--limit", "3", "--output", tmp_path / "link.csv")
    assert (tmp_path / "link.csv").is_symlink()
    assert len(table(tmp_path / "real.csv")) == 3


def test_a_stream_is_predicted_in_its_order(run):
    judge(run)
    mapped = table(run / "predictions" / "test.csv"), figures(run)
    judge(run, "--data.streaming", "true")
    assert table(run / "predictions" / "test.csv") == mapped[0]
    assert figures(run) == mapped[1]


def test_a_quick_look_keeps_the_whole_ones_figures(run):
    judge(run)
    whole = table(run / "predictions" / "test.csv")
    for streamed in ("false", "true"):
        judge(run, "--limit", "11", "--data.streaming", streamed)
        assert table(run / "predictions" / "test-limit11.csv") == whole[:11]
        assert figures(run, "test-limit11")["rows"] == 11
    assert figures(run)["rows"] == 80


def relabelled(parquet, folder, names, label):
    """The test rows in a parquet file of other class names; `label` gives each row's new class."""
    rows = data.load(DataConfig(source=str(parquet))).test.remove_columns(decoding.ROW)
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=names))
    values = {"image": rows["img"], "label": [label(value) for value in rows["fine_label"]]}
    for split in ("train", "test"):
        datasets.Dataset.from_dict(values, features=features).to_parquet(folder / f"{split}.parquet")


def test_other_data_with_the_same_classes_in_another_order(run, parquet, tmp_path):
    judge(run)
    other = tmp_path / "other data"
    other.mkdir()
    names = data.load(DataConfig(source=str(parquet))).class_names
    relabelled(parquet, other, names[::-1], lambda label: 99 - label)
    judge(run, "--data.source", str(other), "--data.image", "image", "--data.label", "label")
    one, two = figures(run), figures(run, "other-data-image-label-test")
    for key in ("loss", "top1", "top5", "ece", "confusion", "per_class"):
        assert one[key] == two[key], key
    assert two["superclasses"] is None
    assert two["source"] == str(other)


def test_data_of_other_classes_are_refused(run, parquet, tmp_path):
    relabelled(parquet, tmp_path, ["yes", "no"], lambda label: label % 2)
    with pytest.raises(
        UserError, match=r"data.source: its classes yes, no are not among the 100 that this run was trained on"
    ):
        judge(run, "--data.source", str(tmp_path))


def test_images_that_can_not_be_decoded_are_left_out(run, parquet, tmp_path):
    rows = data.load(DataConfig(source=str(parquet))).test.remove_columns(decoding.ROW)
    images = list(rows["img"])
    images[3] = {"bytes": b"no image", "path": None}
    broken = datasets.Dataset.from_dict({"img": images, "fine_label": rows["fine_label"]}, features=rows.features)
    for split in ("train", "test"):
        broken.to_parquet(tmp_path / f"{split}.parquet")
    with pytest.raises(UserError, match="the image in row 3 of split 'test' can't be decoded"):
        judge(run, "--data.source", str(tmp_path))
    judge(run, "--data.source", str(tmp_path), "--data.on_corrupt", "skip")
    name = f"{tmp_path.name}-test"
    assert figures(run, name)["corrupt"] == 1
    assert [int(row["id"]) for row in table(run / "predictions" / f"{name}.csv")] == [0, 1, 2, *range(4, 80)]


def test_views_are_averaged(run, parquet):
    judge(run)
    judge(run, "--tta", "flips")
    flipped = figures(run, "test-flips")
    assert flipped["tta"] == "flips"
    assert flipped["loss"] != figures(run)["loss"]
    # Mirrored images have the same views, only in the other order.
    rows = data.load(DataConfig(source=str(parquet))).test.remove_columns(decoding.ROW)
    folder = run.parent / "mirrored"
    folder.mkdir()
    images = []
    for row in rows:
        file = io.BytesIO()
        decoding.decode(row["img"]).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(file, "PNG")
        images.append({"bytes": file.getvalue(), "path": None})
    mirrored = datasets.Dataset.from_dict({"img": images, "fine_label": rows["fine_label"]}, features=rows.features)
    for split in ("train", "test"):
        mirrored.to_parquet(folder / f"{split}.parquet")
    judge(run, "--tta", "flips", "--data.source", str(folder))
    assert figures(run, "mirrored-test-flips")["loss"] == pytest.approx(flipped["loss"], rel=1e-4)


def test_other_data_may_be_a_test_split_alone(run, parquet, tmp_path):
    """Of one class, even; and nobody looks through training rows."""
    rows = data.load(DataConfig(source=str(parquet))).test
    folder = tmp_path / "photos" / "test" / rows.features["fine_label"].names[rows[0]["fine_label"]]
    folder.mkdir(parents=True)
    (folder / "a.png").write_bytes(rows[0]["img"]["bytes"])
    judge(run, "--data.source", tmp_path / "photos", "--data.image", "image", "--data.label", "label")
    found = figures(run, "photos-image-label-test")
    judge(run, "--limit", "1")
    assert found["loss"] == pytest.approx(figures(run, "test-limit1")["loss"], rel=1e-5)


def test_figures_of_chosen_data_replace_none_of_the_runs_own(run):
    judge(run, "--split", "validation")
    own = figures(run, "validation")
    judge(run, "--data.test_split", "train", "--limit", "5")
    judge(run, "--split", "validation", "--data.train_split", "test")
    assert figures(run, "validation") == own
    assert figures(run, "train-test-limit5")["rows"] == 5
    assert figures(run, "test-validation")["rows"] < 80


def test_figures_of_other_data_of_the_same_name_are_kept(run, parquet, tmp_path):
    for name in ("one", "other"):
        shutil.copytree(parquet, tmp_path / name / "photos")
    for _ in range(2):  # again is no mistake
        judge(run, "--data.source", tmp_path / "one" / "photos", "--limit", "5")
    before = figures(run, "photos-test-limit5")
    with pytest.raises(UserError, match=r"photos-test-limit5.json is of other data, .*/one/photos: move it away"):
        judge(run, "--data.source", tmp_path / "other" / "photos", "--limit", "5")
    assert figures(run, "photos-test-limit5") == before


def test_other_data_have_no_part_in_what_is_chosen_of_the_runs_own(run):
    """Which subset of them, and which commit."""
    path = run / "config.yaml"
    recorded = path.read_text()
    path.write_text(recorded.replace("revision: null", "revision: '0123456'").replace("subset: null", "subset: part"))
    sources = yaml.safe_load(recorded)["data"]["source"], "uoft-cs/cifar10"
    own, same, other = (
        predict.parse([str(run), *more])[1].data for more in ([], *(["--data.source", source] for source in sources))
    )
    path.write_text(recorded)
    assert (own.revision, own.subset) == (same.revision, same.subset) == ("0123456", "part")
    assert (other.revision, other.subset) == (None, None)


@pytest.mark.slow
def test_two_processes_find_what_one_does(run, command, files, pictures):
    """Images that differ in size, too, which come in batches of different shapes."""
    modes = {
        "test": [],
        "images-pictures": ["--images", str(pictures)],
        "robustness-limit3": ["--robustness", "--limit", "3", "--data.streaming", "true"],
    }
    for mode in modes.values():
        judge(run, *mode)
    suffixes = {"test": ".json", "images-pictures": ".csv", "robustness-limit3": ".json"}
    alone = {name: (run / "predictions" / f"{name}{suffix}").read_text() for name, suffix in suffixes.items()}
    shutil.rmtree(run / "predictions")
    script = """
import json, sys, accelerate, predict
accelerate.PartialState.destroy_process_group = lambda *_: None  # only the last one's end is that of the processes
for options in json.loads(sys.argv[1]):
    predict.predict(*predict.parse(options))
"""
    options = json.dumps([[str(run), *mode] for mode in modes.values()])
    (run / "judge.py").write_text(script)
    result = command(str(run / "judge.py"), options, launcher=TORCHRUN, env=TWO_PROCESSES)
    assert result.returncode == 0, result.stderr[-3000:]
    one, two = json.loads(alone["test"]), figures(run)
    for key in ("confusion", "rows", "top5", "superclasses"):
        assert one[key] == two[key], key
    assert one["loss"] == pytest.approx(two["loss"], rel=1e-5)
    assert [mistake["id"] for mistake in one["mistakes"]] == [mistake["id"] for mistake in two["mistakes"]]
    assert json.loads(alone["robustness-limit3"])["corruptions"] == figures(run, "robustness-limit3")["corruptions"]
    found = [line.split(",")[:2] for line in (run / "predictions" / "images-pictures.csv").read_text().splitlines()]
    assert found == [line.split(",")[:2] for line in alone["images-pictures"].splitlines()]
    assert result.stdout.count("expected calibration error") == 1


# ---- images without labels ------------------------------------------------------------------------------------------


def test_a_folder_of_images(run, parquet, tmp_path, capsys):
    judge(run)
    folder = tmp_path / "my photos"
    (folder / "deep" / "er").mkdir(parents=True)
    rows = data.load(DataConfig(source=str(parquet))).test
    for row, name in ((0, "a.png"), (1, "deep/b, c.PNG"), (2, "deep/er/d.png")):
        (folder / name).write_bytes(rows[row]["img"]["bytes"])
    (folder / "notes.txt").write_text("no image")
    for hidden in ("._a.png", "__MACOSX/a.png", "._b.HEIC"):  # which training passes over, too
        (folder / hidden).parent.mkdir(exist_ok=True)
        (folder / hidden).write_bytes(b"no image")
    capsys.readouterr()
    judge(run, "--images", folder)
    assert capsys.readouterr().out.endswith("images-my-photos.csv (3 images)\n")
    found, expected = table(run / "predictions" / "images-my-photos.csv"), table(run / "predictions" / "test.csv")
    assert [row["id"] for row in found] == ["a.png", "deep/b, c.PNG", "deep/er/d.png"]
    for one, two in zip(found, expected, strict=False):
        assert {**one, "id": ""} == {**two, "id": ""}

    Image.new("RGB", (300, 200)).save(folder / "large.jpg")  # of another size and shape
    Image.new("RGB", (32, 32)).save(folder / "http::b.png")
    (folder / "z.jpg").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"z.jpg can't be decoded: it is in no format that is read here"):
        judge(run, "--images", folder)
    capsys.readouterr()
    judge(run, "--images", folder, "--data.on_corrupt", "skip", "--output", tmp_path / "out.csv")
    assert capsys.readouterr().out == f"written: {tmp_path}/out.csv (5 images, 1 can't be decoded)\n"
    assert [row["id"] for row in table(tmp_path / "out.csv")][-2:] == ["http::b.png", "large.jpg"]

    if features.check("avif"):
        Image.new("RGB", (32, 32)).save(folder / "__c.avif")
        judge(run, "--images", folder, "--data.on_corrupt", "skip", "--output", tmp_path / "out.csv")
        assert table(tmp_path / "out.csv")[0]["id"] == "__c.avif", "which datasets pass over, and predict.py can read"
    (folder / "deep" / "IMG_1.HEIC").write_bytes(b"of a phone")
    with pytest.raises(UserError, match=r"--images: .*/deep/IMG_1.HEIC: .HEIC files are not read here; convert it"):
        judge(run, "--images", folder)


@pytest.fixture
def pictures(tmp_path):
    """35 files, of which the middle ones are of another size."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(35):
        side = 36 if 16 <= number < 32 else 32
        pixels = np.random.default_rng(number).integers(0, 256, (side, side, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:02d}.png")
    return folder


def test_what_is_no_picture_made_of_pixels_is_not_opened(run, pictures):
    """PostScript is a program: Pillow would have Ghostscript run it."""
    program = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 32\n%%EndComments\nshowpage\n%%EOF\n"
    for name in ("drawing.eps", "features.h5"):
        (pictures / name).write_bytes(program)
    judge(run, "--images", pictures)
    assert len(table(run / "predictions" / "images-pictures.csv")) == 35
    (pictures / "zz.png").write_bytes(program)
    with pytest.raises(UserError, match=r"zz.png can't be decoded: it is in no format that is read here"):
        judge(run, "--images", pictures)


def test_names_that_are_no_proper_text(run, pictures):
    os.rename(pictures / "00.png", os.fsencode(pictures) + b"/\xff.png")
    judge(run, "--images", pictures)
    assert table(run / "predictions" / "images-pictures.csv")[-1]["id"] == "\\udcff.png"
    (pictures / "cr\r9,5.png").write_bytes(next(pictures.glob("*.png")).read_bytes())
    judge(run, "--images", pictures)
    assert "cr 9,5.png" in [row["id"] for row in table(run / "predictions" / "images-pictures.csv")]


# ---- distorted images -----------------------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path, parquet, monkeypatch):
    """The course's and CIFAR-100-C's files, of 3 rows a severity, all of them the first images of the test split."""
    monkeypatch.setattr(distorted, "SEVERITY_ROWS", ROWS)
    monkeypatch.setattr(distorted, "SHAPE", (5 * ROWS, 32, 32, 3))
    rows = data.load(DataConfig(source=str(parquet))).test.select(range(ROWS))
    images = np.stack([np.asarray(decoding.decode(row["img"])) for row in rows])
    folder = tmp_path / "files"
    folder.mkdir()
    names = rows.features["fine_label"].names
    monkeypatch.setattr(distorted, "CIFAR100", tuple(names[::-1]))  # the files' classes, in an order of their own
    for name in (*distorted.COURSE, *corruptions.NAMES):
        np.save(folder / f"{name}.npy", np.tile(images, (5, 1, 1, 1)))
    np.save(folder / "labels.npy", 99 - np.tile(rows["fine_label"], 5))
    return folder


def test_the_courses_submission(run, files):
    judge(run)
    judge(run, "--ood", files)
    rows = table(run / "predictions" / "submission.csv")
    assert [row["id"] for row in rows] == [
        f"distortion{number:02d}_{severity}_{image}"
        for number in range(19)
        for severity in range(1, 6)
        for image in range(ROWS)
    ]
    expected = [str(99 - int(row["label"])) for row in table(run / "predictions" / "test.csv")[:ROWS]]
    assert [row["label"] for row in rows] == expected * 95
    assert list(rows[0]) == ["id", "label"]


def test_the_published_corruptions(run, files):
    judge(run)
    judge(run, "--cifar100c", files)
    labels = 99 - np.load(files / "labels.npy")[:ROWS]
    predicted = [int(row["label"]) for row in table(run / "predictions" / "test.csv")[:ROWS]]
    found = figures(run, "cifar100c")
    assert found["mean19"] == found["mean15"] == pytest.approx((labels == predicted).mean())
    assert found["rows"] == ROWS and len(found["corruptions"]) == 19
    assert found["source"] == str(files)


def test_corruptions_made_here(run, monkeypatch, capsys):
    judge(run, "--robustness", "--limit", "4")
    first = figures(run, "robustness-limit4")
    judge(run, "--robustness", "--limit", "4", "--data.batch_size", "7", "--data.workers", "1")
    assert figures(run, "robustness-limit4") == first
    assert "not comparable" in first["note"] and "not comparable" in capsys.readouterr().out

    monkeypatch.setattr(corruptions, "corrupt", lambda image, *_: image)
    judge(run)
    judge(run, "--robustness")
    found = figures(run, "robustness")
    assert {value for one in found["corruptions"] for value in one["top1"]} == {figures(run)["top1"]}
    assert found["mean15"] == pytest.approx(figures(run)["top1"])


# ---- what can be wrong ----------------------------------------------------------------------------------------------


def test_images_of_several_sizes_are_corrupted_at_the_models(run, pictures, parquet, tmp_path):
    names = data.load(DataConfig(source=str(parquet))).class_names
    folder = tmp_path / "mixed" / "test" / names[0]
    shutil.copytree(pictures, folder)
    options = ("--data.source", tmp_path / "mixed", "--data.image", "image", "--data.label", "label")
    judge(run, "--robustness", *options, "--data.batch_size", "10")
    assert figures(run, "mixed-image-label-robustness")["rows"] == 35
    with pytest.raises(UserError, match=r"takes more than data.keep_mb 0 MB: give another"):
        judge(run, "--robustness", "--data.keep_mb", "0")


def test_two_classes_that_are_not_square(parquet, tmp_path, pictures):
    """Fewer classes than five, and a size to which nothing is brought."""
    folder = tmp_path / "wide"
    for number in range(40):
        place = folder / ("train" if number < 30 else "test") / "ab"[number % 2]
        place.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 24), (number, 100 * (number % 2), 0)).save(place / f"{number}.png")
    tree = {
        "model": {"name": "test_resnet"},
        "data": {"source": str(folder), "batch_size": 8, "workers": 0},
        "phases": {"only": phase()},
        "output_dir": str(tmp_path),
        "run_name": "wide-run",
        "tracking": "none",
    }
    run = train.train(check(tree, "test"))
    judge(run, "--tta", "shifts")
    assert figures(run, "test-shifts")["top5"] == 1
    judge(run, "--robustness", "--limit", "2")
    judge(run, "--limit", "4")
    assert [row["rows"] for row in figures(run, "test-limit4")["per_class"]] == [2, 2], "not the first class alone"
    judge(run, "--images", folder / "test")
    assert len(table(run / "predictions" / "images-test.csv")) == 10
    with pytest.raises(UserError, match="images of 32x32 pixels: this run's model takes 32x24, and images"):
        judge(run, "--images", pictures, "--limit", "2")


def test_a_run_that_mixed_its_images_is_judged_one_by_one(run):
    """Which is told to be impossible in training; here there is nothing to mix."""
    recorded = yaml.safe_load((run / "config.yaml").read_text())
    recorded["augment"]["mix"] = "cutmix"
    (run / "config.yaml").write_text(yaml.safe_dump(recorded))
    judge(run, "--limit", "2", "--data.batch_size", "1")
    assert figures(run, "test-limit2")["rows"] == 2


def test_a_run_with_pretrained_weights_needs_no_hub(run, forked_command):
    """What it started from is of no interest any more, even where no checkpoint is left."""
    recorded = yaml.safe_load((run / "config.yaml").read_text())
    recorded["model"]["pretrained"] = True
    (run / "config.yaml").write_text(yaml.safe_dump(recorded))
    shutil.rmtree(run / "checkpoints")
    result = forked_command("predict.py", str(run), "--limit", "3", env={"HF_ENDPOINT": "http://127.0.0.1:9"})
    assert result.returncode == 0, result.stderr
    assert "hub" not in result.stderr


def test_a_folder_without_trained_weights_is_told(tmp_path, command):
    result = command("predict.py", str(tmp_path))
    assert result.returncode == 2
    assert result.stderr == f"error: {tmp_path} is not a run folder: it has no config.yaml\n"
    with pytest.raises(UserError, match=r"x is not a run folder: it has no config\.yaml"):
        judge("x" * 300)
    (tmp_path / "config.yaml").write_text("recipe: x")
    with pytest.raises(UserError, match=r"has no best/config.json: the run has not finished an epoch, or lost its w"):
        judge(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--limit", "5", "--ood", "."], "--limit: a submission"),
        (["--limit", "0"], "--limit: should be a whole number of at least 1"),
        (["--robustness", "--seed", "1234567890123456"], "--seed: should be a whole number .* of at most 15 digits"),
        (["--seed", "-1"], "--seed: should be a whole number of at least 0"),
        (["--output", "x.csv", "--robustness"], "--output: it names the CSV of predictions"),
        (["--split", "train"], "invalid choice"),
        (["--split", "test", "--robustness"], "not allowed with"),
        (["--data.sauce", "x"], "there is no option --data.sauce; did you mean --data.source"),
        (["--data.workers", "many"], "data.workers"),
        (["--images", "nowhere"], "--images: there is no folder nowhere"),
        (["--ood", "nowhere"], "--ood: there is no folder nowhere"),
        (["--cifar100c", "docs"], "gaussian_noise.npy is missing"),
        (["--images", "x" * 300], "--images: there is no folder x"),
        (["--ood", "x" * 300], "--ood: there is no folder x"),
        (["--cifar100c", "x" * 300], "--cifar100c: there is no folder x"),
        (["--output", "x" * 300], "x can't be written: File name too long"),
        (["--output", "x" * 300 + "/x.csv"], "--output: there is no folder"),
        (["--output", "nowhere/x.csv"], "--output: there is no folder"),
        (["--output", "."], "--output: . is a folder: name a file in it"),
        (["--output", "docs"], "--output: docs is a folder: name a file in it"),
        (["--output", "/dev/full"], "--output: /dev/full is not a regular file"),
        (["--push_to_hub", "nonsense"], "push_to_hub: should be NAME/MODEL"),
        (["--seed", "1"], "--seed: it is the seed of --robustness"),
        (["--images", "docs", "--data.source", "embedded"], "--data.source: it chooses labelled data"),
        (["--push_to_hub", "a/b", "--tta", "flips"], "--tta: an upload predicts nothing"),
        (["--data.test_split", "null"], "has no test split|have no test split"),
    ],
)
def test_options_that_make_no_sense_are_told(run, options, message):
    with pytest.raises(UserError, match=message):
        judge(run, *options)
    assert not list(run.glob("predictions/*"))


def test_a_run_without_validation_has_none_to_judge(run):
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["data"]["folds"] = None
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(UserError, match=r"no rows were held out of its training split \(data.folds is null\)"):
        judge(run, "--split", "validation")


def fewer_classes(described: bytes) -> bytes:
    """best/config.json with names for 7 of the 100 classes that the weights are of."""
    described = json.loads(described)
    return json.dumps(described | {"label_names": described["label_names"][:7]}).encode()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", b"{"),
        ("config.json", b'{"label_names": ["a", "b"]}'),
        ("config.json", b'{"label_names": "ab", "pretrained_cfg": {"input_size": [3, 32, 32]}}'),
        ("config.json", b'{"label_names": ["a", 1], "pretrained_cfg": {"input_size": [3, 32, 32]}}'),
        ("config.json", b'{"label_names": ["a", "b"], "pretrained_cfg": {"input_size": [3, -1, "x"]}}'),
        ("config.json", fewer_classes),
        ("model.safetensors", b"no tensors"),
    ],
)
def test_damaged_weights_are_told(run, name, content):
    path = run / "best" / name
    path.write_bytes(content(path.read_bytes()) if callable(content) else content)
    with pytest.raises(UserError, match=r"is damaged|is not a safetensors file"):
        judge(run)


def test_a_run_still_going_on_is_judged(run):
    (run / "summary.json").unlink()
    judge(run, "--limit", "3")
    found = figures(run, "test-limit3")
    assert (found["rows"], found["epochs"]) == (3, len((run / "history.jsonl").read_text().splitlines()))


def test_names_of_files_tell_what_was_asked_for(run):
    args, _ = predict.parse([str(run), "--robustness", "--tta", "flips", "--limit", "3", "--seed", "2"])
    assert predict._name(args, "robustness", "x") == "robustness-flips-limit3-seed2"


def test_nothing_is_left_of_what_went_wrong(run, monkeypatch):
    """Predictions that were there stay, and half of new ones does not appear."""
    judge(run)
    before = {path: path.read_bytes() for path in (run / "predictions").iterdir() if path.is_file()}
    monkeypatch.setattr(predict.Classification, "compute", lambda *_: (_ for _ in ()).throw(UserError("broken")))
    with pytest.raises(UserError, match="broken"):
        judge(run, "--tta", "flips")
    assert before == {path: path.read_bytes() for path in (run / "predictions").iterdir() if path.is_file()}


def test_the_precision_is_that_of_the_training(run):
    """Without a launcher that says otherwise; fp16 can't be had on a CPU."""
    recorded = yaml.safe_load((run / "config.yaml").read_text())
    for trained_in, expected in (("bf16", "bf16"), ("fp16", "no"), ("no", "no")):
        if trained_in == "fp16" and torch.cuda.is_available():
            continue
        recorded["environment"]["mixed_precision"] = trained_in
        (run / "config.yaml").write_text(yaml.safe_dump(recorded))
        forget_accelerate()
        judge(run, "--limit", "2")
        assert figures(run, "test-limit2")["precision"] == expected


def test_the_files_classes_are_cifar_100s(run, files, monkeypatch):
    monkeypatch.setattr(distorted, "CIFAR100", distorted.CIFAR100[:99])
    for option in ("--ood", "--cifar100c"):
        with pytest.raises(UserError, match=f"{option}: its images show CIFAR-100's classes"):
            judge(run, option, files)


def test_classes_without_images_are_not_listed():
    """As with --limit, most are."""
    found = run_folders.split("test", ["seen", "unseen"], mistakes=0)
    found["per_class"][1] |= {"rows": 0, "top1": None}
    found["superclasses"]["per_superclass"][1] |= {"name": "none of these", "rows": 0, "top1": None}
    told = describe(found)
    assert "  seen " in told and "group 0" in told
    assert "none of these" not in told and "  unseen " not in told.split("most confused")[0]
