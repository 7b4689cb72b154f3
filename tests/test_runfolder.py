import io
import json
import os
import struct
import zlib

import pytest
from PIL import Image
from run_folders import corrupted, history, png, split, write_predictions, write_run

import runfolder
from errors import UserError
from runfolder import read_run, thumbnail
from text import NAME_LENGTH

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


def test_the_runs_own_robustness_comes_before_that_on_other_data(folder):
    write_predictions(folder, *(corrupted("robustness", name) for name in ("holiday-robustness", "robustness")))
    assert [it.name for it in read_run(folder).predictions] == ["robustness", "holiday-robustness"]


def test_predictions_of_weights_that_are_not_the_best_any_more_are_told(folder):
    """As they are if they were made while the run went on."""
    best = read_run(folder).best_epoch["epoch"]
    for epochs in (best - 1, best):
        write_predictions(folder, corrupted("robustness", f"robustness-limit{epochs}", limit=epochs, epochs=epochs))
    write_predictions(folder, corrupted("robustness"))  # does not say
    (note,) = read_run(folder).notes
    said = f"is of the weights after epoch {best - 1}, and best/ has changed since: run predict.py again"
    assert note == f"predictions/robustness-limit{best - 1}.json {said}"


def test_figures_that_are_missing_or_not_finite_are_none_and_told(folder):
    rows = history(TWO)
    del rows[0]["val_top1"], rows[1]["phase"], rows[2]["images_per_second"], rows[2]["epoch"]
    rows[1] |= {"train_loss": float("nan"), "lr": "fast", "val_loss": float("inf"), "seconds": True, "step": 10**400}
    rows[3] |= {"epoch": 0.5, "step": 10**308, "lr": 1.5e308}
    (folder / "history.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = read_run(folder)
    assert run.history[0]["val_top1"] is None
    assert run.history[2]["epoch"] == 3
    missing = ("train_loss", "lr", "val_loss", "seconds", "step")
    assert [run.history[1][key] for key in missing] == [None] * len(missing)
    assert (run.history[3]["epoch"], run.history[3]["step"], run.history[3]["lr"]) == (4, None, None)
    assert run.history[1]["phase"] == "-"
    assert run.notes == ["history.jsonl: 3 figures are missing or not finite: shown as - and as gaps"]


@pytest.mark.parametrize("before", [0, 5])
def test_half_a_line_that_a_crash_left_is_left_out(folder, before):
    lines = (folder / "history.jsonl").read_text().splitlines(keepends=True)[:before]
    (folder / "history.jsonl").write_text("".join([*lines, '{"phase": "finetune", "epo']))
    run = read_run(folder)
    assert len(run.history) == before
    assert run.notes == ["history.jsonl: its last line is incomplete and left out"]


damaged = pytest.mark.parametrize(
    "content", [b"3\n", b"[]\n", b"{\n{}\n", b"\xff\xfe\n", b"[" * 100_000 + b"\n", b"9" * 5000 + b"\n", None]
)


def damage(path, content) -> None:
    path.unlink()
    path.mkdir() if content is None else path.write_bytes(content)


@damaged
def test_a_damaged_history_is_told(folder, content):
    damage(folder / "history.jsonl", content)
    with pytest.raises(UserError, match=r"history\.jsonl is damaged"):
        read_run(folder)


@damaged
def test_a_damaged_summary_is_left_out_with_a_line(folder, content):
    damage(folder / "summary.json", content)
    run = read_run(folder)
    assert run.summary == {} and len(run.history) == 5
    (note,) = run.notes
    assert note.startswith("summary.json is left out: ") and note.isprintable()


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
    "endless": lambda text: json.dumps(json.loads(text) | {"mistakes": 101 * json.loads(text)["mistakes"][:1]}),
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


@pytest.mark.parametrize("name", ["config.yaml", "history.jsonl", "summary.json", "predictions/test.json"])
@pytest.mark.parametrize(("kind", "says"), [("link", "it leads out of the run folder"), ("pipe", "not a file")])
def test_links_that_lead_out_and_pipes_are_not_read(folder, tmp_path, name, kind, says):
    write_predictions(folder, split("test", ["a", "b"]))
    path = folder / name
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere") if kind == "link" else os.mkfifo(path)
    try:
        told = read_run(folder).notes
    except UserError as error:
        told = [str(error)]
    assert len(told) == 1 and says in told[0]


def test_names_are_cut_and_of_one_line(folder):
    write_predictions(folder, split("test", ["a\nb\x1b[31m", "x" * 10_000]))
    names = read_run(folder).predictions[0].class_names
    assert names[0] == "a b [31m" and len(names[1]) == NAME_LENGTH


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
    Image.new("1", (runfolder.THUMBNAIL_SIDE + 1, 8)).save(wide, "PNG")
    # A head that says 30,000 x 30,000 pixels, before data that do not matter.
    parts = [(b"IHDR", struct.pack(">2I5B", 30_000, 30_000, 1, 0, 0, 0, 0)), (b"IDAT", b""), (b"IEND", b"")]
    bomb = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in parts
    )
    with pytest.raises(Image.DecompressionBombError):
        Image.open(io.BytesIO(bomb))
    contents = {
        "jpeg.png": jpeg.getvalue(), "wide.png": wide.getvalue(), "bomb.png": bomb, "half.png": png()[:1000],
        "empty.png": b"", "svg.png": b"<svg xmlns='http://www.w3.org/2000/svg'/>", "a.svg": png(), "a.json": png(),
        "large.png": png() + bytes(runfolder.THUMBNAIL_BYTES),
    }  # fmt: skip
    for name, content in contents.items():
        (predictions / name).write_bytes(content)
        assert thumbnail(run, name) is None, name
