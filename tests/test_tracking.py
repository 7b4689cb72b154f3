import io
import json
import os
import re
import signal
import socket
import sys
import time
from urllib.parse import urlparse

import pytest
import torch
import wandb
from accelerate import Accelerator
from conftest import error_of, kill_a_child, phase, wait_until
from wandb_server import WandbServer

import tracking
from engine import Step
from errors import UserError
from phases import RunState
from tracking import Tracking

TRAINED, VALIDATED = {"loss": 1.0, "top1": 0.5, "top5": 0.9}, {"loss": 2.0, "top1": 0.25, "top5": 0.75}
ROW = {"phase": "head", "phase_epoch": 1, "step": 9, "lr": 1e-3, "images_per_second": 99.0}
ROW |= {"train_loss": 1.0, "train_top1": 0.5, "train_top5": 0.9, "val_loss": 2.0, "val_top1": 0.25, "val_top5": 0.75}


@pytest.fixture
def start(make_config, tmp_path):
    def make(phases=None, state=None, **values):
        accelerator = Accelerator(cpu=True, log_with="wandb" if values.get("tracking") == "wandb" else None)
        return Tracking(accelerator, make_config(phases, **values), tmp_path, state or RunState())

    return make


def end_epoch(track, number=1, best=True, trained=TRAINED, validated=VALIDATED):
    """An epoch of the phase head, of three that take four minutes each."""
    track.images_per_second = 99.0
    state = RunState(epoch=number, phase_epoch=number, step=9)
    track.epoch("head", state, 1e-3, trained, validated, 240.0, best)


def lines(tmp_path):
    return [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()]


def test_history_has_one_line_per_epoch_and_is_on_disk_at_once(start, tmp_path, capsys):
    track = start({"head": phase(epochs=2), "finetune": phase(epochs=3)})
    for epoch in (1, 2):
        end_epoch(track, epoch)
        times = {"seconds": 240.0, "seconds_left": 240.0 * (2 - epoch)}
        assert lines(tmp_path)[-1] == ROW | times | {"epoch": epoch, "phase_epoch": epoch}
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 2
    for part in ("1/5", "head", "25.00%", "best", "240.0 s, 99 images/s, about 4 min of head left"):
        assert part in printed[0]
    assert "left" not in printed[1]


def test_images_that_can_not_be_decoded_are_told_with_their_number(start, tmp_path, capsys):
    end_epoch(start(), 2, trained=TRAINED | {"corrupt": 3}, validated=VALIDATED | {"corrupt": 1})
    said = capsys.readouterr().err.splitlines()
    assert said == [f"phase head, epoch 2: {what} images can't be decoded" for what in ("3 training", "1 validation")]
    assert (lines(tmp_path)[-1]["train_corrupt"], lines(tmp_path)[-1]["val_corrupt"]) == (3, 1)


def test_a_resumed_history_forgets_the_epochs_that_are_trained_again(start, tmp_path):
    track = start()
    for epoch in (1, 2, 3):
        end_epoch(track, epoch, best=False)
    start(state=RunState(epoch=2, step=6))
    assert [row["epoch"] for row in lines(tmp_path)] == [1, 2]


@pytest.mark.parametrize(
    "damage, said",
    [
        (lambda path: path.write_bytes(b"\xff\n"), "can't be read .*restore it"),
        (lambda path: path.mkdir(), "can't be read .*restore it"),
        (lambda path: path.write_text("{}\n{}\n"), "holds 2 epochs, but there is no checkpoint to continue from"),
    ],
)
def test_a_history_that_a_run_can_not_go_on_with(start, tmp_path, damage, said):
    damage(tmp_path / "history.jsonl")
    with pytest.raises(UserError, match=said):
        start()


def steps(count, bad_from=None):
    bad = [0 if bad_from is None else max(0, number - bad_from + 1) for number in range(1, count + 1)]
    return [Step(torch.tensor(1.0), torch.tensor(0.5), 32, torch.tensor(float(number))) for number in bad]


def test_watching_passes_every_step_on(start):
    watched = list(start().watch(iter(steps(50)), "phase head, epoch 1", images=1600))
    assert len(watched) == 50


@pytest.mark.parametrize(("count", "bad_from", "seen"), [(60, 27, 41), (30, 29, 30)])
def test_a_loss_that_is_not_finite_stops_the_run_within_the_interval_and_names_its_step(start, count, bad_from, seen):
    """Found when the loss is looked at next, or at the epoch's end; named is the step where it began."""
    passed = []
    message = rf"the loss is not finite in phase head, epoch 1, step {bad_from}: .*Try again with --clip_norm 1 or a"
    track = start()
    with pytest.raises(UserError, match=message):
        for step in track.watch(iter(steps(count, bad_from)), "phase head, epoch 1", images=None):
            passed.append(step)
    assert seen - 1 <= len(passed) <= seen


def test_the_rate_counts_the_wait_for_the_device_at_the_end(start, monkeypatch):
    """A GPU's last steps are only queued when the loop has made them."""
    clock, track = [0.0], start()
    monkeypatch.setattr(tracking.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(track, "check_finite", lambda: clock.__setitem__(0, clock[0] + 10))
    list(track.watch(iter(steps(5)), "phase head, epoch 1", images=160))
    assert track.images_per_second == 160 / 20, "waited for after the first step and after the last"


def test_steps_of_a_resumed_epoch_are_numbered_on(start):
    with pytest.raises(UserError, match="epoch 1, step 109: "):
        list(start().watch(iter(steps(20, 9)), "phase head, epoch 1", images=None, made=100))


def test_a_checkpoint_asks_whether_the_loss_is_finite(start):
    track = start()
    track.check_finite()
    with pytest.raises(UserError, match="step 9: "):
        for step in track.watch(iter(steps(19, 9)), "phase head, epoch 1", images=None):
            if int(step.unapplied) == 3:
                track.check_finite()


def test_the_bar_shows_on_a_terminal_only(start, capsys):
    list(start().watch(iter(steps(5)), "phase head, epoch 1", images=160))
    assert capsys.readouterr().err == ""


def test_the_bar_tells_the_rate_and_what_is_left_of_what_is_trained_now(start, monkeypatch):
    """A resumed epoch's steps of before are no speed of now."""
    bars, real = [], tracking.tqdm

    class Terminal(io.StringIO):
        isatty = lambda self: True  # noqa: E731

    def bar(**options):
        bars.append(real(**options | {"file": Terminal(), "mininterval": 0, "ncols": 150}))
        return bars[-1]

    monkeypatch.setattr(tracking, "tqdm", bar)
    monkeypatch.setattr(tracking, "peak_memory", lambda _: {"peak_memory_mb": 1234})

    def slow():
        for step in steps(3):
            time.sleep(0.01)
            yield step

    list(start(data={"batch_size": 32}).watch(slow(), "phase head, epoch 2", images=3296, made=100))
    shown = bars[0].fp.getvalue()
    assert "phase head, epoch 2:  97%|" in shown and " 3264/3296 [" in shown
    assert re.search(r"\[\d\d:\d\d<\d\d:\d\d, .*images/s, loss=1.000, peak_memory_mb=1,234, top1=50.0%", shown)
    rates = [float(rate) for rate in re.findall(r"([\d.]+) images/s", shown)]
    assert rates and max(rates) < 32 / 0.01


@pytest.fixture
def no_account(monkeypatch, tmp_path):
    for name in ("WANDB_API_KEY", "WANDB_BASE_URL", "WANDB_MODE", "WANDB_PROJECT", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    wandb.teardown()  # it remembers the environment of its first use
    yield
    os.environ["WANDB_MODE"] = "offline"
    wandb.teardown()


def test_wandb_without_a_key_goes_offline_and_says_how_to_sync(start, tmp_path, no_account, monkeypatch, capsys):
    monkeypatch.delenv("WANDB_SILENT", raising=False)
    with start(tracking="wandb") as track:
        end_epoch(track)
        assert wandb.run.step == 2, "what W&B gets from now on is of another epoch: this one can be shown"
        track.finish({"test_top1": 0.5})
        assert (wandb.run.step, wandb.run.summary["test_top1"]) == (2, 0.5)
    err = capsys.readouterr().err
    assert "URL" not in err, "there is none to tell"
    assert f"W&B: there is no API key: offline. To upload later: wandb sync {tmp_path}/wandb/offline-run-*" in err
    assert list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
    assert json.loads((tmp_path / "summary.json").read_text()) == {"test_top1": 0.5}


def test_the_tracker_ends_in_peace(start, no_account, monkeypatch):
    """When one process fails, a launcher soon sends SIGTERM to the main one, whose error is still to be printed."""
    ended, finish = [], wandb.finish

    def told_to_end(**options):
        os.kill(os.getpid(), signal.SIGTERM)
        finish(**options)
        ended.append("W&B")

    monkeypatch.setattr(wandb, "finish", told_to_end)
    before = signal.signal(signal.SIGTERM, lambda *_: ended.append("all"))
    try:
        with start(tracking="wandb"):
            pass
        os.kill(os.getpid(), signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert ended == ["W&B", "all"]


@pytest.mark.parametrize(
    ("files", "environment", "has_key"),
    [
        ({".netrc": "api.wandb.ai"}, {}, True),
        ({".netrc": urlparse(wandb.Settings().base_url).netloc}, {}, True),  # where `wandb login` writes it
        ({"_netrc": "api.wandb.ai"}, {}, True),
        ({".netrc": "example.org", "_netrc": "api.wandb.ai"}, {}, False),
        ({"mine": "api.wandb.ai"}, {"NETRC": "~/mine"}, True),
        ({"mine": "example.org", ".netrc": "api.wandb.ai"}, {"NETRC": "~/mine"}, False),
        ({".netrc": "localhost:8080"}, {"WANDB_BASE_URL": "http://localhost:8080"}, True),
        ({}, {"WANDB_API_KEY": "0" * 40}, True),
        ({}, {"WANDB_API_KEY": "no key"}, True),  # W&B itself says what is wrong with it
        ({}, {"WANDB_API_KEY": "0" * 40 + "\n"}, True),
        ({}, {"WANDB_BASE_URL": "nowhere"}, True),
        ({}, {}, False),
    ],
)
def test_a_key_is_looked_for_where_wandb_does(tmp_path, no_account, monkeypatch, files, environment, has_key):
    for name, host in files.items():
        (tmp_path / name).write_text(f"machine {host} login user password {'0' * 40}\n")
        (tmp_path / name).chmod(0o600)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert tracking._has_key() is has_key


@pytest.mark.parametrize(("given", "project"), [({}, "phases"), ({"WANDB_PROJECT": "birds"}, "birds")])
def test_wandb_that_can_be_reached_says_where_the_run_is(start, no_account, monkeypatch, capsys, given, project):
    server = WandbServer()
    for name, value in ({"WANDB_API_KEY": "0" * 40, "WANDB_BASE_URL": server.url} | given).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(tracking, "WANDB_TIMEOUT", 60)
    monkeypatch.setattr(tracking, "WANDB_PATIENCE", 1)
    try:
        with start(tracking="wandb"):
            assert set(server.projects) == {project}
            where = f"W&B: {server.url}/me/{project}/runs/{server.started[0]}"
            assert where in capsys.readouterr().out.splitlines()
    finally:
        server.stop()


def test_wandb_that_can_not_be_reached_goes_offline_too(start, tmp_path, no_account, monkeypatch, capsys):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{port}")
    monkeypatch.setattr(tracking, "WANDB_TIMEOUT", 3)
    with start(tracking="wandb") as track:
        end_epoch(track)
        track.finish({})
    err = capsys.readouterr().err
    assert "W&B: it can't be reached (" in err
    assert "0" * 40 not in err
    assert list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))


def test_wandb_that_can_not_be_started_at_all_stops_nothing(start, no_account, monkeypatch, capsys):
    def fails(*_, **__):
        raise RuntimeError("no service")

    with monkeypatch.context() as patch:
        patch.setattr(Accelerator, "init_trackers", fails)
        patch.setattr(wandb, "setup", fails)
        patch.setattr(wandb, "teardown", lambda: sys.exit(1))  # as it does then
        with start(tracking="wandb") as track:
            assert not track.tracker_works
            track.finish({"epochs": 1})
    assert "W&B can't be started (no service): training goes on without it" in capsys.readouterr().err


def test_a_resumed_run_goes_on_under_the_same_id_in_wandb(start, tmp_path, no_account):
    state = RunState()
    for epoch in (1, 2):
        with start(state=state, tracking="wandb") as track:
            assert wandb.run.id == state.tracker_id
            end_epoch(track, epoch)
            state.epoch = epoch
        wandb.teardown()
    ids = {path.name.split("-")[3] for path in (tmp_path / "wandb").glob("offline-run-*")}
    assert ids == {state.tracker_id}


# The command with less patience: nobody waits a minute for a test.
HASTY = "import runpy, sys, tracking; tracking.WANDB_PATIENCE = 3; runpy.run_path(sys.argv.pop(1), run_name='__main__')"


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["its service is killed", "it can't be reached any more"])
def test_a_tracker_that_is_lost_in_mid_run_stops_nothing(long_run, tmp_path, fault):
    server = WandbServer()
    account = {"WANDB_MODE": "online", "WANDB_API_KEY": "0" * 40, "WANDB_BASE_URL": server.url, "HOME": str(tmp_path)}
    process, run = long_run((sys.executable, "-c", HASTY), account, "--tracking", "wandb")
    assert len(server.started) == 1
    if fault == "its service is killed":
        kill_a_child(process, lambda child: "wandb-core" in child.name())
    server.stop()

    epochs = len((run / "history.jsonl").read_text().splitlines())
    wait_until(lambda: len((run / "history.jsonl").read_text().splitlines()) > epochs + 2)
    process.send_signal(signal.SIGTERM)
    told = error_of(process)
    assert process.returncode == 143, told
    assert "Traceback" not in told
    assert told.count("W&B stopped working (") == 1 and f"see {run}/history.jsonl" in told


@pytest.mark.parametrize(("seconds", "said"), [(0, ""), (40, "40 s"), (720, "12 min"), (12600, "3.5 h")])
def test_durations_are_said_as_people_say_them(seconds, said):
    assert tracking._duration(seconds) == said
