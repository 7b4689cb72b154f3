"""Commands as forks of a process that has imported the slowest libraries, which are four of a start's five seconds.

For tests that need a command, but not its start and its end: those are another process's.
"""

import gc
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

SERVER = multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")
# None of them reads the variables that tests set, as the libraries around the hub do.
SERVER.set_forkserver_preload(["torch", "torch._dynamo", "torchvision", "scipy.stats", "pandas", "pyarrow.dataset"])


def run(args: tuple[str, ...], cwd: Path, env: dict[str, str], timeout: float) -> subprocess.CompletedProcess:
    """As subprocess.run does for `python SCRIPT ...` or `python -c CODE ...`, with the output captured."""
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, name) for name in ("stdout", "stderr")]
        process = SERVER.Process(target=_as_command, args=(args, cwd, env, files))
        process.start()
        process.join(timeout)
        late = process.exitcode is None
        process.kill()
        process.join()
        output = [file.read_text() for file in files]
        if late:
            raise subprocess.TimeoutExpired(args, timeout, *output)
        return subprocess.CompletedProcess(args, process.exitcode, *output)


def _as_command(args: tuple[str, ...], cwd: Path, env: dict[str, str], files: list[Path]) -> None:
    gc.freeze()
    multiprocessing.set_start_method(None, force=True)  # its own workers start as they would without all this
    for number, file in enumerate(files, 1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    sys.path.insert(0, str(cwd if args[0] == "-c" else Path(args[0]).resolve().parent))
    if args[0] == "-c":
        sys.argv[:] = ["-c", *args[2:]]
        exec(args[1], {"__name__": "__main__"})
    else:
        sys.argv[:] = args
        runpy.run_path(args[0], run_name="__main__")
