import json
import os
import socket

import pytest
import torch
import wandb
from accelerate import Accelerator

import tracking
from engine import Step
from errors import UserError
from tracking import Tracking

ROW = {"phase": "head", "epoch": 1, "lr": 1e-3, "seconds": 3.0, "images_per_second": 99.0}
ROW |= {"train_loss": 1.0, "train_top1": 0.5, "train_top5": 0.9, "val_loss": 2.0, "val_top1": 0.25, "val_top5": 0.75}


@pytest.fixture
def start(make_config, tmp_path):
    def make(epochs_done=0, **values):
        accelerator = Accelerator(cpu=True, log_with="wandb" if values.get("tracking") == "wandb" else None)
        return Tracking(accelerator, make_config(**values), tmp_path, epochs_done)

    return make


def lines(tmp_path):
    return [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()]


def test_history_has_one_line_per_epoch_and_is_on_disk_at_once(start, tmp_path, capsys):
    track = start()
    for epoch in (1, 2):
        track.epoch(ROW | {"epoch": epoch}, best=True, total=2)
        assert lines(tmp_path)[-1] == ROW | {"epoch": epoch}
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 2
    for part in ("1/2", "head", "25.00%", "best"):
        assert part in printed[0]


def test_a_resumed_history_forgets_the_epochs_that_are_trained_again(start, tmp_path):
    track = start()
    for epoch in (1, 2, 3):
        track.epoch(ROW | {"epoch": epoch}, best=False, total=3)
    start(epochs_done=2)
    assert [row["epoch"] for row in lines(tmp_path)] == [1, 2]


def steps(losses):
    return [Step(torch.tensor(loss), torch.tensor(0.5), 32) for loss in losses]


def test_watching_passes_every_step_on(start):
    watched = list(start().watch(iter(steps([1.0] * 50)), "phase head, epoch 1", images=1600))
    assert len(watched) == 50


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_is_told(start, bad):
    losses = [1.0] * 30 + [bad] * 20
    with pytest.raises(UserError, match=r"the loss became (nan|inf) in phase head, epoch 1, step 41 or just before"):
        list(start().watch(iter(steps(losses)), "phase head, epoch 1", images=None))


def test_the_bar_shows_on_a_terminal_only(start, capsys):
    list(start().watch(iter(steps([1.0] * 5)), "phase head, epoch 1", images=160))
    assert capsys.readouterr().err == ""


@pytest.fixture
def no_account(monkeypatch, tmp_path):
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    wandb.teardown()  # it remembers the environment of its first use
    yield
    os.environ["WANDB_MODE"] = "offline"
    wandb.teardown()


def test_wandb_without_a_key_goes_offline_and_says_how_to_sync(start, tmp_path, no_account, capsys):
    track = start(tracking="wandb")
    track.epoch(ROW, best=True, total=1)
    track.finish({"test_top1": 0.5})
    err = capsys.readouterr().err
    assert f"W&B: there is no API key: offline. To upload later: wandb sync {tmp_path}/wandb/offline-run-*" in err
    assert list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
    assert json.loads((tmp_path / "summary.json").read_text()) == {"test_top1": 0.5}


def test_wandb_that_can_not_be_reached_goes_offline_too(start, tmp_path, no_account, monkeypatch, capsys):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{port}")
    monkeypatch.setattr(tracking, "WANDB_TIMEOUT", 3)
    track = start(tracking="wandb")
    track.epoch(ROW, best=True, total=1)
    track.finish({})
    err = capsys.readouterr().err
    assert "W&B: it can't be reached (" in err
    assert "0" * 40 not in err
    assert list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
