import os
import subprocess
import sys

import pytest
from conftest import ROOT


def test_ctrl_c_between_two_commands_parts_shows_no_traceback():
    """Libraries are imported there, for seconds; any other error is shown as ever."""
    for raised, shown in (("KeyboardInterrupt", ""), ("ValueError('odd')", "ValueError: odd")):
        script = f"from errors import reported\nwith reported():\n    pass\nraise {raised}"
        result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
        assert result.returncode != 0
        assert result.stderr.rpartition("\n")[0].endswith(shown) and bool(result.stderr) == bool(shown)


@pytest.mark.parametrize(
    ("rank", "local_rank", "code", "prefix"),
    [(0, 0, 2, "error: "), (8, 0, 2, "[rank 8] error: "), (9, 1, 2, ""), (8, 0, 1, "[rank 8] error: ")],
)
def test_a_wrong_command_is_told_once_on_each_machine(rank, local_rank, code, prefix):
    """What is wrong may be so on one of them alone: a folder that it does not have."""
    script = f"from errors import UserError, reported\nwith reported():\n    raise UserError('odd', {code})"
    environment = os.environ | {"RANK": str(rank), "LOCAL_RANK": str(local_rank), "WORLD_SIZE": "16"}
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (code, prefix and f"{prefix}odd\n")


@pytest.mark.parametrize("opened", [os.pipe, os.openpty])
def test_an_error_that_nobody_reads_keeps_its_exit_code(opened):
    """As under `2>&1 | tee log`, which ends with the same Ctrl-C, or on a closed terminal.

    What is left in buffers can't be written either.
    """
    script = (
        "from errors import Interrupted, reported\nwith reported():\n    print('begun')\n    raise Interrupted('', 2)"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    reader, writer = opened()
    os.close(reader)
    with open(writer, "wb") as unread:
        result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=environment, stdout=unread, stderr=unread)
    assert result.returncode == 130


def test_a_log_is_still_written_if_only_the_terminal_beside_it_is_gone(tmp_path):
    """`python train.py > run.log`: what stands in its buffer belongs there."""
    script = (
        "from errors import Interrupted, reported\nwith reported():\n    print('begun')\n    raise Interrupted('', 2)"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    reader, writer = os.openpty()
    os.close(reader)
    with open(writer, "wb") as gone, open(tmp_path / "log", "wb") as log:
        result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=environment, stdout=log, stderr=gone)
    assert result.returncode == 130
    assert (tmp_path / "log").read_text() == "begun\n"
