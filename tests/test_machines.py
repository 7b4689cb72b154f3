"""Several machines: network namespaces where they can be made (Linux, root), otherwise one address for both."""

import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
from conftest import ROOT, run_command
from test_launch import TORCHRUN, TWO_PROCESSES
from test_processes import losses_agree_in_the_first_twenty_steps_of_each_phase

pytestmark = pytest.mark.slow
PATIENCE = 120  # seconds for what takes twenty


class Machine:
    """One of two: what starts a command there, and what takes it off the net."""

    def __init__(self, rank: int, main_ip: str, prefix=(), interface="lo"):
        self.rank, self.main_ip, self.prefix, self.interface, self.process = rank, main_ip, prefix, interface, None

    def launch(self, *command: str) -> None:
        """As docs/scaling-out.md says it."""
        options = ["--multi_gpu", "--num_machines", "2", "--num_processes", "2", "--machine_rank", str(self.rank)]
        options += ["--main_process_ip", self.main_ip, "--main_process_port", "29511"]
        launcher = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", *options]
        env = os.environ | TWO_PROCESSES | {"GLOO_SOCKET_IFNAME": self.interface}
        self.process = subprocess.Popen(
            [*self.prefix, *launcher, *command], cwd=ROOT, env=env, start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def vanish(self) -> None:
        """Without a word: no packet says that it is gone."""
        if self.prefix:
            ip("-n", f"machine{self.rank}", "link", "set", self.interface, "down")
        else:
            for process in (self.process, *psutil.Process(self.process.pid).children(recursive=True)):
                os.kill(process.pid, signal.SIGSTOP)

    def end(self, patience: float = PATIENCE) -> tuple[int, str]:
        """Exit code and stderr."""
        _, said = self.process.communicate(timeout=patience)
        return self.process.returncode, said

    def kill(self) -> None:
        if self.process and self.process.poll() is None:
            for process in (*psutil.Process(self.process.pid).children(recursive=True), self.process):
                process.kill()
            self.process.wait()


def ip(*words: str) -> bool:
    try:
        return subprocess.run(["ip", *words], capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


def connect() -> bool:
    """Two namespaces, a cable between them."""
    made = all(ip("netns", "add", f"machine{rank}") for rank in (0, 1))
    made = made and ip("link", "add", "wire0", "netns", "machine0", "type", "veth", "peer", "name", "wire1",
                       "netns", "machine1")  # fmt: skip
    return made and plug_in()


def plug_in() -> bool:
    return all(
        ip("-n", f"machine{rank}", "addr", "replace", f"10.77.0.{rank + 1}/24", "dev", f"wire{rank}")
        and ip("-n", f"machine{rank}", "link", "set", "lo", "up")
        and ip("-n", f"machine{rank}", "link", "set", f"wire{rank}", "up")
        for rank in (0, 1)
    )


@pytest.fixture
def machines():
    if connect():
        two = [Machine(rank, "10.77.0.1", ("ip", "netns", "exec", f"machine{rank}"), f"wire{rank}") for rank in (0, 1)]
    else:
        two = [Machine(rank, "127.0.0.1") for rank in (0, 1)]
    yield two
    for machine in two:
        machine.kill()
        ip("netns", "del", f"machine{machine.rank}")


def test_two_machines_train_as_one(machines, parquet, tmp_path):
    losses = []
    for folder in ("alone", "together"):
        (tmp_path / folder).mkdir()
        command = ("tests/recorded.py", str(parquet), str(tmp_path / folder), "fp32")
        if folder == "alone":
            result = run_command(*command, launcher=TORCHRUN[:1], env=TWO_PROCESSES)
            assert result.returncode == 0, result.stderr[-3000:]
        else:
            for machine in machines:
                machine.launch(*command)
            for machine in machines:
                code, said = machine.end()
                assert code == 0, said[-3000:]
        losses.append(json.loads((tmp_path / folder / "fp32.json").read_text()))
    assert len(losses[1]["decisions"]) == 2
    assert losses[1]["examples"] == losses[0]["examples"]
    losses_agree_in_the_first_twenty_steps_of_each_phase(*losses)


def test_a_machine_that_vanishes_ends_the_other_and_both_go_on(machines, parquet, tmp_path):
    run = tmp_path / "run"
    command = ["train.py", "--config", "recipes/demo_scratch.yaml", "--data.source", str(parquet)]
    command += ["--data.batch_size", "32", "--phases.train.epochs", "12", "--data.workers", "0"]
    new = ["--output_dir", str(tmp_path), "--run_name", "run", "--timeout_minutes", "0.2"]
    for machine in machines:
        machine.launch(*command, *new)
    deadline = time.monotonic() + PATIENCE
    while not any(run.glob("checkpoints/00001-*")):
        assert time.monotonic() < deadline and machines[0].process.poll() is None
        time.sleep(0.02)
    machines[1].vanish()
    code, said = machines[0].end()  # 12 seconds and what comes after them
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert code == 1 and len(errors) == 1, said[-3000:]
    assert "error: another process of this run has died" in errors[0] and f"--resume {run}" in errors[0]
    machines[1].kill()
    plug_in()
    for machine in machines:
        machine.launch("train.py", "--resume", str(run))
    for machine in machines:
        code, said = machine.end()
        assert code == 0, said[-3000:]
    history = [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in history] == list(range(1, 13))
