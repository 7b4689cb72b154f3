"""Signals as they come in real life: to the process, to its group, to the launcher alone, to one of several."""

import contextlib
import itertools
import json
import os
import signal
import sys
from types import SimpleNamespace

import psutil
import pytest
from accelerate import Accelerator
from conftest import error_of
from test_launch import TORCHRUN, TWO_PROCESSES

from errors import Interrupted
from interrupt import Interrupt

ACCELERATE = (sys.executable, "-m", "accelerate.commands.launch", "--config_file", "accelerate_config.yaml")
PYTHON = (sys.executable,)


def assert_saved(run):
    rows = [json.loads(line)["epoch"] for line in (run / "history.jsonl").read_text().splitlines()]
    assert rows == list(range(1, len(rows) + 1))
    assert len(list((run / "checkpoints").glob("0*"))) >= 1
    assert not (run / "checkpoints" / "unfinished").exists()


@pytest.mark.parametrize(
    "number",
    [
        signal.SIGUSR1,
        *(pytest.param(other, marks=pytest.mark.slow) for other in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)),
    ],
)
def test_the_process_saves_and_exits_with_the_conventional_code(long_run, number):
    process, run = long_run(PYTHON)
    process.send_signal(number)
    told = error_of(process)
    assert process.returncode == 128 + number
    assert f"stopped by {number.name}; go on with: accelerate launch train.py --resume {run}" in told
    assert "Traceback" not in told
    assert_saved(run)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_to_the_whole_group_workers_included(long_run, number):
    """A batch system, or a closed terminal: loader workers get it too, and must outlive the step."""
    process, run = long_run(PYTHON)
    os.killpg(process.pid, number)
    told = error_of(process)
    assert process.returncode == 128 + number, told
    assert "Traceback" not in told
    assert_saved(run)


@pytest.mark.slow
def test_ctrl_c_under_the_launcher(long_run):
    process, run = long_run(ACCELERATE)
    os.killpg(process.pid, signal.SIGINT)
    told = error_of(process)
    assert process.returncode != 0
    assert f"stopped by SIGINT; go on with: accelerate launch train.py --resume {run}" in told
    assert_saved(run)


# Runs a command in a terminal of its own, which SIGUSR1 closes.
TERMINAL = """
import os, pty, signal, sys
child, screen = pty.fork()
if not child:
    os.execv(sys.argv[1], sys.argv[1:])
signal.signal(signal.SIGUSR1, lambda *_: os.close(screen))
try:
    while os.read(screen, 65536):
        pass
except OSError:
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.slow
def test_a_terminal_that_is_closed(long_run):
    """Nothing that is written from then on arrives."""
    process, run = long_run((sys.executable, "-c", TERMINAL, *PYTHON))
    process.send_signal(signal.SIGUSR1)
    assert process.wait(60) == 128 + signal.SIGHUP
    assert_saved(run)


@pytest.mark.slow
def test_the_launcher_alone_is_ended(long_run):
    """It passes nothing on; the training sees that it is gone, saves and ends."""
    process, run = long_run(ACCELERATE)
    process.send_signal(signal.SIGTERM)
    told = error_of(process)  # until the training has closed its stderr, too
    assert f"stopped by SIGTERM; go on with: accelerate launch train.py --resume {run}" in told
    assert_saved(run)


@pytest.mark.parametrize(
    ("variable", "ends"), [("ACCELERATE_MIXED_PRECISION", False), ("ACCELERATE_DYNAMO_BACKEND", True)]
)
def test_a_parent_that_is_gone_counts_if_it_was_a_launcher(monkeypatch, variable, ends):
    """Who exported a precision may have closed that shell, as after nohup."""
    for name in ("ACCELERATE_MIXED_PRECISION", "ACCELERATE_DYNAMO_BACKEND", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, "no")
    monkeypatch.setattr("interrupt.os.getppid", lambda: 100)
    with Interrupt(Accelerator(cpu=True), "go on") as interrupt:
        interrupt.check()
        monkeypatch.setattr("interrupt.os.getppid", lambda: 1)
        with pytest.raises(Interrupted, match="stopped by SIGTERM; go on") if ends else contextlib.nullcontext():
            interrupt.check()


def test_a_signal_counts_even_if_nobody_reads_what_is_said_of_it(monkeypatch):
    """`2>&1 | tee log` dies of the same Ctrl-C. Lines printed until it is obeyed don't fail either."""
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as unread, Interrupt(Accelerator(cpu=True), "go on") as interrupt:
        monkeypatch.setattr("interrupt.sys.__stdout__", unread)
        monkeypatch.setattr("interrupt.sys.__stderr__", unread)
        os.kill(os.getpid(), signal.SIGINT)
        print("epoch 1", file=unread, flush=True)
        with pytest.raises(Interrupted, match="stopped by SIGINT"):
            interrupt.check()


def test_a_second_ctrl_c_ends_at_once_unless_it_is_the_launchers_copy(monkeypatch):
    seconds, accelerator = iter([0, 0, 1, 3]), Accelerator(cpu=True)
    monkeypatch.setattr("interrupt.time", SimpleNamespace(monotonic=lambda: next(seconds)))
    with Interrupt(accelerator, "go on"):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize(("seconds", "asked"), [(0.001, 20), (0.5, 4), (5, 1)])
def test_slow_steps_are_asked_about_more_often(monkeypatch, seconds, asked):
    """A batch system waits half a minute, or so, before it kills."""
    clock, calls = [0.0], []
    monkeypatch.setattr("interrupt.time", SimpleNamespace(monotonic=lambda: clock[0]))
    monkeypatch.setattr("interrupt.max_over_processes", lambda _, value: calls.append(clock[0]) or max(value, (0, 0)))
    interrupt = Interrupt(SimpleNamespace(num_processes=2), "go on")
    for _ in range(100):
        clock[0] += seconds
        interrupt.check()
    between = [later - sooner for sooner, later in itertools.pairwise(calls)]
    assert between and all(gap == pytest.approx(asked * seconds) for gap in between)


def test_a_closed_terminal_counts_unless_the_run_was_started_to_outlive_it():
    before = signal.getsignal(signal.SIGHUP)
    try:
        for handler, counts in ((signal.SIG_DFL, True), (signal.SIG_IGN, False)):  # nohup ignores it
            signal.signal(signal.SIGHUP, handler)
            with Interrupt(Accelerator(cpu=True), "go on") as interrupt:
                os.kill(os.getpid(), signal.SIGHUP)
                with pytest.raises(Interrupted, match="stopped by SIGHUP") if counts else contextlib.nullcontext():
                    interrupt.check()
            assert signal.getsignal(signal.SIGHUP) == handler
    finally:
        signal.signal(signal.SIGHUP, before)


def test_several_processes_stop_at_the_same_step(long_run):
    """Though only one of them, and not the one that speaks, has got the signal."""
    process, run = long_run(TORCHRUN, TWO_PROCESSES)
    (other,) = (child for child in psutil.Process(process.pid).children() if child.environ().get("RANK") == "1")
    other.send_signal(signal.SIGTERM)
    told = error_of(process)
    assert process.returncode != 0
    assert told.count("stopped by SIGTERM; go on with") == 1, told
    assert_saved(run)
