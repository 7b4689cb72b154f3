"""The results tables: their plan is sound, runs are gone on with or refused, figures are those of the kept files."""

import argparse
import json
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
import run_folders
import torch
import yaml
from conftest import ROOT
from safetensors.torch import save_file

sys.path.append(str(ROOT / "benchmarks"))

import results
import results_plan
import results_tables

import commandline
import corruptions
from errors import Interrupted, UserError

COMPARISON = results_tables.write_comparison


@pytest.fixture
def project(tmp_path, monkeypatch):
    """The documents and recipes that tables are written into, copied; no comparison, which takes seconds."""
    monkeypatch.setattr(results_tables, "write_comparison", lambda runs: None)
    for name in ("docs", "recipes"):
        shutil.copytree(ROOT / name, tmp_path / name)
    shutil.copy(ROOT / "README.md", tmp_path)
    for module in (results, results_plan, results_tables):
        monkeypatch.setattr(module, "ROOT", tmp_path)
        monkeypatch.setattr(module, "RESULTS", tmp_path / "docs" / "results")
    return tmp_path


def row(name, **values):
    return results_plan.Row(
        **({"name": name, "part": "reproduce", "what": f"what {name} is", "recipe": "resnet50"} | values)
    )


def made_of(it, run, **values):
    machine = {"device": "2 CPU cores", "machine": "x86_64", "cpu_capability": "AVX2"}
    session = {"does": "train", "commit": "abc1234", "date": "2026-11-25", "machine": machine, "peak_memory_mib": 1234}
    return {"command": shlex.join(it.runs()[run]), "precision": "no", "sessions": [session]} | values


def write(it, top1s, minutes=30.0, phases=None):
    """A row's finished runs as `results.keep` leaves them."""
    for run, test_top1 in zip(it.runs(), top1s, strict=True):
        folder = results_plan.RESULTS / run
        shutil.rmtree(folder, ignore_errors=True)
        run_folders.write_run(folder, phases or {"head": 10, "finetune": 10})
        (folder / "config.yaml").write_text(results_plan.planned(it, run).to_yaml())
        summary = {"test_loss": 2.0, "test_top1": test_top1, "test_top5": 0.8, "parameters": 5, "minutes": minutes}
        (folder / "summary.json").write_text(json.dumps(summary))
        judged = run_folders.corrupted("robustness", mean15=0.345, version=corruptions.VERSION)
        run_folders.write_predictions(folder, judged)
        (folder / "made.json").write_text(json.dumps(made_of(it, run)))
    return it


# ---- the plan -------------------------------------------------------------------------------------------------------


def test_the_plan_is_sound():
    """Each row's recipe takes its options."""
    for it in results_plan.read_plan(ROOT / "docs" / "results" / "plan.yaml"):
        config, _ = commandline.parse(["--config", str(results_plan.recipe_of(it)), *it.options])
        assert config.recipe == it.recipe


@pytest.mark.parametrize(
    "text, said",
    [
        ("beat: {rows: [{name: a, what: it, recipe: nowhere}]}", "a: there is no"),
        ("beat: {rows: [{name: a, what: it}]}", "a: recipe: Field required"),
        ("beat: {rows: [{what: it}]}", "row 1 of beat: name: Field required"),
        (
            "beat: {recipe: resnet50, rows: [{name: a, what: it, options: --seed}]}",
            "a: options: Input should be a valid",
        ),
        ("beat: {recipe: resnet50_224, rows: [{name: resnet50_224, what: it}]}", "begins with '# Measured on'"),
        ("beat: {recipe: resnet50, rows: [{name: a, what: it, patches: [magic]}]}", "a: there is no patch magic"),
        ("magic: {rows: []}", "magic.*: Input should be"),
        ("beat: {recipe: resnet50, rows: [{name: a, what: it}, {name: a, what: it}]}", "a is listed twice"),
        ("beat: {", "can't be read"),
    ],
)
def test_a_mistake_in_the_plan_is_named(tmp_path, text, said):
    (tmp_path / "plan.yaml").write_text(text)
    with pytest.raises(UserError, match=said):
        results_plan.read_plan(tmp_path / "plan.yaml")


def test_the_list_says_what_is_there(command):
    result = command("benchmarks/results.py")
    assert result.returncode == 0, result.stderr
    assert "simple_cnn-seed0" in result.stdout


@pytest.mark.parametrize(
    "options, said",
    [
        (("--run", "nothing"), "--run: there is no row nothing"),
        (("--run", "resnet50"), "--weights: resnet50 needs them"),
        (
            ("--run", "short", "--weights", "nowhere"),
            "--weights: nowhere is neither a file of weights nor a run's best/",
        ),
        (("--run", "short", "--weights", "docs"), "--weights: .*docs is neither a file of weights nor a run's best/"),
        (
            ("--run", "short", "--weights", "x" * 300),
            "--weights: x{300} is neither a file of weights nor a run's best/",
        ),
        (("--run", "deep_cnn", "resnet50", "--weights", "w"), "is there, but not .*resnet50-seed0.made.json"),
    ],
)
def test_mistakes_are_told_before_anything_is_trained(project, tmp_path, monkeypatch, options, said):
    for kept in results_plan.RESULTS.glob("*/"):
        shutil.rmtree(kept)  # nothing is done yet
    (tmp_path / "runs" / "resnet50-seed0").mkdir(parents=True)
    monkeypatch.setattr(results, "execute", lambda *_: pytest.fail("something is trained"))
    monkeypatch.setattr(sys, "argv", ["results.py", *options, "--runs", str(tmp_path / "runs")])
    with pytest.raises(UserError, match=said):
        results.main()
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["resnet50-seed0"]


def test_a_mistake_is_a_line_for_the_user(command):
    result = command("benchmarks/results.py", "--run", "nothing")
    assert (result.returncode, result.stdout) == (2, "")
    assert "error: --run: there is no row nothing in " in result.stderr


# ---- runs -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def args(tmp_path):
    weights = tmp_path / "somebody.safetensors"
    save_file({"fc.weight": torch.zeros(2, 3)}, weights)
    return argparse.Namespace(
        data="/home/somebody/data", weights=str(weights), runs=tmp_path / "runs", mixed_precision="bf16"
    )


def scripted(monkeypatch, it, *ends):
    """Commands that train nothing, but write files into the run's folder and end with an exit code."""
    said, remaining = [], list(ends)

    def execute(args, command, folder):
        said.append(command)
        code, *files = remaining.pop(0)
        for name in files:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            judged = {
                results_plan.ROBUSTNESS: run_folders.corrupted("robustness", source=args.data),
                results.TEST_VIEWS: run_folders.split(
                    "test-shifts", ["a", "b"], tta="shifts", source=args.data, precision="bf16", top1=0.777
                ),
            }
            (folder / name).write_text(json.dumps(judged.get(name, {})))
        if "config.yaml" in files:
            tree = yaml.safe_load(results_plan.planned(it, folder.name).to_yaml())
            tree["data"] |= {"source": args.data, "streaming": False}
            tree["model"] |= {"weights": tree["model"]["weights"] and args.weights}
            (folder / "config.yaml").write_text(yaml.safe_dump(tree | {"output_dir": str(args.runs)}))
        return code, 100 * len(said)

    monkeypatch.setattr(results, "execute", execute)
    return said


FILES = ("config.yaml", "history.jsonl", "summary.json")


def test_a_run_that_was_cut_short_is_resumed_judged_and_kept(project, args, monkeypatch):
    it = row("one", judged=True, options=results_plan.WEIGHTS)
    judged = [(0, results_plan.ROBUSTNESS), (0, results.TEST_VIEWS)]
    said = scripted(monkeypatch, it, (1, "checkpoints/1/state"), (0, *FILES), *judged)
    with pytest.raises(UserError, match="one-seed0: that command ended with exit code 1"):
        results.complete(it, "one-seed0", args)
    assert results_plan.state(it, "one-seed0", args.runs) == "cut short"
    results.complete(it, "one-seed0", args)
    assert [words[5:7] for words in said] == 2 * [["bf16", "train.py"]] + 2 * [["bf16", "predict.py"]]
    assert [words[8:] for words in said[2:]] == [["--robustness"], ["--tta", "shifts"]]
    assert "--resume" in said[1] and "--resume" not in said[0]
    assert results_plan.state(it, "one-seed0", args.runs) == "done"
    kept = project / "docs" / "results" / "one-seed0"
    assert {str(path.relative_to(kept)) for path in kept.rglob("*") if path.is_file()} == {
        *FILES, results_plan.ROBUSTNESS, "views.json", "made.json"
    }  # fmt: skip
    sessions = json.loads((kept / "made.json").read_text())["sessions"]
    done = [(it["does"], it["peak_memory_mib"]) for it in sessions]
    assert done == [("train", 100), ("train", 200), ("judge", 300), ("judge", 400)]
    assert all(it["commit"] and it["date"] and it["machine"]["torch"] for it in sessions)
    weights = results.tensors_digest(Path(args.weights))
    assert [it.get("weights_tensors_sha256") for it in sessions] == [weights, weights, None, None]
    config = yaml.safe_load((kept / "config.yaml").read_text())
    assert (config["data"]["source"], config["model"]["weights"], config["output_dir"]) == ("DATA", "WEIGHTS", "runs")
    assert not any("somebody" in path.read_text() for path in kept.rglob("*") if path.is_file())


def test_the_weights_of_a_run_that_is_resumed_are_those_it_was_started_with(project, args, tmp_path, monkeypatch):
    """Whatever --weights is now. From a checkpoint it goes on without them, if they are gone."""
    it, best = row("one", judged=False, options=results_plan.WEIGHTS), tmp_path / "best"
    best.mkdir()
    save_file({"its own": torch.ones(1)}, best / "model.safetensors")
    its_own = results.tensors_digest(best / "model.safetensors")
    args.weights, other = str(best), args.weights
    scripted(monkeypatch, it, (1, "config.yaml"), (1, "checkpoints/1/state"), (0, *FILES[1:]))
    with pytest.raises(UserError):
        results.complete(it, "one-seed0", args)
    args.weights = other
    with pytest.raises(UserError):
        results.complete(it, "one-seed0", args)
    shutil.rmtree(best)
    results.complete(it, "one-seed0", args)
    sessions = json.loads((results_plan.RESULTS / "one-seed0" / "made.json").read_text())["sessions"]
    assert [session.get("weights_tensors_sha256") for session in sessions] == [its_own, its_own, None]


def test_a_run_that_left_no_folder_is_started_again(project, args, monkeypatch):
    it = row("one", judged=False)
    said = scripted(monkeypatch, it, (1,), (0, *FILES))
    with pytest.raises(UserError):
        results.complete(it, "one-seed0", args)
    results.complete(it, "one-seed0", args)
    assert "--resume" not in said[1]


def test_a_row_that_has_changed_is_not_gone_on_with_and_not_in_the_tables(project, args, monkeypatch):
    before, after = row("one", judged=False), row("one", judged=False, options=["--seed", "3"])
    scripted(monkeypatch, before, (1, "checkpoints/1/state"))
    with pytest.raises(UserError):
        results.complete(before, "one-seed0", args)
    assert results_plan.state(after, "one-seed0", args.runs) == "changed"
    with pytest.raises(UserError, match="another command than the plan's"):
        results.complete(after, "one-seed0", args)
    write(before, [0.5])
    results_tables.write_tables([after], args.runs)
    assert "what one is" not in (project / "docs" / "results.md").read_text()


def test_a_recipe_that_has_changed_takes_its_figures_with_it(project, args):
    it = write(row("resnet50", options=results_plan.WEIGHTS, judged=False), [0.5])
    assert results_plan.state(it, "resnet50-seed0", args.runs) == "done"
    recipe = project / "recipes" / "resnet50.yaml"
    recipe.write_text(recipe.read_text().replace("epochs: 40", "epochs: 41"))
    assert results_plan.state(it, "resnet50-seed0", args.runs) == "changed"
    results_tables.write_tables([it], args.runs)
    assert "what resnet50 is" not in (project / "docs" / "results.md").read_text()


@pytest.mark.parametrize("files", [("config.yaml",), ("config.yaml", "history.jsonl", "summary.json")])
def test_what_was_begun_with_another_recipe_is_not_gone_on_with(project, args, monkeypatch, files):
    it = row("one", options=results_plan.WEIGHTS, judged=False)
    said = scripted(monkeypatch, it, (1, *files))
    with pytest.raises(UserError):
        results.complete(it, "one-seed0", args)
    assert results_plan.state(it, "one-seed0", args.runs) == "cut short"
    recipe = project / "recipes" / "resnet50.yaml"
    recipe.write_text(recipe.read_text().replace("epochs: 40", "epochs: 41"))
    assert results_plan.state(it, "one-seed0", args.runs) == "changed"
    with pytest.raises(UserError, match="its recipe has changed since"):
        results.complete(it, "one-seed0", args)
    assert len(said) == 1


def test_a_row_whose_robustness_is_wanted_now_is_not_done(project, args):
    it = write(row("one", judged=False), [0.5])
    assert results_plan.state(it, "one-seed0", args.runs) == "done"
    (results_plan.RESULTS / "one-seed0" / results_plan.ROBUSTNESS).unlink()
    assert results_plan.state(row("one", judged=True), "one-seed0", args.runs) == "changed"


def test_a_kept_run_is_judged_with_six_views_as_long_as_its_weights_are_there(project, args, monkeypatch):
    it = write(row("one"), [0.5])
    assert results_plan.state(it, "one-seed0", args.runs) == "done"
    made = run_folders.write_run(args.runs / "one-seed0", {"head": 1})
    (made / "config.yaml").write_text(results_plan.planned(it, "one-seed0").to_yaml())
    shutil.copy(results_plan.RESULTS / "one-seed0" / "summary.json", made)
    run_folders.write_predictions(made, run_folders.corrupted("robustness"))
    shutil.copy(results_plan.RESULTS / "one-seed0" / "made.json", results_plan.note_of(args.runs, "one-seed0"))
    assert not results_plan.lacks_views(it, "one-seed0", args.runs), "its best/ is gone"
    (made / "best").mkdir()
    assert results_plan.state(it, "one-seed0", args.runs) == "done", "it stays in the tables"
    said = scripted(monkeypatch, it, (0, results.TEST_VIEWS))
    run_all(monkeypatch, args, [it])
    assert [words[8:] for words in said] == [["--tta", "shifts"]]
    assert not results_plan.lacks_views(it, "one-seed0", args.runs)
    assert results_tables.figures(results_plan.RESULTS / "one-seed0")["views_top1"] == 0.777


def test_seeds_of_several_commits_make_no_row(project, args):
    it = write(row("one", seeds=[0, 1]), [0.5, 0.6])
    for seed in (0, 1):
        path = results_plan.RESULTS / f"one-seed{seed}" / "config.yaml"
        path.write_text(path.read_text().replace("revision: null", f"revision: '{seed}'"))
    with pytest.raises(UserError, match="one: its seeds read several commits of the data"):
        results_tables.write_tables([it], args.runs)


def test_a_change_is_not_told_from_a_baseline_in_another_precision_or_from_other_weights(project, args):
    base = write(row("base", part="explain", against="base"), [0.5])
    other = write(row("other", part="explain", against="base"), [0.6])
    made = results_plan.RESULTS / "other-seed0" / "made.json"
    made.write_text(json.dumps(made_of(other, "other-seed0", precision="bf16")))
    with pytest.raises(UserError, match="other can't be compared with base: bf16 against no"):
        results_tables.write_tables([base, other], args.runs)
    for it, digest in ((base, "a" * 64), (other, "b" * 64)):
        recorded = made_of(it, f"{it.name}-seed0")
        recorded["sessions"][0]["weights_tensors_sha256"] = digest
        (results_plan.RESULTS / f"{it.name}-seed0" / "made.json").write_text(json.dumps(recorded))
    with pytest.raises(UserError, match=r"other can't be compared with base: bbb.* against aaa"):
        results_tables.write_tables([base, other], args.runs)


def test_seeds_of_several_precisions_make_no_row(project, args):
    it = write(row("one", seeds=[0, 1]), [0.5, 0.6])
    made = results_plan.RESULTS / "one-seed1" / "made.json"
    made.write_text(json.dumps(made_of(it, "one-seed1", precision="bf16")))
    with pytest.raises(UserError, match="one: its seeds were trained in bf16 and no"):
        results_tables.write_tables([it], args.runs)


def test_a_row_without_validation_has_no_figures_of_it(project, args):
    phases = {"head": 1, "finetune": 3}
    options = ["--data.folds", "null", "--phases.train.schedule", "constant"]
    it = write(row("all", recipe="deep_cnn", options=options), [0.5], phases=phases)
    history = results_plan.RESULTS / "all-seed0" / "history.jsonl"
    rows = [json.loads(line) for line in history.read_text().splitlines()]
    nothing = {"val_loss": None, "val_top1": None, "val_top5": None}
    history.write_text("".join(json.dumps(row | nothing) + "\n" for row in rows))
    results_tables.write_tables([it], args.runs)
    (line,) = (text for text in (project / "docs" / "results.md").read_text().splitlines() if "| what all is |" in text)
    last = rows[-1]
    assert f"| 1 | 4 | {last['train_loss']:.3f} | {100 * last['train_top1']:.1f} | - | - | 2.000 | 50.0 |" in line


def test_a_folder_that_nobody_knows_is_left_alone(project, args):
    (args.runs / "one-seed0").mkdir(parents=True)
    with pytest.raises(UserError, match="which says how it was made"):
        results.complete(row("one"), "one-seed0", args)


@pytest.mark.slow
def test_a_small_row_from_its_command_to_its_table(project, parquet, tmp_path, monkeypatch):
    monkeypatch.setattr(results, "ROOT", ROOT)  # where train.py is
    args = argparse.Namespace(data=str(parquet), weights=None, runs=tmp_path / "runs", mixed_precision="no")
    options = ["--phases.train.epochs", "1", "--data.workers", "0"]
    it = row("small", recipe="demo_scratch", options=options, patches=["label_smoothing"])
    results.complete(it, "small-seed0", args)
    assert results_plan.state(it, "small-seed0", args.runs) == "done"
    results_tables.write_tables([it], args.runs)
    (line,) = (text for text in (project / "docs" / "results.md").read_text().splitlines() if "what small is |" in text)
    cells = [cell.strip() for cell in line.split("|")]
    assert cells[3] == "1" and all(0 <= float(cell.rstrip(" †")) <= 100 for cell in cells[8:11])
    assert "demo_scratch..label_smoothing" in (results_plan.RESULTS / "small-seed0" / "config.yaml").read_text()


def test_an_average_of_weights_is_started_again(project, args, monkeypatch, capsys):
    it = row("one", judged=False, patches=["ema"])
    said = scripted(monkeypatch, it, (1, "config.yaml", "checkpoints/1/state"), (0, *FILES))
    with pytest.raises(UserError):
        results.complete(it, "one-seed0", args)
    results.complete(it, "one-seed0", args)
    assert "--resume" not in said[1] and "it starts again" in capsys.readouterr().out
    assert len(json.loads((results_plan.RESULTS / "one-seed0" / "made.json").read_text())["sessions"]) == 1


def run_all(monkeypatch, args, plan, *options):
    monkeypatch.setattr(results, "read_plan", lambda path: plan)
    given = [*options, "--runs", str(args.runs), "--weights", args.weights]
    monkeypatch.setattr(sys, "argv", ["results.py", "--run", *given])
    results.main()


def test_a_row_that_fails_or_is_in_the_way_does_not_keep_the_others(project, args, monkeypatch, capsys):
    rows = [row(name, judged=False) for name in ("one", "two", "three")]
    (args.runs / "two-seed0").mkdir(parents=True)
    scripted(monkeypatch, rows[2], (1,), (0, *FILES))
    monkeypatch.setattr(results, "write_tables", lambda *_: None)
    with pytest.raises(UserError, match=r"not made, for the reasons above: one-seed0$"):
        run_all(monkeypatch, args, rows)
    assert [results_plan.state(it, f"{it.name}-seed0", args.runs) for it in rows] == ["cut short", "missing", "done"]
    assert "two-seed0 is left out: " in capsys.readouterr().err


def test_ctrl_c_stops_them_all(project, args, monkeypatch):
    def execute(*_):
        raise Interrupted("stopped", 2)

    monkeypatch.setattr(results, "execute", execute)
    with pytest.raises(Interrupted):
        run_all(monkeypatch, args, [row(name, judged=False) for name in ("one", "two")])
    assert [path.name for path in args.runs.iterdir()] == ["one-seed0.made.json"]


def test_a_new_run_is_trained_in_the_precision_of_what_it_stands_beside(project, args, monkeypatch):
    base = write(row("base", judged=False), [0.5])
    (made,) = (results_plan.RESULTS / "base-seed0").glob("made.json")
    made.write_text(json.dumps(made_of(base, "base-seed0", precision="bf16")))
    other = row("other", judged=False, against="base")
    said = scripted(monkeypatch, other, (0, *FILES))
    monkeypatch.setattr(results, "write_tables", lambda *_: None)
    run_all(monkeypatch, args, [base, other])
    assert said[0][5] == "bf16"
    shutil.rmtree(results_plan.RESULTS / "other-seed0")
    shutil.rmtree(args.runs)
    with pytest.raises(UserError, match=r"--mixed_precision fp16: other is compared .*base-seed0, in bf16"):
        run_all(monkeypatch, args, [base, other], "other", "--mixed_precision", "fp16")


def test_other_weights_are_not_compared(project, args, monkeypatch):
    base = write(row("base", judged=False, options=results_plan.WEIGHTS), [0.5])
    (made,) = (results_plan.RESULTS / "base-seed0").glob("made.json")
    recorded = made_of(base, "base-seed0")
    recorded["sessions"][0]["weights_tensors_sha256"] = "f" * 64
    made.write_text(json.dumps(recorded))
    other = row("other", judged=False, against="base", options=results_plan.WEIGHTS)
    monkeypatch.setattr(results, "execute", lambda *_: pytest.fail("something is trained"))
    with pytest.raises(
        UserError,
        match=r"other is compared .*base-seed0, from other weights, .* ffffffffffff;",
    ):
        run_all(monkeypatch, args, [base, other], "other")


def test_weights_are_known_by_their_tensors(tmp_path):
    """A file of the same tensors has other bytes each time it is written."""
    file, tensors = tmp_path / "a.safetensors", {"a": torch.ones(2, 3), "b": torch.zeros(3, dtype=torch.bfloat16)}

    def digest(tensors, metadata=None):
        save_file(tensors, file, metadata)
        return results.tensors_digest(file)

    same = digest(tensors)
    assert digest(tensors, {"written": "again"}) == digest(dict(reversed(tensors.items()))) == same
    for name, tensor in (("a", torch.ones(3, 2)), ("b", torch.ones(3, dtype=torch.bfloat16)), ("c", torch.ones(1))):
        assert digest(tensors | {name: tensor}) != same
    file.write_bytes(b"odd")
    with pytest.raises(UserError, match=r"a\.safetensors is not a safetensors file"):
        results.tensors_digest(file)


# ---- tables ---------------------------------------------------------------------------------------------------------


def test_tables_hold_what_the_files_say(project, args):
    one, three = write(row("one"), [0.5], minutes=10), write(row("three", seeds=[0, 1, 2]), [0.60, 0.62, 0.64])
    results_tables.write_tables([one, three, row("missing")], args.runs)
    text = (project / "docs" / "results.md").read_text()
    (one,) = (line for line in text.splitlines() if line.startswith("| what one is |"))
    (three,) = (line for line in text.splitlines() if line.startswith("| what three is |"))
    assert "| 1 | 20 |" in one and "| 50.0 |" in one and "| 34.5 † |" in one and "| 10 |" in one and "| 1,234 |" in one
    assert "+10.0 in one epoch, +14.0 in 5" in one
    assert "| 7, 17 |" in one  # epochs after which the history's lr falls
    assert "| 3 |" in three and "| 62.0 ± 2.0 |" in three and "+10.0 ± 0.0 in one epoch" in three
    assert "what missing is" not in text
    assert "(2 CPU cores, x86_64, AVX2; commit abc1234; 2026-11-25)" in text
    assert "| what three is | 3 |" in (project / "README.md").read_text()


@pytest.mark.parametrize("lost, said", [(2, r"--seed 0 .*`, and seeds 1 \("), (0, r"--seed 1 .*`, and seeds 2 \(")])
def test_only_seeds_that_are_done_are_named(project, args, lost, said):
    it = write(row("three", seeds=[0, 1, 2]), [0.60, 0.62, 0.64])
    shutil.rmtree(results_plan.RESULTS / f"three-seed{lost}")
    results_tables.write_tables([it], args.runs)
    text = (project / "docs" / "results.md").read_text()
    assert "| what three is | 2 |" in text and re.search(said, text)


def test_the_comparison_shows_the_main_rows_with_their_curves(project, args, monkeypatch):
    monkeypatch.setattr(results_tables, "write_comparison", COMPARISON)
    rows = [write(row("reproduce"), [0.5]), write(row("explain", part="explain", against="explain"), [0.5])]
    shutil.rmtree(project / "docs" / "curves", ignore_errors=True)
    results_tables.write_tables(rows, args.runs)
    text = (project / "docs" / "comparison.md").read_text()
    assert "| reproduce-seed0 |" in text and "explain-seed0" not in text and str(project) not in text
    curves = re.findall(r"\]\((curves/[\w-]+\.svg)\)", text)
    assert len(curves) == 5
    assert all((project / "docs" / name).read_text().startswith("<?xml") for name in curves)


def test_what_a_change_brings_is_against_the_sections_first_row(project, args):
    """And on the validation rows: a history rises by a point in each epoch of a phase."""
    base = write(row("base", part="explain", against="base"), [0.5], phases={"head": 10})
    other = write(row("other", part="explain", against="base"), [0.9], phases={"head": 7})

    def lines(*rows):
        results_tables.write_tables(rows, args.runs)
        return (project / "docs" / "results.md").read_text().splitlines()

    both = lines(base, other)
    assert any(line.startswith("| what base is | 1 | - | 39.0 |") for line in both)
    assert any(line.startswith("| what other is | 1 | -3.0 | 36.0 |") for line in both)
    assert not any("90.0" in line for line in both if "what other is" in line), "the test split decides nothing"
    shutil.rmtree(results_plan.RESULTS / "base-seed0")
    assert any(line.startswith("| what other is | 1 | - | 36.0 |") for line in lines(base, other)), "nothing to compare"


def test_what_is_compared_with_a_row_elsewhere_is_compared_seed_by_seed(project, args):
    base = write(row("base", seeds=[0, 1, 2]), [0.5, 0.5, 0.5], phases={"head": 10})
    other = write(row("other", part="confirm", against="base", seeds=[0, 1, 2]), [0.9, 0.9, 0.9], phases={"head": 7})
    shutil.rmtree(results_plan.RESULTS / "base-seed1")
    results_tables.write_tables([base, other], args.runs)
    text = (project / "docs" / "results.md").read_text()
    section = text[text.index("<!-- results: confirm -->") :]
    assert re.search(r"\| what base is \| 2 \| - \| 39.0 ± 0.0 \|", section), "it stands above, too"
    assert re.search(r"\| what other is \| 3 \| -3.0 ± 0.0 \| 36.0 ± 0.0 \|", section)


def test_robustness_is_marked_where_training_saw_one_of_the_corruptions(project, args):
    jittered = write(row("jittered"), [0.5])
    other = write(row("other", options=["--augment.policy", "augmix"]), [0.5])
    results_tables.write_tables([jittered, other], args.runs)
    lines = (project / "README.md").read_text().splitlines()
    assert any(line.startswith("| what jittered is |") and "| 34.5 † |" in line for line in lines)
    assert any(line.startswith("| what other is |") and "| 34.5 |" in line for line in lines)


def test_robustness_under_earlier_corruptions_is_marked(project, args):
    it = write(row("one", options=["--augment.policy", "augmix"], seeds=[0, 1]), [0.5, 0.5])
    earlier = run_folders.corrupted("robustness", mean15=0.145)  # names no version: the first
    run_folders.write_predictions(results_plan.RESULTS / "one-seed1", earlier)
    results_tables.write_tables([it], args.runs)
    assert "| 34.5 (1 of 2 seeds) |" in (project / "README.md").read_text(), "they can't be averaged"
    run_folders.write_predictions(results_plan.RESULTS / "one-seed0", earlier)
    results_tables.write_tables([it], args.runs)
    assert "| 14.5 ± 0.0 ‡ |" in (project / "README.md").read_text()


@pytest.mark.parametrize("on_gpu, said", [(False, "1,234"), (True, "20")])
def test_memory_is_the_gpus_own_where_there_is_one(project, args, on_gpu, said):
    it = write(row("one"), [0.5])
    history = results_plan.RESULTS / "one-seed0" / "history.jsonl"
    if on_gpu:
        rows = [json.loads(line) for line in history.read_text().splitlines()]
        rows = [row | {"peak_memory_mb": number} for number, row in enumerate(rows, start=1)]
        history.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    results_tables.write_tables([it], args.runs)
    assert f"| {said} | 2 CPU cores |" in (project / "docs" / "results.md").read_text()


def test_seeds_from_several_weights_make_no_row(project, args):
    it = write(row("one", seeds=[0, 1], options=results_plan.WEIGHTS), [0.5, 0.6])
    for seed in (0, 1):
        made = made_of(it, f"one-seed{seed}")
        made["sessions"][0]["weights_tensors_sha256"] = str(seed) * 64
        (results_plan.RESULTS / f"one-seed{seed}" / "made.json").write_text(json.dumps(made))
    with pytest.raises(UserError, match="one: its seeds started from several weights"):
        results_tables.write_tables([it], args.runs)


def test_a_recipe_says_what_its_own_row_measured(project, args):
    def measured():
        text = (project / "recipes" / "resnet50.yaml").read_text()
        (line,) = (line for line in text.splitlines() if "Measured" in line)
        return line

    own = write(row("resnet50", options=["--model.weights", "WEIGHTS"]), [0.5432])
    other = write(row("other", part="beat", options=["--phases.head.epochs", "1"]), [0.9])
    results_tables.write_tables([own, other], args.runs)
    assert "one seed: test top-1 54.3 %" in measured() and "not ImageNet" in measured()


def test_a_file_without_its_marks_is_named(project, args):
    (project / "README.md").write_text("No marks.")
    with pytest.raises(UserError, match=r"README.md: .*results: summary.* should match once, and does 0 times"):
        results_tables.write_tables([], args.runs)


def test_damage_is_told(project, args):
    it = write(row("one"), [0.5])
    (results_plan.RESULTS / "one-seed0" / "predictions" / "robustness.json").write_text("{")
    with pytest.raises(UserError, match=r"one-seed0 is damaged: predictions/robustness\.json is left out"):
        results_tables.write_tables([it], args.runs)
    write(row("one"), [0.5])
    (results_plan.RESULTS / "one-seed0" / "views.json").write_text("{")
    with pytest.raises(UserError, match=r"one-seed0.views\.json is damaged"):
        results_tables.write_tables([it], args.runs)


def test_no_figure_in_the_tables_was_typed_by_hand(project, args, monkeypatch):
    """The committed tables are what the committed files give."""
    monkeypatch.setattr(results_tables, "write_comparison", COMPARISON)
    shutil.rmtree(project / "docs" / "curves")
    results_tables.write_tables(results_plan.read_plan(project / "docs" / "results" / "plan.yaml"), args.runs)
    for path in (
        "README.md",
        "docs/results.md",
        "docs/comparison.md",
        *(f"recipes/{it.name}" for it in (ROOT / "recipes").glob("*.yaml")),
    ):
        assert (project / path).read_text() == (ROOT / path).read_text(), path
    curves = list((ROOT / "docs" / "curves").glob("*.svg"))
    assert curves
    for path in curves:  # whose bytes depend on matplotlib's version
        drawn = [
            re.findall(r'id="(run-\d+)"', root.read_text()) for root in (path, project / "docs/curves" / path.name)
        ]
        assert drawn[0] == drawn[1] != [], path


def test_kept_files_name_no_place_on_this_machine():
    kept = list((ROOT / "docs" / "results").glob("*/config.yaml"))
    assert kept
    for path in kept:
        config = yaml.safe_load(path.read_text())
        assert (config["data"]["source"], config["output_dir"]) == ("DATA", "runs")
        assert config["model"]["weights"] in (None, "WEIGHTS")


def test_the_demos_recipes_and_document_agree():
    text = (ROOT / "docs" / "results.md").read_text()
    for recipe, row in (("pretrain", "pretrain"), ("finetune", "fine-tune"), ("scratch", "from scratch")):
        (line,) = (line for line in text.splitlines() if line.startswith(f"| {row} ("))
        told = re.search(r"test top-1 ([\d.]+ %)", (ROOT / "recipes" / f"demo_{recipe}.yaml").read_text())[1]
        assert line.rstrip("| ").endswith(told), recipe
