import errno
import json
import os
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file

import checkpoint
from checkpoint import Checkpoints
from config import CheckpointConfig
from errors import UserError
from metrics import Classification
from phases import RunState


@pytest.fixture
def prepared(tmp_path):
    accelerator = Accelerator(cpu=True)
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    model, optimizer = accelerator.prepare(model, optimizer)
    return accelerator, model, optimizer


def step(model, optimizer):
    model(torch.rand(4, 3)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def some_rows():
    metrics = Classification()
    for labels in ([0, 1, 2], [0, 6, 13, 14]):
        rows = len(labels)
        metrics.add(torch.rand(rows), torch.arange(5 * rows).view(rows, 5), torch.tensor(labels))
    return metrics


def save(accelerator, run, metrics=None, keep=2, **state):
    store = Checkpoints(accelerator, CheckpointConfig(keep=keep), run, {"data": {"rows": 7}})
    store.save(RunState(**state), metrics or Classification())


def draws():
    return random.random(), np.random.rand(), torch.rand(1).item()


@pytest.mark.parametrize("summed_up_at", [2, 4, 1000])
def test_what_is_saved_comes_back_random_states_and_the_epochs_figures_included(
    prepared, tmp_path, monkeypatch, summed_up_at
):
    monkeypatch.setattr("metrics.CHUNK", summed_up_at)
    accelerator, model, optimizer = prepared
    step(model, optimizer)
    metrics = some_rows()
    save(accelerator, tmp_path, metrics, epoch=1, epoch_step=3, step=9, best_top1=0.25)
    expected = []
    for _ in range(2):
        step(model, optimizer)
        expected.append((model.weight.detach().clone(), draws()))
    saved = checkpoint.newest(tmp_path)
    assert saved.state == RunState(epoch=1, epoch_step=3, step=9, best_top1=0.25)
    assert saved.facts == {"data": {"rows": 7}}
    epoch = checkpoint.restore(accelerator, saved, tmp_path)
    for weight, drawn in expected:
        step(model, optimizer)
        assert torch.equal(model.weight, weight)
        assert draws() == drawn
    again = Classification()
    again.load_state_dict(epoch, torch.device("cpu"))
    assert again.compute() == metrics.compute()


def test_a_part_of_best_is_not_taken_for_it(prepared, tmp_path):
    """As a run leaves it that was killed while it wrote its first one."""
    accelerator, *_ = prepared
    (tmp_path / "best").mkdir()
    (tmp_path / "best" / "config.json").write_text("{}")
    save(accelerator, tmp_path, step=5)
    assert not (checkpoint.newest(tmp_path).path / "best").exists()


def test_a_copy_that_somebody_made_is_neither_resumed_from_nor_removed(prepared, tmp_path):
    accelerator, *_ = prepared
    save(accelerator, tmp_path, epoch=1, step=5)
    first = checkpoint.newest(tmp_path).path
    copy = first.with_name(f"{first.name}.good")
    shutil.copytree(first, copy)
    save(accelerator, tmp_path, epoch=2, step=10, keep=1)
    assert checkpoint.newest(tmp_path).state.step == 10
    assert copy.is_dir() and not first.exists()


def test_a_checkpoint_just_written_is_not_written_again(prepared, tmp_path, monkeypatch):
    """As when a signal comes at a step after which one was due, or once more in the validation of a resumed run."""
    accelerator, *_ = prepared
    store = Checkpoints(accelerator, CheckpointConfig(keep=1), tmp_path, {})
    store.save(RunState(epoch=1, step=5), Classification())
    monkeypatch.setattr(accelerator, "save_state", lambda _: pytest.fail("written again"))
    store.save(RunState(epoch=1, step=5), Classification())
    saved = checkpoint.newest(tmp_path)
    resumed = Checkpoints(accelerator, CheckpointConfig(keep=1), tmp_path, {}, saved)
    resumed.save(saved.state, Classification())
    assert checkpoint.newest(tmp_path).state.step == 5


def test_older_checkpoints_are_pruned_and_the_newest_is_found(prepared, tmp_path):
    accelerator, *_ = prepared
    for epoch, number in ((0, 5), (1, 10), (1, 15), (9, 90), (10, 100)):
        save(accelerator, tmp_path, epoch=epoch, step=number)
    names = [path.name for path in checkpoint._folders(tmp_path)]
    assert names == ["00009-000000090", "00010-000000100"]
    assert checkpoint.newest(tmp_path).state.epoch == 10
    save(accelerator, tmp_path, keep=1, epoch=11, step=110)
    assert len(checkpoint._folders(tmp_path)) == 1


def test_what_is_newer_than_the_checkpoint_that_was_resumed_is_pruned_too(prepared, tmp_path):
    accelerator, *_ = prepared
    for number in (4, 8):
        save(accelerator, tmp_path, epoch=0, step=number)
    (checkpoint._folders(tmp_path)[-1] / "model.safetensors").unlink()
    save(accelerator, tmp_path, keep=1, epoch=0, step=6)
    assert [path.name for path in checkpoint._folders(tmp_path)] == ["00000-000000006"]


def test_an_unfinished_checkpoint_is_not_taken(prepared, tmp_path):
    accelerator, *_ = prepared
    save(accelerator, tmp_path, epoch=1)
    accelerator.save_state(str(tmp_path / "checkpoints" / "unfinished"))
    assert checkpoint.newest(tmp_path).state.epoch == 1
    save(accelerator, tmp_path, epoch=2)
    assert checkpoint.newest(tmp_path).state.epoch == 2


def test_the_runs_state_is_json(prepared, tmp_path):
    accelerator, *_ = prepared
    save(accelerator, tmp_path, epoch=3, minutes=1.5)
    content = json.loads((checkpoint._folders(tmp_path)[0] / "state.json").read_text())
    assert content["state"]["minutes"] == 1.5
    assert len(content["state"]["tracker_id"]) == 32


def test_nothing_to_resume_and_nothing_left_to_do(tmp_path):
    assert checkpoint.newest(tmp_path) is None
    (tmp_path / "summary.json").write_text("{}")
    with pytest.raises(UserError, match="is finished"):
        checkpoint.newest(tmp_path)


# ---- torn checkpoints -------------------------------------------------------------------------------------------

FILES = ("model.safetensors", "optimizer.bin", "random_states_0.pkl", "state.json", "epoch_0.safetensors",
         "best/model.safetensors", "best/config.json", "manifest.json")  # fmt: skip


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory):
    run = tmp_path_factory.mktemp("run")
    accelerator = Accelerator(cpu=True)
    model = torch.nn.Linear(3, 2)
    accelerator.prepare(model, torch.optim.Adam(model.parameters()))
    (run / "best").mkdir()
    for epoch in (1, 2):
        for name in checkpoint.BEST:
            (run / "best" / name).write_text(f"best of epoch {epoch}")
        save(accelerator, run, some_rows(), epoch=epoch)
    return run


@pytest.mark.parametrize(
    "damage", [truncate, flip, lambda path: path.unlink()], ids=["truncated", "flipped", "missing"]
)
@pytest.mark.parametrize("name", FILES)
def test_a_torn_checkpoint_is_named_and_the_one_before_is_used(two_checkpoints, tmp_path, capsys, name, damage):
    run = shutil.copytree(two_checkpoints, tmp_path / "run")
    older, newer = checkpoint._folders(run)
    assert {path.relative_to(newer).as_posix() for path in newer.rglob("*") if path.is_file()} == set(FILES)
    damage(newer / name)
    saved = checkpoint.newest(run)
    assert (saved.path, saved.state.epoch) == (older, 1)
    told = capsys.readouterr().err
    assert str(newer) in told and name in told and len(told.splitlines()) == 1

    damage(older / name)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=r"run has no intact checkpoint") as caught:
        checkpoint.newest(run)
    assert str(older) in str(caught.value) and str(newer) in str(caught.value)
    assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}, "nothing is overwritten"


@pytest.mark.skipif(not os.path.isfile("/proc/self/mem"), reason="uses a file that can't be read, as Linux has it")
@pytest.mark.parametrize("name", ["optimizer.bin", "manifest.json"])
def test_a_checkpoint_that_can_not_be_read_is_torn(two_checkpoints, tmp_path, capsys, name):
    """As on a disk with a bad sector: the system's answer is an I/O error."""
    run = shutil.copytree(two_checkpoints, tmp_path / "run")
    older, newer = checkpoint._folders(run)
    (newer / name).unlink()
    (newer / name).symlink_to("/proc/self/mem")
    assert checkpoint.newest(run).path == older
    told = capsys.readouterr().err
    assert str(newer) in told and name in told and len(told.splitlines()) == 1


def test_every_single_bit_of_the_manifest_counts(two_checkpoints, tmp_path):
    """The manifest has no checksum of its own: no flipped bit may leave it valid."""
    run = shutil.copytree(two_checkpoints, tmp_path / "run")
    newer = checkpoint._folders(run)[-1]
    manifest = newer / "manifest.json"
    whole = manifest.read_bytes()
    assert checkpoint._fault(newer) is None
    for position in range(0, len(whole), 3):
        for bit in (0, 3, 5):
            content = bytearray(whole)
            content[position] ^= 1 << bit
            manifest.write_bytes(content)
            assert checkpoint._fault(newer), (position, bit)


def test_a_file_that_nobody_wrote_there_makes_a_checkpoint_torn(two_checkpoints, tmp_path):
    run = shutil.copytree(two_checkpoints, tmp_path / "run")
    (checkpoint._folders(run)[-1] / "scheduler.bin").write_bytes(b"x")
    assert "scheduler.bin" in checkpoint._fault(checkpoint._folders(run)[-1])


@pytest.mark.parametrize("name", [".DS_Store", "best/._config.json", "desktop.ini"])
def test_what_file_managers_leave_damages_nothing(two_checkpoints, tmp_path, name):
    run = shutil.copytree(two_checkpoints, tmp_path / "run")
    newest = checkpoint._folders(run)[-1]
    (newest / name).parent.mkdir(exist_ok=True)
    (newest / name).touch()
    assert checkpoint._fault(newest) is None
    assert checkpoint.newest(run).path == newest


def test_an_old_checkpoint_that_can_not_be_removed_does_not_end_the_run(prepared, tmp_path, monkeypatch, capsys):
    """As on Windows, if one of its files is open."""
    accelerator, *_ = prepared
    save(accelerator, tmp_path, keep=1, epoch=1)

    def held(path, **_):
        raise PermissionError(errno.EACCES, "is in use", str(path))

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "_remove", lambda path: held(path) if path.exists() else None)
        save(accelerator, tmp_path, keep=1, epoch=2)
    assert "00001-000000000 can't be removed: is in use" in capsys.readouterr().err
    save(accelerator, tmp_path, keep=1, epoch=3)
    assert [path.name for path in checkpoint._folders(tmp_path)] == ["00003-000000000"]


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="needs Linux's list of mapped files")
def test_a_checkpoint_that_was_restored_is_not_held(prepared, tmp_path):
    """Windows can't remove a file that is mapped."""
    accelerator, *_ = prepared
    save(accelerator, tmp_path, some_rows(), epoch=1)
    kept = checkpoint.restore(accelerator, checkpoint.newest(tmp_path), tmp_path)
    assert kept["labels"].tolist() == [0, 1, 2, 0, 6, 13, 14]
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()


def test_whatever_stands_in_a_checkpoints_place_gives_way(prepared, tmp_path):
    accelerator, *_ = prepared
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "kept").touch()
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "00001-000000003").symlink_to(tmp_path / "mine")
    (tmp_path / "checkpoints" / "00002-000000006").write_text("")
    for epoch in (1, 2):
        save(accelerator, tmp_path, epoch=epoch, step=3 * epoch)
    assert checkpoint.newest(tmp_path).state.epoch == 2
    assert not any(path.is_symlink() for path in (tmp_path / "checkpoints").iterdir())
    assert (tmp_path / "mine" / "kept").exists()


def test_best_goes_back_to_what_it_was_at_the_checkpoint(prepared, tmp_path):
    """An epoch that is trained again may have written a better one already."""
    accelerator, *_ = prepared
    (tmp_path / "best").mkdir()
    for name in checkpoint.BEST:
        (tmp_path / "best" / name).write_text("then")
    save(accelerator, tmp_path, epoch=1)
    for name in checkpoint.BEST:
        (tmp_path / "best" / name).write_text("later")
    checkpoint.restore(accelerator, checkpoint.newest(tmp_path), tmp_path)
    assert {path.name: path.read_text() for path in (tmp_path / "best").iterdir()} == dict.fromkeys(
        checkpoint.BEST, "then"
    )


def test_random_states_that_can_not_be_restored_are_an_error(prepared, tmp_path):
    """Accelerate would go on without a word."""
    accelerator, *_ = prepared
    save(accelerator, tmp_path, epoch=1)
    saved = checkpoint.newest(tmp_path)
    path = saved.path / "random_states_0.pkl"
    states = checkpoint.load_safely(path)
    for wrong in (dict(states, torch_manual_seed=torch.zeros(3, dtype=torch.uint8)), dict(states, random_state=None)):
        torch.save(wrong, path)
        with pytest.raises(UserError, match="no matching random states for process 0"):
            checkpoint.restore(accelerator, saved, tmp_path)
    path.unlink()
    with pytest.raises(UserError, match="no matching random states for process 0"):
        checkpoint.restore(accelerator, saved, tmp_path)


def test_a_pickle_that_would_run_code_is_refused(prepared, tmp_path):
    accelerator, *_ = prepared
    save(accelerator, tmp_path, epoch=1)
    saved = checkpoint.newest(tmp_path)
    witness = tmp_path / "witness"

    class Payload:
        def __reduce__(self):
            return (open, (str(witness), "w"))

    for name in ("optimizer.bin", "random_states_0.pkl"):
        good = (saved.path / name).read_bytes()
        torch.save(Payload(), saved.path / name)
        (saved.path / "manifest.json").unlink()
        checkpoint._seal(saved.path)  # an attacker can write manifests, too
        with pytest.raises(UserError, match="holds a pickle that could run code"):
            checkpoint.restore(accelerator, checkpoint.newest(tmp_path), tmp_path)
        assert not witness.exists()
        (saved.path / name).write_bytes(good)


# ---- when -------------------------------------------------------------------------------------------------------


def test_checkpoints_are_due_by_steps_and_by_minutes(prepared, tmp_path, monkeypatch):
    accelerator, *_ = prepared
    by_steps = Checkpoints(accelerator, CheckpointConfig(every_steps=4, every_minutes=None), tmp_path, {})
    assert [number for number in range(1, 13) if by_steps.due(RunState(step=number))] == [4, 8, 12]
    clock = iter([0.0, 100.0, 119.0, 120.0])
    monkeypatch.setattr(checkpoint.time, "monotonic", lambda: next(clock))
    by_minutes = Checkpoints(accelerator, CheckpointConfig(every_minutes=2), tmp_path, {})
    assert [by_minutes.due(RunState(step=number)) for number in (1, 2, 3)] == [False, False, True]


def test_weights_are_named_as_the_model_names_them_whatever_wraps_it(tmp_path):
    """As torch.compile does, which a resumed run may be launched without."""
    accelerator = Accelerator(cpu=True)
    model = accelerator.prepare(torch.nn.Linear(3, 2))
    accelerator._models[:] = [torch.compile(model, backend="eager")]
    assert list(accelerator._models[0].state_dict()) == ["_orig_mod.weight", "_orig_mod.bias"]
    save(accelerator, tmp_path, epoch=1, step=9)
    path = checkpoint.newest(tmp_path).path / "model.safetensors"
    saved = load_file(path)
    assert sorted(saved) == ["bias", "weight"]
    for prefix in ("", "module.", "_orig_mod."):  # as older code wrote them
        save_file({f"{prefix}{name}": value for name, value in saved.items()}, path)
        for wrapped in (model, torch.compile(model, backend="eager")):
            torch.nn.init.zeros_(model.weight)
            checkpoint._load_weights(accelerator, [wrapped], path.parent)
            assert torch.equal(model.weight, saved["weight"])
    outer = torch.nn.Module()
    outer.module = model  # whose weights are called so themselves
    save_file({f"module.{name}": value for name, value in saved.items()}, path)
    torch.nn.init.zeros_(model.weight)
    checkpoint._load_weights(accelerator, [outer], path.parent)
    assert torch.equal(model.weight, saved["weight"])


def test_random_states_of_gpus_that_are_not_used_do_not_count():
    states = {
        "random_state": random.getstate(), "numpy_random_seed": np.random.get_state(),
        "torch_manual_seed": torch.get_rng_state(), "torch_cuda_manual_seed": [torch.zeros(16)] * 3,
    }  # fmt: skip
    assert checkpoint._settle_random_states(states, torch.device("cpu"))


def test_what_could_not_be_kept_takes_no_room(tmp_path, monkeypatch):
    model = timm.create_model("test_resnet", num_classes=2)
    model.pretrained_cfg = model.pretrained_cfg | {"label_names": ["a", "b"]}
    checkpoint.save_best(model, tmp_path)
    before = sorted(tmp_path.rglob("*"))

    def full(*given, **_):
        if len(given) == 2:  # the model, and the folder to write it into
            Path(given[1]).mkdir()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for place in ("save_for_hf", "to_disk"):
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, place, full)
            with pytest.raises(OSError, match="No space left"):
                checkpoint.save_best(model, tmp_path)
        assert sorted(tmp_path.rglob("*")) == before, place


def test_a_checkpoint_is_on_the_disk_before_it_has_its_name(prepared, tmp_path, monkeypatch):
    """Else a power cut could leave a checkpoint by its right name, and without its content."""
    done, to_disk, replace = [], checkpoint.to_disk, os.replace
    monkeypatch.setattr(checkpoint, "to_disk", lambda path: (done.append(path), to_disk(path)))
    monkeypatch.setattr(checkpoint, "replace", lambda *paths: (done.append(paths), replace(*paths)))
    save(prepared[0], tmp_path, epoch=1, step=9)
    (saved,) = checkpoint._folders(tmp_path)
    unfinished = saved.with_name("unfinished")
    renamed = done.index((unfinished, saved))
    assert {unfinished / path.relative_to(saved) for path in [saved, *saved.rglob("*")]} == set(done[:renamed])
    assert done[renamed + 1 :] == [saved.parent]


def test_weights_that_share_memory_are_all_saved(tmp_path):
    """Of one module under two names, and of two views of one storage, such as cuDNN makes of an LSTM's weights."""

    def make(value: float):
        model, storage = torch.nn.Module(), torch.full((8,), value)
        model.one = model.other = torch.nn.Linear(2, 2)
        model.left, model.right = (torch.nn.Parameter(part) for part in storage.chunk(2))
        return model

    accelerator = Accelerator(cpu=True)
    model = accelerator.prepare(make(1.0))
    save(accelerator, tmp_path, epoch=1, step=9)
    saved = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    checkpoint.restore(accelerator, checkpoint.newest(tmp_path), tmp_path)
    assert all(torch.equal(value, saved[name]) for name, value in model.state_dict().items())

    coat = timm.create_model("coat_lite_tiny", num_classes=2)
    coat.pretrained_cfg = coat.pretrained_cfg | {"label_names": ["a", "b"]}
    checkpoint.save_best(coat, tmp_path)
    loaded = timm.create_model(f"local-dir:{tmp_path / 'best'}", pretrained=True).state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in coat.state_dict().items())
