import json

import pytest
import torch
from accelerate import Accelerator

import checkpoint
from errors import UserError
from phases import RunState


@pytest.fixture
def prepared():
    accelerator = Accelerator(cpu=True)
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    return accelerator, *accelerator.prepare(model, optimizer)


def step(model, optimizer):
    model(torch.rand(4, 3)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def test_what_is_saved_comes_back_random_state_included(prepared, tmp_path):
    accelerator, model, optimizer = prepared
    step(model, optimizer)
    checkpoint.save(accelerator, RunState(epoch=1, best_top1=0.25), tmp_path)
    expected = []
    for _ in range(2):
        step(model, optimizer)
        expected.append((model.weight.detach().clone(), torch.rand(1)))
    path, state = checkpoint.newest(tmp_path)
    assert state == RunState(epoch=1, best_top1=0.25)
    checkpoint.restore(accelerator, path)
    for weight, drawn in expected:
        step(model, optimizer)
        assert torch.equal(model.weight, weight)
        assert torch.equal(torch.rand(1), drawn)


def test_older_checkpoints_are_pruned_and_the_newest_is_found(prepared, tmp_path):
    accelerator, *_ = prepared
    for epoch in (1, 2, 9, 10, 11):
        checkpoint.save(accelerator, RunState(epoch=epoch), tmp_path)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["00010", "00011"]
    assert checkpoint.newest(tmp_path)[1].epoch == 11


def test_an_unfinished_checkpoint_is_not_taken(prepared, tmp_path):
    accelerator, *_ = prepared
    checkpoint.save(accelerator, RunState(epoch=1), tmp_path)
    accelerator.save_state(str(tmp_path / "checkpoints" / "unfinished"))
    assert checkpoint.newest(tmp_path)[1].epoch == 1
    checkpoint.save(accelerator, RunState(epoch=2), tmp_path)
    assert checkpoint.newest(tmp_path)[1].epoch == 2


def test_the_runs_state_is_json(prepared, tmp_path):
    accelerator, *_ = prepared
    checkpoint.save(accelerator, RunState(epoch=3, minutes=1.5), tmp_path)
    assert json.loads((tmp_path / "checkpoints" / "00003" / "state.json").read_text())["minutes"] == 1.5


def test_nothing_to_resume_and_nothing_left_to_do(tmp_path):
    with pytest.raises(UserError, match="has no checkpoint yet"):
        checkpoint.newest(tmp_path)
    (tmp_path / "summary.json").write_text("{}")
    with pytest.raises(UserError, match="is finished"):
        checkpoint.newest(tmp_path)


def test_a_pickle_that_would_run_code_is_refused(prepared, tmp_path):
    accelerator, *_ = prepared
    checkpoint.save(accelerator, RunState(epoch=1), tmp_path)
    path, _ = checkpoint.newest(tmp_path)
    witness = tmp_path / "witness"

    class Payload:
        def __reduce__(self):
            return (open, (str(witness), "w"))

    for name in ("optimizer.bin", "random_states_0.pkl"):
        good = (path / name).read_bytes()
        torch.save(Payload(), path / name)
        with pytest.raises(Exception, match=r"weights_only|Weights only"):
            checkpoint.restore(accelerator, path)
        assert not witness.exists()
        (path / name).write_bytes(good)
