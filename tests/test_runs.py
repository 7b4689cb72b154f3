"""The folder of a run, and what a resumed run may change."""

import dataclasses
import os
import subprocess
import sys

import pytest
import yaml
from accelerate import Accelerator
from conftest import ROOT, phase
from filelock import FileLock

import runs
import train
from commandline import parse
from errors import UserError
from recipe import check, read_yaml

THREE = {"head": phase(modules="head", epochs=2), "middle": phase(epochs=2), "last": phase(epochs=2)}


@pytest.fixture
def made(make_config):
    """A run folder with its configuration, as a run of these three phases leaves it."""
    accelerator = Accelerator(cpu=True)
    config = runs.settled(accelerator, make_config(THREE))
    with runs.opened(accelerator, config, None) as run:
        (run / "history.jsonl").write_text("{}\n")
    return run


def test_the_folder_has_its_configuration_and_is_removed_if_nothing_came_of_it(make_config, tmp_path):
    config = runs.settled(Accelerator(cpu=True), make_config())
    with runs.opened(Accelerator(cpu=True), config, None) as run:
        saved = yaml.safe_load((run / "config.yaml").read_text())
        assert (saved["environment"]["processes"], saved["data"]["streaming"]) == (1, False)
    assert run.is_dir()
    config = dataclasses.replace(config, output_dir=str(tmp_path / "elsewhere"))
    with pytest.raises(UserError, match="nothing came"), runs.opened(Accelerator(cpu=True), config, None):
        raise UserError("nothing came of it")
    assert not (tmp_path / "elsewhere").exists()
    with pytest.raises(UserError), runs.opened(Accelerator(cpu=True), config, None) as run:
        (run / "history.jsonl").write_text("{}\n")
        raise UserError("an epoch did")
    assert (run / "history.jsonl").exists()


def test_the_lock_is_released_before_its_folder_is_removed(make_config, monkeypatch):
    """On Windows a folder with an open file in it would stay, and its name could not be used again."""
    removed = []

    def remove(run, **_):
        with FileLock(run / "checkpoints" / ".lock", blocking=False, is_singleton=False):
            removed.append(run)

    monkeypatch.setattr(runs.shutil, "rmtree", remove)
    with pytest.raises(UserError, match="nothing came"), runs.opened(Accelerator(cpu=True), make_config(), None) as run:
        raise UserError("nothing came of it")
    assert removed == [run]


def test_two_runs_in_a_new_folder_of_which_one_comes_to_nothing(make_config, tmp_path):
    config = dataclasses.replace(make_config(), output_dir=str(tmp_path / "elsewhere"))
    with pytest.raises(UserError, match="nothing came"), runs.opened(Accelerator(cpu=True), config, None) as run:
        run.with_name("other").mkdir()
        raise UserError("nothing came of it")
    assert [path.name for path in (tmp_path / "elsewhere").iterdir()] == ["other"]


def test_a_second_run_of_one_name_is_refused_before_it_touches_anything(make_config, made):
    before = {path: path.stat().st_mtime_ns for path in made.parent.rglob("*")}
    with pytest.raises(UserError, match=f"{made} exists: go on with --resume {made}"):
        runs.opened(Accelerator(cpu=True), make_config(THREE), None).__enter__()
    assert before == {path: path.stat().st_mtime_ns for path in made.parent.rglob("*")}


def test_the_lock_dies_with_its_owner(make_config, made):
    path = str(made / "checkpoints" / ".lock")
    code = f"import filelock; lock = filelock.FileLock({path!r}); lock.acquire(); print(1, flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=-1, stdout=-1, text=True) as other:
        assert other.stdout.readline() == "1\n"
        with pytest.raises(UserError, match="is being trained by another process"):
            runs.opened(Accelerator(cpu=True), make_config(THREE), made).__enter__()
        other.kill()
        other.wait()
        with runs.opened(Accelerator(cpu=True), make_config(THREE), made) as run:
            assert run == made
    with FileLock(made / "checkpoints" / ".lock", blocking=False):
        pass


@pytest.mark.parametrize("place", ["file/runs", "file"])
def test_an_output_folder_that_can_not_be_made(make_config, tmp_path, place):
    (tmp_path / "file").write_text("")
    config = make_config(output_dir=str(tmp_path / place))
    with pytest.raises(UserError, match=r"output_dir: .* is not a folder"):
        runs.opened(Accelerator(cpu=True), config, None).__enter__()
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


# ---- what may change --------------------------------------------------------------------------------------------


def settle(run, begun, *argv):
    config, found = parse(["--resume", str(run), *argv])
    assert found == run
    return runs.record(runs.check_changes(Accelerator(cpu=True), config, run, begun), run)


@pytest.mark.parametrize(
    ("argv", "note"),
    [
        (["--phases.last.epochs", "9"], "phases.last.epochs changes from 2 to 9"),
        (["--phases.last.lr", "0.5"], "phases.last.lr changes from 0.001 to 0.5"),
        (["--data.workers", "2"], "data.workers changes from 0 to 2"),
        (["--cuda_graphs", "false"], "cuda_graphs changes from true to false"),
        (["--data.micro_batch_size", "8"], "data.micro_batch_size changes from null to 8"),
        (["--tracking", "wandb"], 'tracking changes from "none" to "wandb"'),
        (["--checkpoint.every_steps", "7"], "checkpoint.every_steps changes from null to 7"),
        (["--clip_norm", "1"], "clip_norm changes from null to 1.0"),
        (["--data.on_corrupt", "skip"], 'data.on_corrupt changes from "error" to "skip"'),
    ],
)
def test_what_may_change_takes_effect_with_a_line(made, argv, note, capsys):
    config = settle(made, 2, *argv)
    assert f"resumed: {note}" in capsys.readouterr().out
    saved = check(read_yaml(made / "config.yaml"), "saved")
    assert saved == dataclasses.replace(config, run_name=None)
    assert settle(made, 2) == config, "the change lasts"
    assert "resumed" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--seed", "1"], "seed was 0 and can't become 1"),
        (["--model.name", "resnet18"], 'model.name was "test_resnet" and can\'t become "resnet18"'),
        (["--data.fold", "1"], "data.fold was 0 and can't become 1"),
        (["--data.source", "embedded"], "data.source was "),
        (["--data.batch_size", "64"], "data.batch_size was 32 and can't become 64"),
        (["--data.streaming", "true"], "data.streaming was false and can't become true"),
        (["--augment.policy", "none"], 'augment.policy was "report" and can\'t become "none"'),
        (["--augment.mix", "mixup"], 'augment.mix was "none" and can\'t become "mixup"'),
        (["--augment.distort", "true"], "augment.distort was false and can't become true"),
        (["--phases.head.epochs", "9"], "phases.head.epochs was 2 and can't become 9"),
        (["--phases.middle.lr", "0.5"], "phases.middle.lr was 0.001 and can't become 0.5"),
    ],
)
def test_what_may_not_change_is_an_error_with_both_values(made, argv, said):
    before = (made / "config.yaml").read_text()
    with pytest.raises(UserError) as caught:
        settle(made, 2, *argv)
    assert said in str(caught.value)
    assert caught.value.exit_code == 2
    assert (made / "config.yaml").read_text() == before


def test_what_is_kept_of_a_stream_decides_its_order_and_so_may_not_change(make_config):
    config = make_config(THREE, data={"streaming": True})
    with runs.opened(Accelerator(cpu=True), config, None) as run:
        pass
    with pytest.raises(UserError, match=r"data.keep_mb was 2048 and can't become 0"):
        settle(run, 2, "--data.keep_mb", "0")


def test_what_was_skipped_stays_skipped(made):
    settle(made, 2, "--data.on_corrupt", "skip")
    with pytest.raises(UserError, match=r'data\.on_corrupt was "skip" and can\'t become "error"'):
        settle(made, 2, "--data.on_corrupt", "error")


@pytest.mark.parametrize(
    "argv", [["--data.micro_batch_size", "7"], ["--phases.last.modules", "layer9"]], ids=["batch", "modules"]
)
def test_a_change_that_is_refused_later_is_not_recorded(made, argv):
    """The same command without it must be able to go on."""
    before = (made / "config.yaml").read_text()
    with pytest.raises(UserError, match=argv[0].rpartition(".")[2]):
        train.train(*parse(["--resume", str(made), *argv]))
    assert (made / "config.yaml").read_text() == before


def test_the_same_recipe_given_again_is_no_change(made, make_config, tmp_path, capsys):
    """As in a job script that repeats its whole command with --resume."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(make_config(THREE, data={"micro_batch_size": "auto"}).to_yaml())
    config, _ = parse(["--config", str(recipe), "--resume", str(made)])
    runs.record(check(read_yaml(made / "config.yaml"), ""), made, micro_batch_size=16)  # as the run has settled it
    settled = runs.check_changes(Accelerator(cpu=True), config, made, 2)
    assert "resumed" not in capsys.readouterr().out
    assert settled.data.micro_batch_size == 16


def test_a_micro_batch_size_may_be_looked_for_later(made, capsys):
    """As on a smaller GPU."""
    assert settle(made, 2, "--data.micro_batch_size", "auto").data.micro_batch_size == "auto"
    assert 'data.micro_batch_size changes from null to "auto"' in capsys.readouterr().out


def test_a_resumed_run_reads_the_commit_it_has_begun_with(made):
    saved = yaml.safe_load((made / "config.yaml").read_text())
    commit, other = "a" * 40, "b" * 40
    saved["data"]["revision"] = commit
    (made / "config.yaml").write_text(yaml.safe_dump(saved, sort_keys=False))
    for named in ("null", "main", commit):  # what a branch is now does not matter
        assert settle(made, 2, "--data.revision", named).data.revision == commit
    with pytest.raises(UserError, match=f'data.revision was "{commit}" and can\'t become "{other}"'):
        settle(made, 2, "--data.revision", other)


def test_a_patched_run_is_not_gone_on_with_unpatched_and_keeps_its_name(made, make_config, tmp_path):
    saved = yaml.safe_load((made / "config.yaml").read_text())
    (made / "config.yaml").write_text(yaml.safe_dump(saved | {"recipe": "mine..ema"}, sort_keys=False))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(make_config(THREE).to_yaml())
    config, _ = parse(["--config", str(recipe), "--resume", str(made)])
    with pytest.raises(UserError, match=r"was started with benchmarks/patches.py ema, and can't .* train.py"):
        runs.check_changes(Accelerator(cpu=True), config, made, 2)
    patched = dataclasses.replace(config, recipe="other..ema")
    assert runs.check_changes(Accelerator(cpu=True), patched, made, 2).recipe == "mine..ema"


def test_phases_may_be_added_and_dropped_but_not_those_that_have_begun(made, make_config, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(make_config({"head": THREE["head"], "other": phase(epochs=5)}).to_yaml())
    config, _ = parse(["--config", str(recipe), "--resume", str(made)])
    assert list(runs.check_changes(Accelerator(cpu=True), config, made, 1).phases) == ["head", "other"]
    with pytest.raises(UserError, match="head, middle have begun, but the phases now are head"):
        recipe.write_text(make_config({"head": THREE["head"]}).to_yaml())
        (made / "config.yaml").write_text(make_config(THREE).to_yaml())
        runs.check_changes(Accelerator(cpu=True), parse(["--config", str(recipe), "--resume", str(made)])[0], made, 2)


@pytest.mark.parametrize(
    ("name", "before", "now"),
    [("processes", 2, "1"), ("mixed_precision", "bf16", "no"), ("device_type", "cuda", "cpu")],
)
def test_other_processes_precision_or_devices_are_refused(made, name, before, now):
    saved = yaml.safe_load((made / "config.yaml").read_text())
    saved["environment"][name] = before
    (made / "config.yaml").write_text(yaml.safe_dump(saved))
    with pytest.raises(UserError, match=f"was started with {name} {before}, not {now}"):
        settle(made, 1)


def test_another_version_is_said(made, capsys):
    saved = yaml.safe_load((made / "config.yaml").read_text())
    saved["environment"]["versions"]["torch"] = "1.0"
    (made / "config.yaml").write_text(yaml.safe_dump(saved))
    settle(made, 1)
    assert "not 1.0: the rest of the run may differ" in capsys.readouterr().out


# ---- which run --resume means -----------------------------------------------------------------------------------


def test_resume_finds_the_named_run_and_the_recipes_newest(tmp_path, monkeypatch):
    for age, (name, recipe) in enumerate([("new", "demo_scratch"), ("old", "demo_scratch"), ("other", "deep_cnn")]):
        config, _ = parse(["--config", str(ROOT / "recipes" / f"{recipe}.yaml"), "--output_dir", str(tmp_path)])
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text(config.to_yaml())
        os.utime(tmp_path / name / "config.yaml", (1e9 - age, 1e9 - age))
    recipe = ["--config", str(ROOT / "recipes" / "demo_scratch.yaml"), "--output_dir", str(tmp_path)]
    assert parse([*recipe, "--resume"])[1] == tmp_path / "new"
    (tmp_path / "old" / "checkpoints" / "00001-000000009").mkdir(parents=True)
    assert parse([*recipe, "--resume"])[1] == tmp_path / "old", "the other was stopped before its first step"
    (tmp_path / "old" / "summary.json").write_text("{}")
    assert parse([*recipe, "--resume"])[1] == tmp_path / "new", "the other is finished"
    (tmp_path / "old" / "summary.json").unlink()
    assert parse([*recipe, "--run_name", "old", "--resume"])[1] == tmp_path / "old"
    config, run = parse(
        ["--resume", "--run_name", "other", "--output_dir", str(tmp_path), "--phases.train.epochs", "3"]
    )
    assert (run, config.recipe, config.phases["train"].epochs) == (tmp_path / "other", "deep_cnn", 3)
    assert parse(["--resume", str(tmp_path / "old")])[1] == tmp_path / "old"
    for name, text in (("cut", "model: {name"), ("list", "- 1"), ("binary", "\x00")):  # younger ones
        (tmp_path / name / "checkpoints" / "00001-000000009").mkdir(parents=True)
        (tmp_path / name / "config.yaml").write_text(text)
    assert parse([*recipe, "--resume"])[1] == tmp_path / "old", "what is damaged is no run of the recipe"
    for argv, said in (
        (["--resume", "--output_dir", str(tmp_path)], "holds no run of the recipe resnet50"),
        (["--resume", "--run_name", "x", "--output_dir", str(tmp_path)], "x is not a run folder"),
        (["--resume", str(tmp_path / "old"), "--run_name", "new"], "not both"),
    ):
        with pytest.raises(UserError, match=said):
            parse(argv)
