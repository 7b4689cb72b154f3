import json

import pytest
import yaml

import report
from errors import UserError


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


def test_a_name_can_not_break_the_table(make_run):
    run = report.read_run(make_run("a|b"))
    assert "a\\|b" in report.comparison_table([run])


def test_names_are_shown_and_never_obeyed(make_run):
    run = report.read_run(make_run("<script>x", epochs=(("<b>|\n", 0.1), ("[a](b)\x1b[31m", 0.2))))
    run.config["model"]["name"] = "<img src=x>"
    shown = "\n".join([report.comparison_table([run]), report.epochs_table(run), *report.phase_changes(run)])
    assert not set("<>\x1b") & set(shown.replace(" -> ", ""))
    assert "&lt;script&gt;x" in shown and "&lt;b&gt;\\|" in shown
    assert "\\[a](b) " in shown
    assert len(report.epochs_table(run).splitlines()) == 4


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


def test_it_never_imports_training_code(command):
    result = command("-X", "importtime", "report.py", "--help")
    assert " torch" not in result.stderr
    assert " train" not in result.stderr
