"""A run that was stopped or killed and resumed is the uninterrupted one, byte for byte."""

import dataclasses
import json
import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest
from conftest import ROOT, forget_accelerate, phase
from images import encode, noise, parquet_of
from test_train import history, untimed

import checkpoint
import train
from errors import Interrupted, UserError

PHASES = {
    "head": phase(modules="head", epochs=2, lr=1e-2, schedule="plateau"),
    "finetune": phase(modules="layer4,head", epochs=2, lr=1e-2, schedule="cosine"),
}
STEPS = 9  # an epoch's


def assert_same(run, whole):
    assert untimed(run) == untimed(whole)
    for name in ("best/model.safetensors", "best/config.json"):
        assert (run / name).read_bytes() == (whole / name).read_bytes()
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in (run, whole)]
    for summary in summaries:
        summary.pop("minutes")
    assert summaries[0] == summaries[1]


def stop_at(monkeypatch, number, step=None, batch=None):
    """Send this process a signal at a step of the run, or at a batch of a validation, counted over the whole run."""
    real_epoch, real_validate, made, seen = train.train_epoch, train.validate, [0], [0]

    def train_epoch(*args):
        for one in real_epoch(*args):
            made[0] += 1
            if made[0] == step:
                os.kill(os.getpid(), number)
            yield one

    def watched(loader):
        for one in loader:
            seen[0] += 1
            if seen[0] == batch:
                os.kill(os.getpid(), number)
            yield one

    monkeypatch.setattr(train, "train_epoch", train_epoch)
    monkeypatch.setattr(train, "validate", lambda a, m, loader, *rest: real_validate(a, m, watched(loader), *rest))


@pytest.mark.parametrize(
    ("number", "place", "streaming", "workers"),
    [
        (signal.SIGTERM, {"step": 3}, False, 0),
        pytest.param(signal.SIGINT, {"step": STEPS}, False, 1, marks=pytest.mark.slow),  # the last step of an epoch
        (signal.SIGUSR1, {"step": 2 * STEPS + 7}, False, 0),  # in phase 2
        (signal.SIGTERM, {"batch": 2}, False, 1),  # in the first validation
        pytest.param(signal.SIGTERM, {"step": STEPS + 4}, True, 0, marks=pytest.mark.slow),
        (signal.SIGTERM, {"step": 3 * STEPS + 1}, True, 1),
        pytest.param(signal.SIGTERM, {"batch": 4}, True, 0, marks=pytest.mark.slow),  # in a validation
    ],
)
def test_a_stopped_run_goes_on_as_if_nothing_had_been(make_config, monkeypatch, number, place, streaming, workers):
    keep = {"keep_mb": 0} if workers else {}  # or there would be nothing for them to do
    config = make_config(PHASES, data={"streaming": streaming, "workers": workers} | keep)
    whole = train.train(dataclasses.replace(config, run_name="whole"))
    forget_accelerate()
    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        stop_at(patch, number, **place)
        with pytest.raises(Interrupted, match=f"stopped by {number.name}; go on with: .* --resume .*/run") as caught:
            train.train(config)
    assert caught.value.exit_code == 128 + number
    assert signal.getsignal(number) is before, "the handlers are what they were"
    run = whole.with_name("run")
    rows = len(untimed(run)) if (run / "history.jsonl").exists() else 0
    epochs, steps = checkpoint._folders(run)[-1].name.split("-")
    assert int(epochs) == rows
    if "step" in place:
        assert int(steps) == place["step"], "the step in which the signal came was finished, and none after it"
    forget_accelerate()
    train.train(config, resume=run)
    assert_same(run, whole)


@pytest.mark.parametrize("streaming", [False, True])
def test_workers_that_die_while_a_stopped_run_is_saved_do_no_harm(make_config, monkeypatch, streaming):
    """They had the signal, too. Torch raises their death, in the middle of whatever goes on."""
    killed, real = [], checkpoint.Checkpoints.save

    def save(self, state, metrics):
        for worker in multiprocessing.active_children():
            worker.kill()
            killed.append(worker)
        time.sleep(0.5)
        real(self, state, metrics)

    monkeypatch.setattr(checkpoint.Checkpoints, "save", save)
    stop_at(monkeypatch, signal.SIGTERM, step=3)
    config = make_config(PHASES, data={"streaming": streaming, "workers": 1, "keep_mb": 0})
    with pytest.raises(Interrupted):
        train.train(config)
    assert killed and checkpoint.newest(Path(config.output_dir) / "run").state.step == 3


def test_the_rate_of_the_rest_of_an_epoch_is_not_told(make_config, monkeypatch, capsys):
    _, run = whole_and_resumed(make_config({"all": phase(epochs=2)}), monkeypatch, step=STEPS + 5)
    rates = [row["images_per_second"] for row in history(run)]
    assert rates[0] > 0 and rates[1] is None
    assert " s, - images/s" in capsys.readouterr().out


DRAWING = {"policy": "augmix", "mix": "cutmix", "distort": True}


def whole_and_resumed(config, monkeypatch, step):
    """The folders of an uninterrupted run, and of one that was stopped at a step and gone on with."""
    whole = train.train(dataclasses.replace(config, run_name="whole"))
    forget_accelerate()
    with monkeypatch.context() as patch:
        stop_at(patch, signal.SIGTERM, step=step)
        with pytest.raises(Interrupted):
            train.train(config)
    forget_accelerate()
    run = whole.with_name("run")
    return whole, train.train(config, resume=run)


@pytest.mark.slow
def test_a_stopped_run_without_validation_goes_on_too(make_config, monkeypatch):
    config = make_config({"all": phase(epochs=2, lr=1e-2)}, data={"folds": None}, augment=DRAWING)
    whole, run = whole_and_resumed(config, monkeypatch, step=STEPS + 5)
    assert_same(run, whole)


@pytest.mark.slow
def test_a_resumed_run_traces_a_whole_epoch_not_the_rest_of_one(make_config, monkeypatch):
    config = make_config(PHASES)
    with monkeypatch.context() as patch:
        stop_at(patch, signal.SIGTERM, step=STEPS - 5)
        with pytest.raises(Interrupted):
            train.train(config)
    real, traced = train.profiling.traced, []
    monkeypatch.setattr(train.profiling, "traced", lambda steps, *rest: real(counted(steps), *rest))

    def counted(steps):
        traced.append(0)
        for step in steps:
            traced[-1] += 1
            yield step

    forget_accelerate()
    train.train(dataclasses.replace(config, profile=1), resume=Path(config.output_dir) / "run")
    assert traced == [STEPS, STEPS], "one epoch of each phase"


def test_history_holds_no_epoch_twice_and_loses_none(make_config, monkeypatch):
    """An epoch that was written down, but is not in the checkpoint, is trained again and its line replaced."""
    config = make_config(PHASES)
    whole = train.train(dataclasses.replace(config, run_name="whole"))
    forget_accelerate()
    real_save = checkpoint.Checkpoints.save

    def dying_save(self, state, metrics):
        if state.epoch == 3:
            raise KeyboardInterrupt
        real_save(self, state, metrics)

    monkeypatch.setattr(checkpoint.Checkpoints, "save", dying_save)
    with pytest.raises(KeyboardInterrupt):
        train.train(config)
    monkeypatch.setattr(checkpoint.Checkpoints, "save", real_save)
    run = whole.with_name("run")
    assert [row["epoch"] for row in untimed(run)] == [1, 2, 3]
    with (run / "history.jsonl").open("a") as file:
        file.write('{"phase": "finetu')  # and a line that the disk has half of
    forget_accelerate()
    train.train(config, resume=run)
    assert_same(run, whole)


def test_history_that_has_lost_epochs_is_an_error(make_config, monkeypatch):
    config = make_config(PHASES)
    with monkeypatch.context() as patch:
        stop_at(patch, signal.SIGTERM, step=STEPS * 3)
        with pytest.raises(Interrupted):
            train.train(config)
    run = next(path for path in Path(config.output_dir).iterdir())
    (run / "history.jsonl").write_text("")
    forget_accelerate()
    with pytest.raises(UserError, match=r"history.jsonl holds 0 epochs, but 2 were finished"):
        train.train(config, resume=run)


def test_a_run_killed_before_its_first_checkpoint_starts_from_the_beginning(make_config):
    config = make_config(PHASES)
    whole = train.train(dataclasses.replace(config, run_name="whole"))
    run = whole.with_name("run")
    (run / "checkpoints").mkdir(parents=True)
    (run / "config.yaml").write_text((whole / "config.yaml").read_text())
    forget_accelerate()
    train.train(config, resume=run)
    assert_same(run, whole)


def test_a_resumed_run_needs_nothing_of_what_it_started_from(make_config, monkeypatch):
    """Its weights may be gone; the normalisation that goes with them is in the checkpoint."""
    first = train.train(make_config({"only": phase()}, run_name="first"))
    described = first / "best" / "config.json"
    changed = json.loads(described.read_text())
    changed["pretrained_cfg"]["mean"] = [0.11, 0.22, 0.33]
    described.write_text(json.dumps(changed))
    config = make_config(PHASES, model={"weights": str(first / "best")})
    forget_accelerate()
    with monkeypatch.context() as patch:
        stop_at(patch, signal.SIGTERM, step=3)
        with pytest.raises(Interrupted):
            train.train(config)
    (first / "best" / "model.safetensors").unlink()
    forget_accelerate()
    run = train.train(config, resume=first.with_name("run"))
    assert json.loads((run / "best" / "config.json").read_text())["pretrained_cfg"]["mean"] == [0.11, 0.22, 0.33]


def test_data_that_have_changed_are_told(make_config, monkeypatch, image_rows, tmp_path):
    (tmp_path / "data").mkdir()
    image_rows(200).to_parquet(tmp_path / "data" / "train.parquet")
    config = make_config(PHASES, data={"source": str(tmp_path / "data"), "test_split": None})
    with monkeypatch.context() as patch:
        stop_at(patch, signal.SIGTERM, step=3)
        with pytest.raises(Interrupted):
            train.train(config)
    image_rows(190).to_parquet(tmp_path / "data" / "train.parquet")
    forget_accelerate()
    with pytest.raises(UserError, match=r"data have changed: training rows was \d+, and is \d+"):
        train.train(config, resume=tmp_path / "runs" / "run")


def test_an_image_that_was_found_to_be_corrupt_can_be_skipped_then(make_config, tmp_path):
    """As in the test split of a dataset on the hub, which nobody can repair: it is read last."""
    images = [encode(image) for image in noise(80)]
    whole = (parquet_of(tmp_path, images) / "train.parquet").read_bytes()
    parquet_of(tmp_path, [*images[:-1], {"bytes": b"odd", "path": None}])
    (tmp_path / "train.parquet").write_bytes(whole)
    config = make_config({"only": phase()}, data={"source": str(tmp_path)})
    with pytest.raises(UserError, match=r"row 79 of split 'test' can't be decoded: .* or --data\.on_corrupt skip"):
        train.train(config)
    forget_accelerate()
    skipping = dataclasses.replace(config, data=dataclasses.replace(config.data, on_corrupt="skip"))
    run = train.train(skipping, resume=tmp_path / "runs" / "run")
    assert len((run / "history.jsonl").read_text().splitlines()) == 1
    assert json.loads((run / "summary.json").read_text())["test_corrupt"] == 1


def test_a_phase_that_diverges_goes_on_from_the_one_before_at_a_lower_rate(make_config):
    """And is then what it would have been with that rate from the start."""
    finetune = PHASES["finetune"]
    config = make_config(PHASES)
    whole = train.train(dataclasses.replace(config, run_name="whole"))
    forget_accelerate()
    run = whole.with_name("run")
    resume_hint = rf"--resume {run} --clip_norm 1, or with a lower lr for this phase"
    with pytest.raises(
        UserError, match=rf"the loss is not finite in phase finetune, epoch 3, step \d: .*{resume_hint}"
    ):
        train.train(make_config(PHASES | {"finetune": finetune | {"lr": 1e9, "optimizer": "sgd"}}))
    assert checkpoint._folders(run)[-1].name.startswith("00002-"), "of the end of the phase before"
    forget_accelerate()
    train.train(config, resume=run)
    assert_same(run, whole)


def test_other_pieces_after_an_odd_step_are_pieces_of_one_batch_still(make_config, monkeypatch):
    """Accelerate counts pieces over the whole run, and would step in the middle of each batch from there on."""
    config = make_config({"only": phase(epochs=1, lr=1e-2)})
    with monkeypatch.context() as patch:
        stop_at(patch, signal.SIGTERM, step=3)
        with pytest.raises(Interrupted):
            train.train(config)
    forget_accelerate()
    real, pending = train.train_epoch, []

    def train_epoch(accelerator, model, *rest):
        for step in real(accelerator, model, *rest):
            pending.extend(parameter for parameter in model.parameters() if parameter.grad is not None)
            yield step

    monkeypatch.setattr(train, "train_epoch", train_epoch)
    data = dataclasses.replace(config.data, micro_batch_size=config.data.batch_size // 2)
    run = train.train(dataclasses.replace(config, data=data), resume=Path(config.output_dir) / "run")
    assert not pending, "gradients that no step has taken"
    assert untimed(run)[-1]["step"] == STEPS


def test_time_before_a_stop_counts(make_config, monkeypatch):
    config = make_config({"only": phase(epochs=1, lr=1e-2)})
    real = train.RunState.end_step
    with monkeypatch.context() as patch:
        patch.setattr(train.RunState, "end_step", lambda self, seconds: real(self, seconds + 1000))
        stop_at(patch, signal.SIGTERM, step=3)
        with pytest.raises(Interrupted):
            train.train(config)
    run = Path(config.output_dir) / "run"
    forget_accelerate()
    train.train(config, resume=run)
    row = json.loads((run / "history.jsonl").read_text())
    assert 1000 < row["seconds"] < 1100
    assert json.loads((run / "summary.json").read_text())["minutes"] == row["seconds"] / 60


def test_a_run_that_was_stopped_before_its_first_step_is_gone_on_with(make_config, monkeypatch):
    def stopped(*_):
        raise Interrupted("stopped", 143)

    config = make_config({"only": phase(epochs=1, lr=1e-2)})
    with monkeypatch.context() as patch:
        patch.setattr(train.loading, "keep_decoded", stopped)
        with pytest.raises(Interrupted):
            train.train(config)
    forget_accelerate()
    run = train.train(config, resume=Path(config.output_dir) / "run")
    assert len(untimed(run)) == 1


def test_a_validation_loss_that_is_not_finite_ends_the_run_with_nothing_kept_of_it(make_config, monkeypatch):
    config, real, losses = make_config({"only": phase(epochs=3, lr=1e-2)}), train.validate, [2.0, float("nan")]

    def validate(*args):
        return real(*args) | {"loss": losses.pop(0)}

    monkeypatch.setattr(train, "validate", validate)
    with pytest.raises(UserError, match=r"validation loss is not finite after phase only, epoch 2, .*--clip_norm 1"):
        train.train(config)
    run = Path(config.output_dir) / "run"
    assert [row["epoch"] for row in untimed(run)] == [1]
    assert [folder.name.split("-")[0] for folder in checkpoint._folders(run)] == ["00001"]


def test_a_finished_run_is_not_resumed(make_config):
    run = train.train(make_config({"only": phase()}))
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.name != ".lock"}
    forget_accelerate()
    with pytest.raises(UserError, match="is finished"):
        train.train(make_config({"only": phase()}), resume=run)
    assert before == {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.name != ".lock"}


def kill(command, folder, kills, *options):
    result = command(str(ROOT / "tests" / "killing.py"), str(folder), "--kills", str(kills), *options, timeout=1800)
    assert result.returncode == 0, result.stderr[-3000:]
    assert json.loads(result.stdout)["kills"] >= kills


def test_killed_and_resumed_is_the_uninterrupted_run(command, tmp_path):
    kill(command, tmp_path, 4)


@pytest.mark.slow
@pytest.mark.parametrize("processes", ["1", "2"])
@pytest.mark.parametrize("data", ["kept", "mapped", "streamed"])
def test_killed_at_25_random_moments(command, tmp_path, data, processes):
    kill(command, tmp_path, 25, "--data", data, "--processes", processes)
