"""Processes that take turns, so that a busy machine is busy for all that are compared.

A benchmark starts itself again with `--measure NAME`, once for each thing it measures. The child reports when it is
ready, then does one piece of work per request, an epoch for example.
"""

import argparse
import atexit
import datetime
import functools
import json
import math
import os
import platform
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from errors import UserError


def prepare() -> None:
    """Call before importing libraries: no progress bars, and a datasets cache deleted when the parent ends."""
    os.environ |= {"HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "TQDM_DISABLE": "1"}
    if "HF_DATASETS_CACHE" not in os.environ:
        os.environ["HF_DATASETS_CACHE"] = folder = tempfile.mkdtemp(prefix="benchmark-")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)


# ---- in the child ---------------------------------------------------------------------------------------------------


def answer(work: Callable[[], Iterable | None]) -> None:
    """Take a turn with each value that `work` yields (unless it takes its turns itself).

    The first value says what it is, and that it is ready.
    """
    import torch

    import processes

    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    torch.set_num_threads(processes.cores_per_process())
    for value in work() or ():
        take(value)


def take(value) -> None:
    """Send a value to the parent and wait to be asked again; exit if it is gone."""
    os.write(WAY_OUT, (json.dumps({"turn": value}) + "\n").encode())
    if not sys.stdin.readline():
        sys.exit()


WAY_OUT = os.dup(1)  # measured code may print to stdout, so turns have their own channel


# ---- in the parent --------------------------------------------------------------------------------------------------


class Clock:
    """Seconds, without those for which this process and its children were stopped.

    So a benchmark of hours can be paused when its machine is needed: SIGTSTP (Ctrl-Z) to the parent stops the whole
    process group, SIGCONT to the group (`fg`, `kill -CONT -- -GROUP`) resumes it.
    """

    def __init__(self):
        self.stopped = 0.0

    def __call__(self) -> float:
        return time.perf_counter() - self.stopped

    def stop(self, *_) -> None:
        """Handle SIGTSTP."""
        began = time.perf_counter()
        os.killpg(0, signal.SIGSTOP)
        self.stopped += time.perf_counter() - began


clock = Clock()


class Process:
    """A measured process. It starts at once, alongside others, until `ready` waits for it.

    Args:
        arguments: for the running script, which is started again.
        precision: Accelerate's mixed precision; None: bf16, unless this machine would have to emulate it.
        launcher: the command before the script.
    """

    def __init__(self, name: str, *arguments, precision: str | None = None, launcher=(sys.executable,)):
        command = [*launcher, sys.argv[0], *map(str, arguments), "--measure", name]
        env = {"ACCELERATE_MIXED_PRECISION": precision or fast_precision(), "HF_HUB_OFFLINE": "1"}
        self.name, self.values, self.seconds = name, [], 0.0
        signal.signal(signal.SIGTSTP, clock.stop)
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | env
        )

    @functools.cached_property
    def ready(self):
        """Its first value."""
        return self._hear()

    def turn(self):
        """Let it work; return its value, also kept in `values`. `seconds` adds up the time of all turns."""
        _ = self.ready  # waits for it
        began = clock()
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        self.values.append(self._hear())
        self.seconds += clock() - began
        return self.values[-1]

    def end(self) -> None:
        self.process.stdin.close()
        self.process.wait()

    def _hear(self):
        for line in self.process.stdout:
            if line.startswith('{"turn"'):
                return json.loads(line)["turn"]
        sys.exit(f"{self.name} has ended with exit code {self.process.wait()}")


def fast_precision() -> str:
    """bf16, unless this machine is known to have no instructions for it."""
    import torch

    import launch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return "no" if launch.has_bf16(device) is False else "bf16"


def alternate(processes: list[Process], rounds: int) -> None:
    """Rounds of turns, in an order reversed each time, after a warm-up that is discarded."""
    for number in range(rounds + 1):
        for process in processes[:: -1 if number % 2 else 1]:
            process.turn()
            if not number:
                process.values.clear()


def ratio(process: Process, other: Process) -> tuple[float, list[float]]:
    """The median of the rounds' own ratios, and the lowest and the highest.

    Within a round, a slow machine is slow for both.
    """
    ratios = [one / two for one, two in zip(process.values, other.values, strict=True)]
    return round(statistics.median(ratios), 3), [round(min(ratios), 3), round(max(ratios), 3)]


# ---- the command line ------------------------------------------------------------------------------------------------


def positive(text: str) -> int:
    """argparse type: a whole number from 1."""
    return count(text, 1)


def seconds(text: str) -> float:
    """argparse type: a length of time."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"should be a number of seconds above 0, not {text}")
    return value


def count(text: str, least: int = 0) -> int:
    """argparse type: a whole number from `least`."""
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"should be a whole number of at least {least}, not {text}")
    return int(text)


def check_shares(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Exit with an error if the batch can't be split equally."""
    if odd := [processes for processes in args.processes if args.batch_size % processes]:
        parser.error(f"--batch_size: {args.batch_size} images can't be divided equally among {odd[0]} processes")


def output(text: str) -> Path:
    """argparse type of --output: a name in an existing folder."""
    if not Path(text).parent.is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {Path(text).parent}")
    return Path(text)


def source(text: str) -> str:
    """argparse type of --data: 'embedded', or existing parquet."""
    from config import DataConfig

    try:
        kind = DataConfig(source=text).kind
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    if kind not in ("embedded", "parquet"):
        raise argparse.ArgumentTypeError(f"should be embedded, or a folder of parquet, not {text}")
    return text


def add_options(parser: argparse.ArgumentParser, name: str) -> None:
    """Add --data, and --output with this default."""
    parser.add_argument(
        "--data", type=source, default="embedded", help="32x32 images: folder of parquet, or embedded [embedded]"
    )
    parser.add_argument(
        "--output", type=output, default=Path(name), help=f"name of what is written, without end [{name}]"
    )


# ---- conditions of the figures --------------------------------------------------------------------------------------


def on_gpu() -> bool:
    return not device_name().endswith("CPU cores")


def device_name() -> str:
    import torch

    import processes

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{processes.cores_per_process()} CPU cores"


def launched(processes: int, *arguments) -> list[str]:
    """Start the running script again on that many processes, with `--measure`; return the lines it prints."""
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command += [sys.argv[0], *map(str, arguments), "--measure"]
    # Without a GPU, each would otherwise believe it is alone.
    env = os.environ | {"ACCELERATE_USE_CPU": str(not on_gpu()).lower()}
    result = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True)
    if result.returncode:
        sys.exit(f"{processes} processes ended with exit code {result.returncode}")
    return result.stdout.splitlines()


def conditions() -> dict:
    """Commit, date, command, machine and versions, and the machine's fast precision."""
    words = [re.sub(r"[^=]*/", "", word) for word in sys.argv[1:]]  # without folders
    made = {"commit": commit(), "date": str(datetime.date.today())}
    made["command"] = shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *words])
    return made | machine() | {"precision": fast_precision().replace("no", "fp32")}


def commit() -> str:
    """The commit of the working tree, marked if anything that figures depend on has changed since.

    Not a recipe's "Measured on" line: results.py writes it, and it stays uncommitted while later rows train.
    """
    git, makes = ["git", "-C", str(ROOT)], ("--", "*.py", "recipes", "accelerate_config.yaml", "requirements.txt")
    changes = (
        ["diff", "-I", "^# Measured on ", "HEAD", *makes],
        ["ls-files", "--others", "--exclude-standard", *makes],
    )
    try:
        name = subprocess.run([*git, "rev-parse", "--short=7", "HEAD"], capture_output=True, text=True).stdout.strip()
        looks = [subprocess.run([*git, *words], capture_output=True) for words in changes]
    except OSError:
        return "unknown"
    changed = any(look.returncode or look.stdout for look in looks)  # git before 2.30 has no -I
    return f"{name}{' and changes' * changed}" if name else "unknown"


def machine() -> dict:
    """Machine, threads and versions."""
    from importlib.metadata import version

    import torch

    import processes

    names = ("torch", "torchvision", "timm", "accelerate", "datasets")
    return {
        "device": device_name(),
        "machine": _processor(),
        "threads": processes.cores_per_process(),
        "system": platform.system(),
        "python": platform.python_version(),
        **{name: version(name) for name in names},
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        **({"cuda": torch.version.cuda} if torch.cuda.is_available() else {}),
    }


def _processor() -> str:
    """The architecture, and on Linux the processor."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    named = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return f"{platform.machine()} {named}".strip()


def tell(said: dict) -> None:
    print(", ".join(f"{name} {value}" for name, value in said.items()), flush=True)


def save(path: Path, said: dict, rows: list[dict]) -> None:
    """Write a list of rows as JSON. Each has its own conditions, so that rows of several runs can be merged."""
    lines = ",\n".join(json.dumps(row | {"conditions": said}) for row in rows)
    path.with_suffix(".json").write_text(f"[\n{lines}\n]\n")


def subset(source: str, rows: int, folder: Path) -> Path:
    """The first rows of a source as parquet below `folder`, so that an epoch is as long as a turn."""
    from datasets import Image

    import data
    import decoding
    from config import DataConfig

    options = {"embedded_rows": max(200, rows)} if source == "embedded" else {}
    # Not the 50 folds of the variants, which would leave them no rows to hold out.
    opened = data.load(DataConfig(source=source, test_split=None, folds=7, **options))
    train = opened.train.select(range(min(rows, len(opened.train)))).remove_columns(decoding.ROW)
    path = folder / f"rows-{rows}"
    path.mkdir(exist_ok=True)
    train.cast_column(opened.image, Image()).to_parquet(path / "train.parquet")
    return path
