"""Signals as they come in real life: to the process, to its group, to the launcher alone, to one of several."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT
from test_launch import TORCHRUN, TWO_PROCESSES

ACCELERATE = (sys.executable, "-m", "accelerate.commands.launch", "--config_file", "accelerate_config.yaml")
PYTHON = (sys.executable,)


@pytest.fixture
def start(parquet, tmp_path):
    """Start a run that is too long to end by itself, wait for its first epoch, and return (process, run folder)."""
    started = []

    def begin(launcher, env=None):
        args = ["train.py", "--config", "recipes/demo_scratch.yaml", "--data.source", str(parquet)]
        args += ["--data.workers", "1", "--data.batch_size", "32", "--phases.train.epochs", "1000"]
        args += ["--output_dir", str(tmp_path), "--run_name", "run"]
        process = subprocess.Popen(
            [*launcher, *args], cwd=ROOT, env=os.environ | (env or {}), stdout=-3, stderr=-1, text=True,
            start_new_session=True,
        )  # fmt: skip
        started.append(process)
        history = tmp_path / "run" / "history.jsonl"
        until = time.monotonic() + 120
        while not (history.exists() and history.read_text()):
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < until
            time.sleep(0.05)
        return process, tmp_path / "run"

    yield begin
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def error_of(process, seconds=60):
    try:
        return process.communicate(timeout=seconds)[1]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        pytest.fail(f"still running after {seconds} s:\n{process.communicate()[1]}")


def assert_saved(run):
    rows = [json.loads(line)["epoch"] for line in (run / "history.jsonl").read_text().splitlines()]
    assert rows == list(range(1, len(rows) + 1))
    assert len(list((run / "checkpoints").glob("0*"))) >= 1
    assert not (run / "checkpoints" / "unfinished").exists()


@pytest.mark.parametrize(
    "number",
    [signal.SIGUSR1, *(pytest.param(other, marks=pytest.mark.slow) for other in (signal.SIGTERM, signal.SIGINT))],
)
def test_the_process_saves_and_exits_with_the_conventional_code(start, number):
    process, run = start(PYTHON)
    process.send_signal(number)
    told = error_of(process)
    assert process.returncode == 128 + number
    assert f"stopped by {number.name}; go on with: accelerate launch train.py --resume {run}" in told
    assert "Traceback" not in told
    assert_saved(run)


def test_a_signal_to_the_whole_group_workers_included(start):
    """Ctrl-C, or a batch system: loader workers get it too, and must outlive the step."""
    process, run = start(PYTHON)
    os.killpg(process.pid, signal.SIGTERM)
    told = error_of(process)
    assert process.returncode == 143, told
    assert "Traceback" not in told
    assert_saved(run)


def test_ctrl_c_under_the_launcher(start):
    process, run = start(ACCELERATE)
    os.killpg(process.pid, signal.SIGINT)
    told = error_of(process)
    assert process.returncode != 0
    assert f"stopped by SIGINT; go on with: accelerate launch train.py --resume {run}" in told
    assert_saved(run)


def test_the_launcher_alone_is_ended(start):
    """It passes nothing on; the training sees that it is gone, saves and ends."""
    process, run = start(ACCELERATE)
    process.send_signal(signal.SIGTERM)
    told = error_of(process)  # until the training has closed its stderr, too
    assert f"stopped by SIGTERM; go on with: accelerate launch train.py --resume {run}" in told
    assert_saved(run)


def test_several_processes_stop_at_the_same_step(start):
    process, run = start(TORCHRUN, TWO_PROCESSES)
    process.send_signal(signal.SIGTERM)
    told = error_of(process)
    assert process.returncode != 0
    assert told.count("stopped by SIGTERM; go on with") == 1, told
    assert_saved(run)
