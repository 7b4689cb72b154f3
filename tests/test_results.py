"""The results table: its plan is sound, and its figures are those of the files they are made from."""

import json
import shutil
import sys

import pytest
import run_folders
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

import results

import commandline
from errors import UserError


@pytest.fixture
def project(tmp_path, monkeypatch):
    """The documents and recipes that tables are written into, as a copy, with no results yet."""
    for name in ("docs", "recipes"):
        shutil.copytree(ROOT / name, tmp_path / name)
    shutil.copy(ROOT / "README.md", tmp_path)
    monkeypatch.setattr(results, "ROOT", tmp_path)
    monkeypatch.setattr(results, "RESULTS", tmp_path / "docs" / "results")
    return tmp_path


def write(project, run, test_top1, minutes=30.0):
    """A finished run's files as `results.keep` leaves them."""
    folder = project / "docs" / "results" / run
    shutil.rmtree(folder, ignore_errors=True)
    run_folders.write_run(folder, {"head": 10, "finetune": 10})
    summary = {"test_loss": 2.0, "test_top1": test_top1, "test_top5": 0.8, "parameters": 5, "minutes": minutes}
    (folder / "summary.json").write_text(json.dumps(summary))
    run_folders.write_predictions(folder, run_folders.corrupted("robustness", mean15=0.345))
    made = {"command": "accelerate launch train.py", "date": "2026-11-25", "commits": ["abc1234"]}
    (folder / "made.json").write_text(json.dumps(made | {"peak_memory_mib": 1234, "machine": {}}))


def row(name, **values):
    return results.Row(name=name, part="reproduce", what=f"what {name} is", recipe="resnet50", **values)


def test_the_plan_is_sound():
    for it in results.read_plan(ROOT / "docs" / "results" / "plan.yaml"):
        config, _ = commandline.parse(["--config", str(results.recipe_of(it)), *it.options])
        assert config.tracking


@pytest.mark.parametrize(
    "text, said",
    [
        ("- {name: a, part: reproduce, what: it, recipe: nowhere}", "a: there is no"),
        ("- {name: a, part: reproduce, what: it, recipe: resnet50, patches: [magic]}", "a: there is no patch magic"),
        ("- {name: a, part: magic, what: it, recipe: resnet50}", "0.part: Input should be"),
        ("- {name: a, part: beat, what: it, recipe: resnet50}\n" * 2, "a is there twice"),
        ("- {name: a", "can't be read"),
    ],
)
def test_a_mistake_in_the_plan_is_named(tmp_path, text, said):
    (tmp_path / "plan.yaml").write_text(text)
    with pytest.raises(UserError, match=said):
        results.read_plan(tmp_path / "plan.yaml")


def test_tables_hold_what_the_files_say(project):
    write(project, "one-seed0", 0.5, minutes=10)
    for seed, top1 in enumerate((0.60, 0.62, 0.64)):
        write(project, f"three-seed{seed}", top1)
    results.write_tables([row("one"), row("three", seeds=[0, 1, 2]), row("missing")])
    text = (project / "docs" / "results.md").read_text()
    (one,) = (line for line in text.splitlines() if line.startswith("| what one is |"))
    (three,) = (line for line in text.splitlines() if line.startswith("| what three is |"))
    assert "| 1 | 20 |" in one and "| 50.0 |" in one and "| 34.5 |" in one and "| 10 |" in one and "| 1,234 |" in one
    assert "+10.0 in one epoch, +14.0 in five" in one
    assert "| 7, 17 |" in one  # epochs after which the history's lr falls
    assert "| 3 |" in three and "| 62.0 ± 2.0 |" in three
    assert "what missing is" not in text
    assert "abc1234" in text
    assert "| what three is | 3 |" in (project / "README.md").read_text()


def test_a_recipe_says_what_its_own_row_measured(project):
    write(project, "resnet50-seed0", 0.5432)
    results.write_tables([row("resnet50", options=["--model.weights", "WEIGHTS"])])
    (line,) = (line for line in (project / "recipes" / "resnet50.yaml").read_text().splitlines() if "Measured" in line)
    assert "one seed: test top-1 54.3 %" in line and "not ImageNet" in line


def test_no_figure_in_the_tables_was_typed_by_hand(project):
    """The committed tables are what the committed files give."""
    results.write_tables(results.read_plan(project / "docs" / "results" / "plan.yaml"))
    for path in ("README.md", "docs/results.md", *(f"recipes/{it.name}" for it in (ROOT / "recipes").glob("*.yaml"))):
        assert (project / path).read_text() == (ROOT / path).read_text(), path


def test_kept_files_name_no_place_on_this_machine():
    for path in (ROOT / "docs" / "results").rglob("*"):
        if path.is_file():
            assert str(ROOT) not in path.read_text()
            assert "/data/" not in path.read_text()


def test_what_is_kept_is_text_without_this_machines_paths(project, tmp_path):
    run = tmp_path / "runs" / "one-seed0"
    run_folders.write_run(run, {"head": 2}, data={"source": "/home/somebody/cifar100"})
    run_folders.write_predictions(run, run_folders.corrupted("robustness", source="/home/somebody/cifar100"))
    (run / "made.json").write_text("{}")
    args = results.argparse.Namespace(data="/home/somebody/cifar100", weights=None, runs=tmp_path / "runs")
    results.keep(args, run)
    kept = project / "docs" / "results" / "one-seed0"
    names = {str(path.relative_to(kept)) for path in kept.rglob("*") if path.is_file()}
    assert names == {"config.yaml", "history.jsonl", "summary.json", "made.json", "predictions/robustness.json"}
    assert "source: DATA" in (kept / "config.yaml").read_text()
    assert "somebody" not in (kept / "predictions" / "robustness.json").read_text()


def test_the_list_says_what_is_missing(command):
    result = command("benchmarks/results.py")
    assert result.returncode == 0, result.stderr
    assert len(result.stdout.splitlines()) >= 3


def test_an_unknown_row_is_named(command):
    result = command("benchmarks/results.py", "--run", "nothing")
    assert result.returncode == 2
    assert "--run: there is no row nothing" in result.stderr
