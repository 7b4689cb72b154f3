"""Whole runs through train.train, on a tiny model, and the command as a user types it."""

import gzip
import json

import datasets
import numpy as np
import pytest
import timm
import torch
import yaml
from conftest import ROOT, forget_accelerate, phase
from safetensors.torch import load_file

import augment
import comparison
import train
from errors import UserError
from phases import RunState
from runfolder import read_run

ROW = {"phase", "epoch", "lr", "train_loss", "train_top1", "train_top5", "val_loss", "val_top1", "val_top5", "seconds",
       "seconds_left", "images_per_second"}  # fmt: skip
TIMINGS = ("seconds", "seconds_left", "images_per_second")


def history(run):
    return [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]


def untimed(run):
    return [{key: value for key, value in row.items() if key not in TIMINGS} for row in history(run)]


def test_a_run_leaves_behind_what_it_promises(make_config, capsys):
    run = train.train(make_config())
    assert sorted(path.name for path in run.iterdir()) == [
        "best", "checkpoints", "config.yaml", "history.jsonl", "summary.json"]  # fmt: skip
    rows = history(run)
    assert [(row["phase"], row["epoch"]) for row in rows] == [("head", 1), ("finetune", 2)]
    for row in rows:
        assert set(row) >= ROW
        assert all(0 <= row[key] <= 1 for key in row if "top" in key)
        assert row["images_per_second"] > 0
    summary = json.loads((run / "summary.json").read_text())
    assert set(summary) >= {
        "best_epoch",
        "best_val_top1",
        "test_top1",
        "test_top5",
        "test_loss",
        "minutes",
        "parameters",
    }
    assert summary["best_val_top1"] == max(row["val_top1"] for row in rows)
    saved = yaml.safe_load((run / "config.yaml").read_text())
    assert saved["environment"]["mixed_precision"] == "no"
    out = capsys.readouterr().out
    assert "phase head: trains head (" in out
    assert out.count("epoch   ") == 2


def test_any_number_of_phases_and_each_goes_on_from_the_last_weights(make_config, monkeypatch):
    """The first epoch of each phase is made its best: the next phase must start from the last one all the same."""
    starts, figures = [], iter([0.9, 0.1, 0.8, 0.1, 0.7, 0.1])
    original = train.make_optimizer

    def spy(phase, model):
        starts.append({key: value.clone() for key, value in model.state_dict().items()})
        return original(phase, model)

    monkeypatch.setattr(train, "make_optimizer", spy)
    monkeypatch.setattr(train, "validate", lambda *_: {"loss": 1.0, "top1": next(figures, 0.0), "top5": 1.0})
    phases = {
        name: phase(modules=modules, epochs=2) for name, modules in (("a", "head"), ("b", "all"), ("c", "layer4"))
    }
    run = train.train(make_config(phases, checkpoint={"keep": 9}))
    assert [row["phase"] for row in history(run)] == ["a", "a", "b", "b", "c", "c"]
    for start, last in zip(starts[1:], ("00002", "00004"), strict=True):
        saved = load_file(next(run.glob(f"checkpoints/{last}-*")) / "model.safetensors")
        assert all(torch.equal(start[key], value) for key, value in saved.items())


def test_early_stopping_ends_the_phase_and_the_next_begins(make_config, monkeypatch, capsys):
    figures = iter([0.5, 0.5, 0.4, 0.1, 0.2, 0.2, 0.2, 0.0])

    def scripted(*_):
        return {"loss": 1.0, "top1": next(figures), "top5": 1.0}

    monkeypatch.setattr(train, "validate", scripted)
    phases = {"head": phase(modules="head", epochs=9, early_stopping=2), "finetune": phase(epochs=9, early_stopping=2)}
    run = train.train(make_config(phases))
    rows = history(run)
    assert [row["phase"] for row in rows] == ["head"] * 3 + ["finetune"] * 4
    assert rows[0]["seconds_left"] == pytest.approx(8 * rows[0]["seconds"]), "those of the phase, if it is not stopped"
    assert rows[2]["seconds_left"] == 0
    assert json.loads((run / "summary.json").read_text())["best_epoch"] == 1, "the best weights span the run"
    assert "phase head ended early: 2 epochs without gain" in capsys.readouterr().out


def test_plateau_lowers_the_rate_in_a_real_run(make_config, monkeypatch):
    monkeypatch.setattr(train, "validate", lambda *_: {"loss": 1.0, "top1": 0.5, "top5": 1.0})
    run = train.train(make_config({"only": phase(modules="head", epochs=9, lr=1.0, schedule="plateau")}))
    assert [row["lr"] for row in history(run)] == [1.0] * 7 + [pytest.approx(0.1)] * 2


def test_the_best_weights_are_those_that_are_tested(make_config, monkeypatch):
    """Epoch 1 is made the best: the test figures must be of its weights, and so must the logits of best/ in timm."""
    real, figures = train.validate, iter([0.9, 0.1])
    tested = {}

    def scripted(accelerator, model, *rest):
        top1 = next(figures, None)
        if top1 is None:
            tested.update({key: value.clone() for key, value in model.state_dict().items()})
            return real(accelerator, model, *rest)
        return {"loss": 1.0, "top1": top1, "top5": 1.0}

    monkeypatch.setattr(train, "validate", scripted)
    run = train.train(make_config({"only": phase(epochs=2, lr=0.01)}))
    best = load_file(run / "best" / "model.safetensors")
    assert tested.keys() == best.keys() and all(torch.equal(best[key], value) for key, value in tested.items())
    newest = sorted((run / "checkpoints").iterdir())[-1]
    assert not torch.equal(best["fc.weight"], load_file(newest / "model.safetensors")["fc.weight"])
    images = torch.randn(2, 3, 32, 32)
    loaded = timm.create_model(f"local-dir:{run / 'best'}", pretrained=True).eval()
    again = timm.create_model("test_resnet", num_classes=100)
    again.load_state_dict(best)
    with torch.no_grad():
        torch.testing.assert_close(loaded(images), again.eval()(images), rtol=0, atol=0)


def test_training_sees_augmented_images_and_validation_and_test_do_not(make_config, monkeypatch):
    seen = {}
    real_train, real_validate = train.train_epoch, train.validate

    def spy_train(accelerator, model, loader, transform, *rest):
        seen["train"], (*_, clip_norm, mix) = transform, rest
        seen["more"] = clip_norm, mix
        return real_train(accelerator, model, loader, transform, *rest)

    def spy_validate(accelerator, model, loader, transform, *rest):
        seen.setdefault("evaluate", []).append(transform)
        return real_validate(accelerator, model, loader, transform, *rest)

    monkeypatch.setattr(train, "train_epoch", spy_train)
    monkeypatch.setattr(train, "validate", spy_validate)
    train.train(make_config({"only": phase()}, augment={"mix": "cutmix"}, clip_norm=1.5))
    assert seen["more"] == (1.5, augment.cutmix)
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    assert len(seen["evaluate"]) == 2
    plain = seen["evaluate"][0](images)
    assert torch.equal(plain, seen["evaluate"][1](images))
    assert not torch.equal(seen["train"](images), plain)
    for name in ("mean", "std"):
        assert torch.equal(getattr(seen["train"], name), getattr(seen["evaluate"][0], name))


def test_the_normalisation_of_a_run_is_its_weights_and_is_handed_on(make_config):
    first = train.train(make_config({"only": phase()}))
    cfg = json.loads((first / "best" / "config.json").read_text())["pretrained_cfg"]
    cfg_path = first / "best" / "config.json"
    changed = json.loads(cfg_path.read_text())
    changed["pretrained_cfg"]["mean"] = [0.11, 0.22, 0.33]
    cfg_path.write_text(json.dumps(changed))
    second = train.train(make_config({"only": phase()}, model={"weights": str(first / "best")}, run_name="second"))
    handed_on = json.loads((second / "best" / "config.json").read_text())["pretrained_cfg"]
    assert handed_on["mean"] == [0.11, 0.22, 0.33]
    assert handed_on["std"] == cfg["std"]


def test_freed_memory_goes_back_where_a_batch_is_split(make_config, monkeypatch):
    tuned = []
    monkeypatch.setattr(train.launch, "tune_allocator", tuned.append)
    for micro_batch_size, times in ((None, 1), (8, 1)):
        data = {"micro_batch_size": micro_batch_size}
        train.train(make_config({"only": phase()}, data=data, run_name=f"run{micro_batch_size}"))
        assert len(tuned) == times


def test_a_micro_batch_that_is_tried_out_leaves_the_rest_of_the_configuration_as_recorded(make_config):
    run = train.train(make_config({"only": phase()}, data={"micro_batch_size": "auto"}))
    saved = yaml.safe_load((run / "config.yaml").read_text())
    assert saved["environment"]["mixed_precision"] == "no"
    assert (saved["data"]["micro_batch_size"], saved["data"]["streaming"]) == (32, False)


def test_the_same_seed_gives_the_same_run_and_another_one_does_not(make_config):
    runs = [train.train(make_config(run_name=name, seed=seed)) for name, seed in (("a", 0), ("b", 0), ("c", 1))]
    assert untimed(runs[0]) == untimed(runs[1])
    assert untimed(runs[0]) != untimed(runs[2])


def test_without_a_test_split_the_figures_are_null(make_config):
    run = train.train(make_config({"only": phase()}, data={"test_split": None}))
    assert json.loads((run / "summary.json").read_text())["test_top1"] is None


@pytest.mark.parametrize("streaming", [False, True])
def test_without_folds_all_rows_are_trained_on_and_the_last_weights_are_kept(make_config, capsys, streaming):
    phases = {"only": phase(epochs=2)}
    with_folds, run = (
        train.train(make_config(phases, run_name=f"folds-{folds}", data={"folds": folds, "streaming": streaming}))
        for folds in (2, None)
    )
    rows, fewer = history(run), history(with_folds)
    assert rows[-1]["step"] > 1.5 * fewer[-1]["step"]
    assert [row[f"val_{name}"] for row in rows for name in ("loss", "top1", "top5")] == [None] * 6
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["best_epoch"], summary["best_val_top1"]) == (2, None)
    assert summary["test_top1"] is not None
    newest = max((run / "checkpoints").glob("*/model.safetensors"), key=lambda path: path.stat().st_mtime)
    last, best = load_file(newest), load_file(run / "best" / "model.safetensors")
    assert all(torch.equal(last[name], best[name]) for name in best)
    out = capsys.readouterr().out
    assert "(no validation)" in out
    assert "no validation: the weights are the last epoch's" in out
    assert not read_run(run).notes
    shown = comparison.comparison([read_run(run)])
    assert dict(zip(shown.head, shown.rows[0], strict=True)).items() >= {"best epoch": "2", "val top-1": "-"}.items()
    assert "those of epoch 2, the last; no rows were held out." in (run / "best" / "README.md").read_text()


def test_images_of_another_size_and_upscaling(make_config):
    run = train.train(make_config({"only": phase(modules="head")}, model={"name": "test_vit"}, data={"image_size": 64}))
    cfg = json.loads((run / "best" / "config.json").read_text())
    assert cfg["pretrained_cfg"]["input_size"] == [3, 64, 64]
    loaded = timm.create_model(f"local-dir:{run / 'best'}", pretrained=True)
    assert loaded(torch.zeros(1, 3, 64, 64)).shape == (1, 100)


def refused(config, message, resume=None):
    with pytest.raises(UserError, match=message) as caught:
        train.train(config, resume=resume)
    return caught.value


def test_a_second_run_of_one_name_is_refused(make_config):
    run = train.train(make_config({"only": phase()}))
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    refused(make_config({"only": phase()}), "exists: go on with --resume")
    refused(make_config({"only": phase()}), "is finished", resume=run)
    assert before == {path: path.stat().st_mtime_ns for path in run.rglob("*")}


def test_a_misspelt_module_is_told_before_anything_is_trained(make_config, tmp_path):
    refused(make_config({"a": phase(modules="head"), "b": phase(modules="layer9")}), "no 'layer9' to train")
    assert not (tmp_path / "runs").exists()


def test_fewer_rows_than_a_batch(make_config, monkeypatch):
    monkeypatch.setattr(train.models, "create", lambda *_: pytest.fail("told too late: a model is being made"))
    refused(make_config(data={"batch_size": 4096}), "rows are fewer than data.batch_size 4096")


def test_a_diverging_loss_is_told_with_phase_and_step(make_config):
    error = refused(make_config({"only": phase(lr=1e30)}), "the loss is not finite in phase only, epoch 1, step 2: ")
    assert "Try again with --clip_norm 1 or a lower lr" in str(error)


def test_weights_that_an_epochs_last_update_ruined_are_not_kept_where_nothing_is_validated(make_config):
    data = {"folds": None, "batch_size": 400}  # one step an epoch
    config = make_config({"only": phase(optimizer="sgd", lr=1e38, weight_decay=1e9, epochs=2)}, data=data)
    refused(config, "weights are no longer finite in phase only, epoch 1, and are not kept. Try .* a lower lr")


def test_weights_that_an_update_ruined_are_in_no_checkpoint(make_config, tmp_path):
    """The loss of the step before was finite; a run resumed there would fail again and again."""
    diverging = phase(optimizer="sgd", lr=1e38, weight_decay=1e9)
    config = make_config({"first": phase(), "only": diverging}, checkpoint={"every_steps": 1, "keep": 100})
    refused(config, "weights are no longer finite in phase only, epoch 2")
    steps = {int(path.name.split("-")[1]) for path in (tmp_path / "runs" / "run" / "checkpoints").glob("0*")}
    assert steps == set(range(1, 10)), "of the first phase alone"


def test_a_label_that_is_no_class_is_told_late_in_a_stream_and_what_was_trained_is_kept(make_config, parquet, tmp_path):
    rows = datasets.load_dataset("parquet", data_files=str(parquet / "train-*"))["train"]
    folder = tmp_path / "bad"
    folder.mkdir()
    rows.to_parquet(folder / "train.parquet")
    late = rows.map(lambda row, number: {"fine_label": -1 if number else row["fine_label"]}, with_indices=True)
    late.to_parquet(folder / "test.parquet")  # the first row is looked at before training
    config = make_config({"only": phase()}, data={"source": str(folder), "streaming": True})
    refused(config, "column 'fine_label' holds -1 in split 'test', which is none of the 100 classes")
    assert (tmp_path / "runs" / "run" / "best" / "model.safetensors").exists()


def test_state_is_plain_json():
    assert RunState(**json.loads(json.dumps(RunState().state_dict()))) == RunState()


def test_the_command_as_a_user_types_it(command, parquet, tmp_path):
    result = command(
        "-m", "accelerate.commands.launch", "--config_file", "accelerate_config.yaml", "--mixed_precision", "bf16",
        "train.py", "--config", "recipes/simple_cnn.yaml", "--data.source", str(parquet), "--phases.train.epochs", "1",
        "--output_dir", str(tmp_path),
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-2000:]
    (run,) = tmp_path.iterdir()
    assert run.name.startswith("simple_cnn-2")
    saved = yaml.safe_load((run / "config.yaml").read_text())
    assert saved["environment"]["mixed_precision"] == "bf16"
    assert list((run / "wandb").glob("offline-run-*/*.wandb"))
    assert np.isfinite(history(run)[0]["val_loss"])


def test_a_users_mistake_is_one_line_and_exit_code_2(command, tmp_path):
    result = command("train.py", "--data.source", str(tmp_path / "nothing"))
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == f"error: data.source: there is no file or folder {tmp_path / 'nothing'}\n"


def test_decoding_in_each_epoch_trains_the_same(make_config, parquet, tmp_path, monkeypatch):
    """`data.keep_mb` is about speed alone: the weights are the same, bit for bit, also where images are skipped."""
    rows = datasets.load_dataset("parquet", data_files=str(parquet / "train-*"))["train"]
    rows = rows.cast_column("img", datasets.Image(decode=False)).to_list()
    rows[3]["img"]["bytes"] = b"no image"
    (tmp_path / "data").mkdir()
    features = datasets.load_dataset("parquet", data_files=str(parquet / "train-*"))["train"].features
    datasets.Dataset.from_list(rows, features=features).to_parquet(tmp_path / "data" / "train.parquet")
    values = {"source": str(tmp_path / "data"), "test_split": None, "on_corrupt": "skip"}
    real, keeping = train.loading.keep_decoded, []

    def spy(*args):
        keeping.append(real(*args))
        return keeping[-1]

    monkeypatch.setattr(train.loading, "keep_decoded", spy)
    kept = train.train(make_config(run_name="kept", data=values))
    decoded = train.train(make_config(run_name="decoded", data=values | {"keep_mb": 0}))
    assert [isinstance(source.train, train.loading.DecodedImages) for source in keeping] == [True, False]
    assert any("train_corrupt" in row for row in history(kept)), "it was trained on, in one epoch at least"
    assert untimed(kept) == untimed(decoded)
    one, other = (load_file(run / "best" / "model.safetensors") for run in (kept, decoded))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_folding_changes_no_figure_beyond_rounding(make_config, monkeypatch):
    fold, counts = train.folding.fold, []
    monkeypatch.setattr(train.folding, "fold", lambda *given: counts.append(fold(*given)) or counts[-1])
    folded = train.train(make_config(run_name="folded"))
    in_head_phase, in_finetune_phase, in_test = counts
    assert in_head_phase == in_test > in_finetune_phase > 0
    monkeypatch.setattr(train.folding, "fold", lambda *_: 0)
    plain = train.train(make_config(run_name="plain"))
    for one, other in zip(history(folded), history(plain), strict=True):
        assert one["train_loss"] == pytest.approx(other["train_loss"], rel=1e-3)
        assert one["val_loss"] == pytest.approx(other["val_loss"], rel=1e-2)
    one, other = (json.loads((run / "summary.json").read_text()) for run in (folded, plain))
    assert one["test_loss"] == pytest.approx(other["test_loss"], rel=1e-2)


def test_the_fast_path_keeps_the_loss_curve_within_the_noise_of_seeds(make_config, monkeypatch):
    """All that is there for speed, bf16 included, beside the loop without any of it."""
    phases = {"head": phase(modules="head", epochs=2), "finetune": phase(modules=["layer4", "head"], epochs=2)}

    def losses(name, **data):
        forget_accelerate()  # and so read the precision anew
        configs = [make_config(phases, seed=seed, run_name=f"{name}-{seed}", data=data) for seed in range(3)]
        return np.array([[row["train_loss"] for row in history(train.train(config))] for config in configs])

    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    fast = losses("fast")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.setattr(train.folding, "fold", lambda *_: 0)
    monkeypatch.setattr(train.launch, "suited", lambda model, device: model)  # its small maps are products else
    monkeypatch.setattr(torch, "channels_last", torch.contiguous_format)
    plain = losses("plain", keep_mb=0)
    assert not np.array_equal(fast, plain)
    assert (np.abs(fast - plain) < plain.std(axis=0)).all(), "seed by seed, and epoch by epoch"


def test_an_epoch_too_short_to_be_traced_is_told(make_config, capsys):
    run = train.train(make_config({"only": phase()}, profile=2, data={"batch_size": 150}))
    assert not list((run / "profile").iterdir())
    assert "profile: none, as an epoch has no more than the 3 steps that warm up" in capsys.readouterr().out


def test_profile_writes_a_trace_of_each_phase(make_config, capsys):
    run = train.train(make_config(profile=2))
    assert f"profile: {run}/profile/head.json.gz" in capsys.readouterr().out
    traces = sorted((run / "profile").iterdir())
    assert [path.name for path in traces] == ["finetune.json.gz", "head.json.gz"]
    for path in traces:
        with gzip.open(path, "rt") as file:
            events = {event.get("name") for event in json.load(file)["traceEvents"]}
        assert {"aten::convolution", "ProfilerStep#3"} <= events


@pytest.mark.slow
@pytest.mark.parametrize("recipe", sorted(path.stem for path in (ROOT / "recipes").glob("*.yaml")))
def test_every_recipe_trains(command, tmp_path, recipe):
    """An epoch of each of its phases, from scratch, on a few images."""
    phases = yaml.safe_load((ROOT / "recipes" / f"{recipe}.yaml").read_text())["phases"]
    result = command(
        "train.py", "--config", f"recipes/{recipe}.yaml", "--data.source", "embedded", "--data.embedded_rows", "200",
        "--data.test_split", "test", "--data.batch_size", "32", "--data.workers", "0", "--model.pretrained", "false",
        *(word for name in phases for word in (f"--phases.{name}.epochs", "1")), "--tracking", "none",
        "--output_dir", str(tmp_path), "--run_name", "run", timeout=600,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-2000:]
    assert len((tmp_path / "run" / "history.jsonl").read_text().splitlines()) == len(phases)


@pytest.mark.slow
def test_a_compiled_model_trains_and_is_kept_like_any_other(make_config, monkeypatch):
    """accelerate launch --dynamo_backend wraps the model; names of weights, and so what is kept, know nothing of it."""
    plain = train.train(make_config(run_name="plain"))
    forget_accelerate()
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER")
    compiled = train.train(make_config(run_name="compiled"))
    for one, other in zip(history(compiled), history(plain), strict=True):
        assert one["train_loss"] == pytest.approx(other["train_loss"], rel=1e-4)
        assert one["val_loss"] == pytest.approx(other["val_loss"], rel=1e-4)
    one, other = (load_file(run / "best" / "model.safetensors") for run in (compiled, plain))
    assert one.keys() == other.keys()
    forget_accelerate()
    (compiled / "summary.json").unlink()
    train.train(make_config(run_name="compiled"), resume=compiled)
    assert (compiled / "summary.json").is_file()
