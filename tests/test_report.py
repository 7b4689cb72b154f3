import json
import os

import pytest
import yaml
from run_folders import corrupted, history, split, write_predictions, write_run

import report
from errors import UserError

TWO = {"head": 2, "finetune": 3}


@pytest.fixture
def make_run(tmp_path):
    def make(name="run", epochs=(("head", 0.2), ("head", 0.3), ("finetune", 0.5)), finished=True):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.yaml").write_text(yaml.safe_dump({"model": {"name": "resnet50"}}))
        rows = [
            {"phase": phase, "epoch": i, "lr": 0.001, "train_loss": 1.0, "train_top1": 0.1, "train_top5": 0.5,
             "val_loss": 2.0, "val_top1": top1, "val_top5": 0.75, "seconds": 60.0, "images_per_second": 123.4}
            for i, (phase, top1) in enumerate(epochs, start=1)
        ]  # fmt: skip
        (folder / "history.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        if finished:
            (folder / "summary.json").write_text(json.dumps({"test_top1": 0.45, "test_top5": 0.7}))
        return folder

    return make


def cells(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("| ")]


# ---- tables ---------------------------------------------------------------------------------------------------------


def test_the_tables_have_the_runs_figures(make_run):
    run = report.read_run(make_run())
    table = report.epochs_table(run).splitlines()
    assert len(table) == 2 + 3
    assert [cell.strip() for cell in table[4].split("|")[1:4]] == ["finetune", "3", "1.0e-03"]
    assert [cell.strip() for cell in report.comparison_table([run]).splitlines()[2].split("|")[1:-1]] == [
        "run", "resnet50", "head 2 + finetune 1", "3", "50.0%", "45.0%", "70.0%", "3.0"]  # fmt: skip
    assert report.phase_changes(run) == [
        "run: head -> finetune: validation top-1 30.0% -> 50.0% in one epoch (+20.0 points)"
    ]


def test_a_running_run_and_one_without_an_epoch(make_run, command):
    result = command("report.py", str(make_run("a", finished=False)), str(make_run("b", epochs=())))
    assert result.returncode == 0, result.stderr
    assert "no epoch finished yet" in result.stdout
    assert "| - " in result.stdout


def test_a_jump_within_noise_is_said_so(tmp_path):
    run = write_run(tmp_path / "run", TWO, history(TWO, jump=0.001))
    (sentence,) = report.phase_changes(report.read_run(run))
    assert "31.0% -> 31.1% in one epoch (+0.1 points), 33.1% after 3 (+2.1 points): within noise over one" in sentence


def test_markdown_has_the_comparison_the_changes_and_how_runs_were_made(tmp_path, command):
    a = write_run(tmp_path / "a", TWO)
    b = write_run(tmp_path / "b", {"train": 3}, history({"train": 3}), seed=7)
    write_predictions(a, corrupted("robustness"))
    result = command("report.py", str(a), str(b), "--markdown")
    assert result.returncode == 0 and not result.stderr
    rows = cells(result.stdout)
    assert rows[0][:3] == ["run", "model", "parameters"]
    assert dict(zip(rows[0], rows[1], strict=True))["robustness mean"] == "25.1% (own corruptions)"
    assert ["seed", "0", "7"] in rows
    assert "- a: head -> finetune: validation top-1 31.0% -> 41.0%" in result.stdout
    assert f"accelerate launch --mixed_precision bf16 train.py --config {a}/config.yaml\n" in result.stdout


# ---- names ----------------------------------------------------------------------------------------------------------


def test_a_name_can_not_break_the_table(make_run):
    run = report.read_run(make_run("a|b"))
    assert "a\\|b" in report.comparison_table([run])


def test_names_are_shown_and_never_obeyed(make_run):
    run = report.read_run(make_run("<script>x", epochs=(("<b>|\n", 0.1), ("[a](b)\x1b[31m\u202e", 0.2))))
    run.config["model"]["name"] = "<img src=x>"
    shown = "\n".join([report.comparison_table([run]), report.epochs_table(run), *report.phase_changes(run)])
    assert not set("<>\x1b\u202e") & set(shown.replace(" -> ", ""))
    assert "&lt;script&gt;x" in shown and "&lt;b&gt;\\|" in shown
    assert "\\[a](b) " in shown
    assert len(report.epochs_table(run).splitlines()) == 4


def test_runs_of_one_name_are_called_by_their_paths(make_run, tmp_path):
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    runs = report.read_runs([make_run("a/run"), make_run("b/run"), make_run("other")])
    assert [run.name[-5:] for run in runs] == ["a/run", "b/run", "other"]
    with pytest.raises(UserError, match="named twice"):
        report.read_runs([tmp_path / "other", tmp_path / "a" / ".." / "other"])


def test_a_run_in_the_current_folder_has_its_name(make_run, monkeypatch):
    monkeypatch.chdir(make_run("here"))
    assert report.read_run(report.Path(".")).name == "here"


# ---- what is wrong --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["", "a: [", "3", "model: x", "\x00"])
def test_a_damaged_config_is_told(make_run, text):
    folder = make_run()
    (folder / "config.yaml").write_text(text)
    with pytest.raises(UserError, match="is not a run folder: it has no readable"):
        report.read_run(folder)


def test_what_is_no_run_folder_is_told(tmp_path, make_run, command):
    with pytest.raises(UserError, match="is not a run folder"):
        report.read_run(tmp_path / "nothing")
    damaged = make_run()
    (damaged / "history.jsonl").write_text('{"epoch": 1')
    result = command("report.py", str(damaged))
    assert result.returncode == 1
    assert result.stderr.startswith("error: ")
    assert "damaged" in result.stderr


def test_it_never_imports_training_code(command, tmp_path):
    """With a page to draw, that is with everything it can import."""
    run, page = write_run(tmp_path / "run", TWO), tmp_path / "page.html"
    write_predictions(run, split("test", ["a", "b"]))
    result = command("-X", "importtime", "report.py", str(run), "--output", str(page))
    assert result.returncode == 0 and page.exists()
    modules = {line.rpartition("|")[2].strip() for line in result.stderr.splitlines() if line.startswith("import time")}
    assert {"jinja2", "matplotlib", "plots"} <= modules
    assert not modules & {"torch", "accelerate", "timm", "datasets", "train", "engine", "checkpoint", "data", "models"}


# ---- what it writes -------------------------------------------------------------------------------------------------


def test_a_page_is_written_whole_into_a_new_folder_and_replaces_the_last_one(tmp_path, command):
    run, page = write_run(tmp_path / "run", TWO), tmp_path / "new" / "folder" / "page.html"
    for _ in range(2):
        result = command("report.py", str(run), "--output", str(page))
        assert (result.returncode, result.stdout) == (0, f"page: {page}\n"), result.stderr
        text = page.read_text(encoding="utf-8")
        assert text.startswith("<!doctype html>") and text.endswith("</html>")
    assert os.listdir(page.parent) == ["page.html"]
    assert os.stat(page).st_mode & 0o777 == 0o666 & ~_umask()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_a_page_that_fails_leaves_the_last_one_as_it_was(tmp_path, monkeypatch):
    import page

    path = tmp_path / "page.html"
    path.write_text("the last one")
    monkeypatch.setattr(page, "LIMIT", 100)
    with pytest.raises(UserError, match="name fewer runs"):
        report.write_page([report.read_run(write_run(tmp_path / "run", TWO))], path)
    assert path.read_text() == "the last one"
    assert sorted(os.listdir(tmp_path)) == ["page.html", "run"]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--output", "{}/run/history.jsonl"], "should end in .html"),
        (["--output", "{}/folder.html"], "is a folder"),
        (["--output", "{}/file/page.html"], "can't be written"),
        (["--output", "/proc/page.html"], "can't be written"),
        (["--output", "{}/" + 300 * "x" + ".html"], "can't be written"),
        (["--plots", "{}/file"], "is no folder"),
        (["--plots", "{}/file/plots"], "can't be written"),
    ],
)
def test_where_nothing_can_be_written_is_told(tmp_path, command, options, says):
    run = write_run(tmp_path / "run", TWO)
    before = (run / "history.jsonl").read_text()
    (tmp_path / "folder.html").mkdir()
    (tmp_path / "file").write_text("mine")
    result = command("report.py", str(run), *(option.replace("{}", str(tmp_path)) for option in options))
    assert result.returncode == 2
    assert result.stderr.startswith("error: --") and says in result.stderr and result.stderr.count("\n") == 1
    assert (run / "history.jsonl").read_text() == before and (tmp_path / "file").read_text() == "mine"
    assert sorted(os.listdir(tmp_path)) == ["file", "folder.html", "run"]


def test_plots_are_written_as_png_and_svg(tmp_path, command):
    (tmp_path / "other").mkdir()
    runs = [write_run(tmp_path / "a b", TWO), write_run(tmp_path / "other" / "a-b", TWO)]
    for run in runs:
        write_predictions(run, split("test", ["a", "b"]), corrupted("robustness"))
    result = command("report.py", *map(str, runs), "--plots", str(tmp_path / "plots"))
    assert result.returncode == 0, result.stderr
    curves = {"validation-accuracy", "validation-loss", "training-accuracy", "training-loss", "learning-rate"}
    each = {"test-confusion", "test-superclasses", "test-reliability", "robustness-heat-map"}
    names = curves | {f"a-b-{name}" for name in each} | {f"a-b-{name}-2" for name in each}
    assert set(os.listdir(tmp_path / "plots")) == {f"{name}.{form}" for name in names for form in ("png", "svg")}
    assert result.stdout == f"plots: 13 figures in {tmp_path / 'plots'}\n"
    assert (tmp_path / "plots" / "learning-rate.png").read_bytes().startswith(b"\x89PNG")
