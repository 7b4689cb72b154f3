"""The same run on one, two and four processes: the same images in each step, the same losses, the same decisions."""

import json

import pytest
from conftest import run_command
from recorded import CASES
from test_launch import TORCHRUN, TWO_PROCESSES

STILL = [name for name in CASES if name != "lively"]  # without augmentation, dropout and batch norms


def recorded(parquet, folder, count: int) -> dict:
    """What `recorded.py` wrote on that many processes, by case."""
    folder = folder / str(count)
    folder.mkdir()
    launcher = [*TORCHRUN[:-1], str(count)] if count > 1 else TORCHRUN[:1]
    options = ("tests/recorded.py", str(parquet), str(folder), *CASES)
    result = run_command(*options, launcher=launcher, env=TWO_PROCESSES, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    return {name: json.loads((folder / f"{name}.json").read_text()) for name in CASES}


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_the_same_run(parquet, tmp_path, count):
    """One test, since its runs take long: each check below is one of its claims."""
    alone, together = (recorded(parquet, tmp_path, processes) for processes in (1, count))
    for name in STILL:
        losses_agree_in_the_first_twenty_steps_of_each_phase(alone[name], together[name])
        every_row_of_validation_and_test_counts_once(alone[name], together[name])
    in_float64_losses_agree_throughout(alone["fp64"], together["fp64"])
    for name in CASES:
        each_step_has_the_same_images(alone[name], together[name])
    all_processes_decide_the_same_and_draw_something_else(together["lively"], count)


def losses_agree_in_the_first_twenty_steps_of_each_phase(alone, together):
    steps = len(alone["losses"]) // 2  # of each phase
    assert steps >= 20 and len(together["losses"]) == len(alone["losses"])
    for first in (0, steps):
        span = slice(first, first + 20)
        assert together["losses"][span] == pytest.approx(alone["losses"][span], rel=1e-5)


def in_float64_losses_agree_throughout(alone, together):
    assert together["losses"] == pytest.approx(alone["losses"], rel=1e-5)


def each_step_has_the_same_images(alone, together):
    assert together["examples"] == alone["examples"]
    assert all(len(step) == 16 for step in together["examples"])
    steps = len(together["examples"]) // len(alone["history"])
    epoch = [image for step in together["examples"][:steps] for image in step]
    assert len(set(epoch)) == len(epoch) > 300, "no image twice in an epoch"


def every_row_of_validation_and_test_counts_once(alone, together):
    """83 and 80 rows, of which neither processes nor batches of 16 get equally many."""
    assert [rows for rows, _ in together["evaluated"][0]] == [rows for rows, _ in alone["evaluated"][0]]
    for key in ("val_loss", "val_top1", "val_top5"):
        figures = [[row[key] for row in run["history"]] for run in (alone, together)]
        assert figures[1] == pytest.approx(figures[0], rel=1e-4), key
    for key in ("test_loss", "test_top1", "test_top5"):
        assert together["test"][key] == pytest.approx(alone["test"][key], rel=1e-4), key


def all_processes_decide_the_same_and_draw_something_else(lively, count):
    assert all(decisions == lively["decisions"][0] for decisions in lively["decisions"])
    rates = [lr for kind, lr, *_ in lively["decisions"][0] if kind == "lr"]
    assert rates[:9] == pytest.approx([1e-6] * 7 + [1e-7] * 2), "the plateau's rate falls once"
    assert [row["phase"] for row in lively["history"]].count("head") == 9, "and the phase ends early"
    assert all(evaluated == lively["evaluated"][0] for evaluated in lively["evaluated"]), "batch norms' buffers, too"
    assert len(set(lively["drawn"])) == count
    assert lively["frozen"]
