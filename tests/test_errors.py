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
