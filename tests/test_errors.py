import subprocess
import sys

from conftest import ROOT


def test_ctrl_c_between_two_commands_parts_shows_no_traceback():
    """Libraries are imported there, for seconds; any other error is shown as ever."""
    for raised, shown in (("KeyboardInterrupt", ""), ("ValueError('odd')", "ValueError: odd")):
        script = f"from errors import reported\nwith reported():\n    pass\nraise {raised}"
        result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
        assert result.returncode != 0
        assert result.stderr.rpartition("\n")[0].endswith(shown) and bool(result.stderr) == bool(shown)
