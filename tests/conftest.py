"""What the tests share: caches of their own, a tiny data set, a tiny run, the real command as a child process."""

import atexit
import contextlib
import gc
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

# Before any library is imported: no test may read, or leave anything in, the caches and accounts of whoever runs it.
CACHE = tempfile.mkdtemp(prefix="tests-cache-")
atexit.register(shutil.rmtree, CACHE, ignore_errors=True)
os.environ |= {
    "HF_HOME": CACHE,
    **{f"WANDB_{kind}_DIR": f"{CACHE}/wandb-{kind.lower()}" for kind in ("CACHE", "CONFIG", "DATA")},
    "MPLCONFIGDIR": f"{CACHE}/matplotlib",
    "GIT_CONFIG_GLOBAL": os.devnull,
    "GIT_CONFIG_SYSTEM": os.devnull,
    "NO_PROXY": "127.0.0.1",
    "OMP_WAIT_POLICY": "PASSIVE",  # threads that wait sleep: spinning ones bring a busy machine to a halt
    "WANDB_MODE": "offline",
    "WANDB_SILENT": "true",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
}
UNSET = "HF_ENDPOINT HF_TOKEN HF_HUB_CACHE HUGGINGFACE_HUB_CACHE HF_DATASETS_CACHE XDG_CACHE_HOME"
UNSET += " HF_HUB_OFFLINE HF_DATASETS_OFFLINE TRANSFORMERS_OFFLINE ACCELERATE_MIXED_PRECISION OMP_NUM_THREADS"
UNSET += " PMI_SIZE WANDB_API_KEY GIT_DIR"
if "TORCHELASTIC_RUN_ID" not in os.environ:  # these are of the launcher that started tests/distributed.py
    UNSET += " WORLD_SIZE RANK LOCAL_RANK MASTER_ADDR MASTER_PORT ACCELERATE_USE_CPU"
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # what is told depends on how many there are
for name in UNSET.split():
    os.environ.pop(name, None)

import datasets
import forked
import psutil
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState

import data
import sources
from config import Config, DataConfig
from recipe import check

datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN = 0.1  # 5 seconds after a stream of several files, for their threads
ROOT = Path(__file__).parent.parent
WORKER = os.environ.get("PYTEST_XDIST_WORKER", "").removeprefix("gw")
torch.set_num_threads(1 if WORKER else 2)
if WORKER and hasattr(os, "sched_setaffinity"):
    # A core for each of pytest's workers and its commands: with several threads each, they would wait for one another.
    CORES = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {CORES[int(WORKER) % len(CORES)]})


def pytest_collection_finish() -> None:
    """Each run collects garbage, most of its time if the objects of libraries and tests are looked through."""
    import hypothesis  # noqa: F401  it looks for an object's referrers, and finds none that are frozen

    gc.collect()
    gc.freeze()


def forget_accelerate() -> None:
    """Accelerate keeps its state in singletons: precision, processes, device."""
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


@pytest.fixture(autouse=True)
def _fresh_accelerate():
    yield
    forget_accelerate()


@pytest.fixture(scope="session")
def parquet(tmp_path_factory) -> Path:
    """400 training and 100 test rows of the embedded data as parquet files laid out like a hub dataset's."""
    folder = tmp_path_factory.mktemp("parquet")
    splits = sources.embedded_splits(400, streams=False)
    splits["train"].to_parquet(folder / "train-00000-of-00001.parquet")
    splits["test"].select(range(80)).to_parquet(folder / "test-00000-of-00001.parquet")
    return folder


@pytest.fixture
def image_rows():
    """Make an image data set of the embedded data's first rows: `image_rows(20)`."""

    def make(count: int) -> datasets.Dataset:
        return sources.embedded_splits(max(count, 200), streams=False)["train"].select(range(count))

    return make


def phase(**values) -> dict:
    return {"modules": "all", "epochs": 1, "lr": 1e-3} | values


TWO_PHASES = {"head": phase(modules="head"), "finetune": phase(modules=["layer4", "head"])}


@pytest.fixture
def make_config(tmp_path, parquet):
    """A checked configuration of a tiny run; keywords replace its sections' values: `make_config(data={"fold": 1})`."""

    def make(phases: dict | None = None, **sections) -> Config:
        tree = {
            "model": {"name": "test_resnet"},
            "data": {"source": str(parquet), "batch_size": 32, "workers": 0},
            "phases": phases or TWO_PHASES,
            "output_dir": str(tmp_path / "runs"),
            "run_name": "run",
            "tracking": "none",
        }
        for name, value in sections.items():
            tree[name] = tree.get(name, {}) | value if isinstance(value, dict) else value
        return check(tree, "test")

    return make


@pytest.fixture
def tiny_data(parquet) -> data.Data:
    return data.load(DataConfig(source=str(parquet)))


def run_command(*args: str, env: dict | None = None, launcher=(sys.executable,), timeout: float = 120):
    """Run a command of the project as a user does, from its folder."""
    return subprocess.run(
        [*launcher, *args], cwd=ROOT, env=os.environ | (env or {}), capture_output=True, text=True, timeout=timeout
    )


@pytest.fixture
def command():
    return run_command


@pytest.fixture
def forked_command():
    """As `command`, several seconds sooner, for tests that are not about how a process starts and ends."""
    return lambda *args, env=None, timeout=120: forked.run(args, ROOT, os.environ | (env or {}), timeout)


@pytest.fixture
def long_run(parquet, tmp_path):
    """Start a run that is too long to end by itself, wait for its first epoch, and return (process, run folder)."""
    started = []

    def begin(launcher=(sys.executable,), env=None, *more):
        args = ["train.py", "--config", "recipes/demo_scratch.yaml", "--data.source", str(parquet)]
        args += [
            "--data.workers",
            "1",
            "--data.keep_mb",
            "0",
            "--data.batch_size",
            "32",
            "--phases.train.epochs",
            "1000",
        ]
        args += ["--output_dir", str(tmp_path), "--run_name", "run", *more]
        process = subprocess.Popen(
            [*launcher, *args], cwd=ROOT, env=os.environ | (env or {}), stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE, text=True, start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # pytest may run under nohup
        )  # fmt: skip
        started.append(process)
        history = tmp_path / "run" / "history.jsonl"
        wait_until(lambda: ended(process) or (history.exists() and history.read_text()))
        return process, tmp_path / "run"

    def ended(process):
        assert process.poll() is None, process.stderr.read()

    yield begin
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def wait_until(condition, seconds=120):
    """Look again and again; what the condition gave, once it is true."""
    until = time.monotonic() + seconds
    while not (it := condition()):
        assert time.monotonic() < until, f"nothing for {seconds} s"
        time.sleep(0.05)
    return it


def error_of(process, seconds=60) -> str:
    """What a process that is about to end wrote on stderr; fails if it does not end."""
    try:
        return process.communicate(timeout=seconds)[1]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        pytest.fail(f"still running after {seconds} s:\n{process.communicate()[1]}")


def kill_a_child(process, is_it) -> None:
    """SIGKILL to one of a process's descendants. They may come and go: once per epoch, if loader workers."""

    def killed():
        for child in psutil.Process(process.pid).children(recursive=True):
            try:
                if is_it(child):
                    child.kill()
                    return True
            except psutil.NoSuchProcess:
                pass
        return False

    wait_until(killed)
