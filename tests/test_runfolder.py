import io
import json

import pytest
from PIL import Image
from run_folders import history, png, split, write_predictions, write_run

import runfolder
from errors import UserError
from runfolder import read_run, thumbnail

TWO = {"head": 2, "finetune": 3}


@pytest.fixture
def folder(tmp_path):
    return write_run(tmp_path / "run", TWO)


def test_a_run_as_it_was_written(folder):
    write_predictions(folder, split("validation", ["a", "b"]), split("test", ["a", "b"]))
    run = read_run(folder)
    assert (run.name, run.phases, run.planned()) == ("run", TWO, 5)
    assert run.history[3]["val_top1"] == pytest.approx(0.42)
    assert run.summary["parameters"] == 23_712_932
    assert [found.name for found in run.predictions] == ["test", "validation"]
    assert run.predictions[0].confusion[0] == split("test", ["a", "b"])["confusion"][0]
    assert run.notes == []


def test_what_tells_most_comes_first(folder):
    names = ["test-limit5", "validation", "photos-test", "test-flips", "test"]
    changes = {"test-limit5": {"limit": 5}, "test-flips": {"tta": "flips"}}
    write_predictions(folder, *(split(name, ["a"], **changes.get(name, {})) for name in names))
    found = [it.name for it in read_run(folder).predictions]
    assert found == ["test", "photos-test", "validation", "test-flips", "test-limit5"]


def test_figures_that_are_missing_or_not_finite_are_none_and_told(folder):
    rows = history(TWO)
    del rows[0]["val_top1"], rows[1]["phase"], rows[2]["images_per_second"], rows[2]["epoch"]
    rows[1] |= {"train_loss": float("nan"), "lr": "fast", "val_loss": float("inf"), "seconds": True, "step": 10**400}
    (folder / "history.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = read_run(folder)
    assert run.history[0]["val_top1"] is None
    assert run.history[2]["epoch"] == 3
    missing = ("train_loss", "lr", "val_loss", "seconds", "step")
    assert [run.history[1][key] for key in missing] == [None] * len(missing)
    assert run.history[1]["phase"] == "-"
    assert run.notes == ["history.jsonl: 3 figures are missing or not finite: shown as - and as gaps"]


def test_half_a_line_that_a_crash_left_is_left_out(folder):
    with (folder / "history.jsonl").open("a") as file:
        file.write('{"phase": "finetune", "epo')
    run = read_run(folder)
    assert len(run.history) == 5
    assert run.notes == ["history.jsonl: its last line is incomplete and left out"]


@pytest.mark.parametrize("name", ["history.jsonl", "summary.json"])
@pytest.mark.parametrize(
    "content", [b"3\n", b"[]\n", b"{\n{}\n", b"\xff\xfe\n", b"[" * 100_000 + b"\n", b"9" * 5000 + b"\n", None]
)
def test_a_damaged_history_or_summary_is_told(folder, name, content):
    (folder / name).unlink()
    (folder / name).mkdir() if content is None else (folder / name).write_bytes(content)
    with pytest.raises(UserError, match=f"{name} is damaged"):
        read_run(folder)


DAMAGE = {
    "empty": lambda text: "",
    "truncated": lambda text: text[:500],
    "not json": lambda text: "<html>",
    "a list": lambda text: "[]",
    "no kind": lambda text: '{"loss": 1, "top1": 0.5, "top5": 0.9}',
    "a percentage": lambda text: json.dumps(json.loads(text) | {"top1": 43.2}),
    "not square": lambda text: json.dumps(json.loads(text) | {"confusion": [[1, 2], [3]]}),
    "too few names": lambda text: json.dumps(json.loads(text) | {"class_names": ["a"]}),
    "negative": lambda text: json.dumps(json.loads(text) | {"confusion": [[-1, 2], [3, 4]]}),
    "nan": lambda text: json.dumps(json.loads(text) | {"ece": float("nan")}),
    "another's name": lambda text: json.dumps(json.loads(text) | {"name": "<b>\x1b"}),
    "deep": lambda text: "[" * 100_000,
    "surrogate": lambda text: json.dumps(json.loads(text) | {"source": "\ud800"}),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_damaged_predictions_are_left_out_with_a_line(folder, damage):
    write_predictions(folder, split("test", ["a", "b"]), split("validation", ["a", "b"]))
    path = folder / "predictions" / "test.json"
    path.write_text(damage(path.read_text()))
    run = read_run(folder)
    assert [found.name for found in run.predictions] == ["validation"]
    (note,) = run.notes
    assert note.startswith("predictions/test.json is left out: ") and note.isprintable()


def test_predictions_that_lead_out_of_the_run_are_left_out(folder, tmp_path):
    other = write_run(tmp_path / "other", TWO)
    write_predictions(other, split("test", ["a", "b"]))
    (folder / "predictions").symlink_to(other / "predictions")
    run = read_run(folder)
    assert run.predictions == []
    assert run.notes == ["predictions/test.json is left out: it leads out of the run folder"]
    assert thumbnail(run, "mistakes/test/00.png") is None


def test_names_are_cut_and_of_one_line(folder):
    write_predictions(folder, split("test", ["a\nb\x1b[31m", "x" * 10_000]))
    names = read_run(folder).predictions[0].class_names
    assert names[0] == "a b [31m" and len(names[1]) == runfolder.NAME_LENGTH


# ---- thumbnails -----------------------------------------------------------------------------------------------------


def test_a_thumbnail_is_a_png_of_its_own(folder):
    write_predictions(folder, split("test", ["a", "b"], mistakes=1), side=200)
    written = thumbnail(read_run(folder), "mistakes/test/00.png")
    with Image.open(io.BytesIO(written)) as image:
        assert (image.format, image.size) == ("PNG", (96, 96))


def test_a_thumbnail_that_leads_out_is_not_read(folder, tmp_path):
    run, secret = read_run(folder), tmp_path / "secret.png"
    mistakes = folder / "predictions" / "mistakes"
    mistakes.mkdir(parents=True)
    for path in (secret, folder / "own.png", mistakes / "fine.png"):
        path.write_bytes(png())
    (mistakes / "link.png").symlink_to(secret)
    (mistakes / "linked").symlink_to(tmp_path)
    (mistakes / "ring.png").symlink_to(mistakes / "ring.png")
    names = [str(secret), "../../secret.png", "../own.png", "mistakes/link.png", "mistakes/linked/secret.png"]
    for name in [*names, "mistakes/ring.png", "", ".", "mistakes", "nothing.png", "a\x00.png", "x" * 5000, None]:
        assert thumbnail(run, name) is None, name
    assert thumbnail(run, "mistakes/fine.png")


def test_a_thumbnail_that_is_no_small_png_is_not_read(folder):
    run, predictions = read_run(folder), folder / "predictions"
    predictions.mkdir()
    jpeg = io.BytesIO()
    Image.new("RGB", (8, 8)).save(jpeg, "JPEG")
    wide = io.BytesIO()
    Image.new("1", (30_000, 30_000)).save(wide, "PNG")
    contents = {
        "jpeg.png": jpeg.getvalue(), "wide.png": wide.getvalue(), "half.png": png()[:1000], "empty.png": b"",
        "svg.png": b"<svg xmlns='http://www.w3.org/2000/svg'/>", "a.svg": png(), "a.json": png(),
        "large.png": png() + bytes(runfolder.THUMBNAIL_BYTES),
    }  # fmt: skip
    assert len(wide.getvalue()) < runfolder.THUMBNAIL_BYTES  # so it is its size in pixels that is minded
    for name, content in contents.items():
        (predictions / name).write_bytes(content)
        assert thumbnail(run, name) is None, name
