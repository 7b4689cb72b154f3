"""docs/slurm.sh, with stand-ins for Slurm's two commands that do what the script asks of them."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT
from test_launch import TWO_PROCESSES

SRUN = """#!/bin/bash
# One machine; signals are handed on to the step.
SLURM_NODEID=0 "$@" &
trap 'kill -USR1 $!' USR1
wait $!
wait $!
"""
SCONTROL = """#!/bin/bash
if [ "$1" = show ]; then echo "$3"; else echo "$@" >> "$REQUEUED"; fi
"""


@pytest.mark.slow
def test_a_job_that_is_told_to_stop_is_queued_again_and_goes_on(parquet, tmp_path):
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    (tmp_path / "torchrun").write_text(f'#!/bin/bash\nexec {sys.executable} -m torch.distributed.run "$@"\n')
    (tmp_path / "torchrun").chmod(0o755)
    job, requeued = f"test-{os.getpid()}", tmp_path / "requeued"
    env = os.environ | TWO_PROCESSES | {
        "PATH": f"{tmp_path}:{os.environ['PATH']}", "REQUEUED": str(requeued), "SLURM_JOB_ID": job, "PORT": "29512",
        "SLURM_JOB_NODELIST": "127.0.0.1", "SLURM_NNODES": "1", "SLURM_CPUS_PER_TASK": "2", "SLURM_GPUS_ON_NODE": "2",
    }  # fmt: skip
    options = ["--config", "recipes/demo_scratch.yaml", "--data.source", str(parquet), "--data.workers", "0"]
    options += ["--data.batch_size", "32", "--phases.train.epochs", "30"]
    # The script names its run itself, below the folder that it is started in.
    for name in ("train.py", "recipes"):
        (tmp_path / name).symlink_to(ROOT / name)
    run = tmp_path / "runs" / f"slurm-{job}"

    def submit():
        return subprocess.Popen(
            ["bash", ROOT / "docs" / "slurm.sh", *options], cwd=tmp_path, env=env, text=True,
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip

    first = submit()
    deadline = time.monotonic() + 120
    while not any(run.glob("checkpoints/00001-*")):
        assert first.poll() is None and time.monotonic() < deadline, first.communicate()
        time.sleep(0.05)
    first.send_signal(signal.SIGUSR1)
    _, said = first.communicate(timeout=60)
    assert first.returncode != 0 and "stopped by SIGUSR1; go on with:" in said, said[-3000:]
    assert requeued.read_text() == f"requeue {job}\n"
    stopped_at = epochs(run)
    assert stopped_at[-1] < 30
    _, said = submit().communicate(timeout=240)
    assert epochs(run) == list(range(1, 31)), said[-3000:]
    assert (run / "summary.json").is_file()
    assert requeued.read_text() == f"requeue {job}\n", "a job that has ended is not queued again"


def epochs(run: Path) -> list[int]:
    return [json.loads(line)["epoch"] for line in (run / "history.jsonl").read_text().splitlines()]


def test_the_script_is_submitted():
    env = {key: value for key, value in os.environ.items() if not key.startswith("SLURM")}
    result = subprocess.run(["bash", ROOT / "docs" / "slurm.sh"], env=env, capture_output=True, text=True)
    assert result.returncode == 2 and "sbatch docs/slurm.sh" in result.stderr


@pytest.mark.parametrize("option", ["--output_dir", "--run_name=mine", "--resume"])
def test_what_the_script_says_itself_is_refused(option):
    env = os.environ | {"SLURM_JOB_ID": "1"}
    result = subprocess.run(["bash", ROOT / "docs" / "slurm.sh", option], env=env, capture_output=True, text=True)
    assert result.returncode == 2 and f"leave {option} out" in result.stderr
