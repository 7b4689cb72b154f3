import json
import math

import pytest
import torch

from config import PhaseConfig
from phases import EarlyStopping, RunState, Schedule, cosine, make_optimizer


def phase(**values):
    return PhaseConfig(**({"modules": "all", "epochs": 20, "lr": 1.0} | values))


def optimizer_and_schedule(**values):
    optimizer = make_optimizer(phase(**values), torch.nn.Linear(2, 2))
    return optimizer, Schedule(optimizer, phase(**values))


def rates(sequence, **values):
    """The learning rate in each epoch, given the validation top-1 that each reaches."""
    optimizer, schedule = optimizer_and_schedule(**values)
    seen = []
    for top1 in sequence:
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step(top1)
    return [*seen, optimizer.param_groups[0]["lr"]]


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_a_first_step_that_is_left_out_leaves_nothing_behind(monkeypatch, optimizer):
    """As fp16's gradient scaler does it, whose first scale is mostly too large."""
    monkeypatch.setattr(torch, "empty_like", lambda like, **_: torch.full_like(like, torch.nan))  # what memory may hold
    torch.manual_seed(0)
    models = [torch.nn.Linear(2, 2) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    for model, left_out in zip(models, (1.0, 0.0), strict=True):
        made = make_optimizer(phase(optimizer=optimizer, lr=0.1), model)
        for found_inf in (left_out, 0.0, 0.0)[not left_out :]:
            for parameter in model.parameters():
                parameter.grad = torch.full_like(parameter, torch.nan if found_inf else 0.5)
            made.found_inf = torch.tensor(found_inf)
            made.step()
    for one, two in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(one, two)


def test_cosine_falls_from_one_to_zero():
    factors = [cosine(epoch, 10) for epoch in range(11)]
    assert factors[0] == 1
    assert factors[5] == pytest.approx(0.5)
    assert factors[10] == pytest.approx(0)
    assert factors == sorted(factors, reverse=True)


def test_cosine_schedule_follows_the_pure_function():
    expected = [cosine(epoch, 20) for epoch in range(21)]
    assert rates([0.5] * 20, schedule="cosine") == pytest.approx(expected)


def test_constant_schedule():
    assert rates([0.1, 0.9, 0.2], schedule="constant") == [1, 1, 1, 1]


def test_plateau_waits_for_more_than_five_epochs_without_gain():
    # One gain, then ties: a tie is no gain. Five of them are patience, the sixth lowers the rate.
    assert rates([0.3] * 7, schedule="plateau") == [1] * 7 + [pytest.approx(0.1)]


def test_plateau_counts_the_smallest_gain():
    assert rates([0.3 + 1e-9 * i for i in range(15)], schedule="plateau") == [1] * 16


def test_plateau_counts_afresh_after_a_reduction():
    seen = rates([0.5] + [0.4] * 12, schedule="plateau")
    assert seen[6:8] == [1, pytest.approx(0.1)]
    assert seen[12:] == [pytest.approx(0.1), pytest.approx(0.01)]


def test_early_stopping_on_a_scripted_sequence():
    stopping = EarlyStopping(patience=3)
    sequence = [0.1, 0.2, 0.2, 0.19, 0.21, 0.21, 0.2, 0.1]
    assert [stopping.step(top1) for top1 in sequence] == [False] * 7 + [True]
    assert stopping.best == 0.21


def test_early_stopping_can_be_off():
    stopping = EarlyStopping(patience=None)
    assert not any(stopping.step(0.0) for _ in range(100))


def end_epoch(state, top1, schedule, stopping):
    """An epoch's end, as in train.py; half a minute each."""
    schedule.step(top1)
    state.stopped = stopping.step(top1)
    return state.end_epoch(top1, 30.0, schedule, stopping)


@pytest.mark.parametrize("schedule", ["plateau", "cosine", "constant"])
def test_state_survives_json(schedule):
    optimizer, made = optimizer_and_schedule(schedule=schedule)
    state = RunState()
    stopping = EarlyStopping(3)
    for top1 in (0.1, 0.3, 0.2):
        optimizer.step()
        end_epoch(state, top1, made, stopping)
    restored = RunState(**json.loads(json.dumps(state.state_dict())))
    assert restored == state
    other_optimizer, other = optimizer_and_schedule(schedule=schedule)
    other_optimizer.load_state_dict(optimizer.state_dict())
    other.load_state_dict(restored.schedule)
    again = EarlyStopping(**restored.early_stopping)
    for top1 in (0.2,) * 12:
        made.step(top1)
        other.step(top1)
        assert stopping.step(top1) == again.step(top1)
        assert optimizer.param_groups[0]["lr"] == other_optimizer.param_groups[0]["lr"]


def test_best_spans_the_run_and_counters_start_afresh_in_each_phase():
    _, schedule = optimizer_and_schedule()
    state, stopping = RunState(), EarlyStopping(2)
    assert end_epoch(state, 0.5, schedule, stopping)
    assert not end_epoch(state, 0.5, schedule, stopping), "a tie is not better"
    assert not end_epoch(state, 0.4, schedule, stopping)
    assert state.stopped
    state.begin_phase(1)
    assert not state.stopped
    assert not end_epoch(state, 0.45, schedule, EarlyStopping(2)), "the best weights span the run"
    assert (state.best_epoch, state.epoch, state.phase_epoch, state.phase) == (1, 4, 1, 1)
    assert math.isclose(state.minutes, 2)


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd"])
def test_the_optimizer_holds_what_trains_and_nothing_else(name):
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    model[0].requires_grad_(False)
    optimizer = make_optimizer(phase(optimizer=name, weight_decay=0.25, momentum=0.5), model)
    assert type(optimizer).__name__.lower() == name
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(p) for p in model[1].parameters()]
    assert optimizer.param_groups[0]["weight_decay"] == 0.25
    if name == "sgd":
        assert optimizer.param_groups[0]["momentum"] == 0.5
