"""Run by torchrun on two processes, from test_launch.py: asserts on every rank, and rank 0 prints what it measured."""

import hashlib
import json
import os
import sys

import torch
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.utils import GradientAccumulationPlugin, gather_object, set_seed
from conftest import phase
from test_faults import Small
from torch import nn

import data
import launch
import loading
import metrics
import models
import streaming
from config import DataConfig, ModelConfig, PhaseConfig
from engine import train_epoch, unwrap, validate
from errors import UserError
from faults import explained, fitting_micro_batch
from phases import make_optimizer
from processes import on_all, on_main, raised_on_all
from recipe import check

SGD = PhaseConfig(modules="all", epochs=1, lr=0.05, optimizer="sgd")


def digest(model: nn.Module, prefixes: tuple[str, ...] = ("",)) -> str:
    state = {key: value for key, value in model.state_dict().items() if key.startswith(prefixes)}
    return hashlib.sha256(b"".join(value.cpu().numpy().tobytes() for value in state.values())).hexdigest()


def same_everywhere(value) -> bool:
    return len(set(gather_object([json.dumps(value)]))) == 1


def a_loss_that_is_not_finite_on_one_process(accelerator: Accelerator, model: nn.Module) -> None:
    """Only rank 1 sees it, in its third step; nobody applies that update or a later one, and all know since when."""
    batch = {"image": torch.rand(4, 3, 32, 32), "label": torch.arange(4)}
    prepared, optimizer = accelerator.prepare(model, make_optimizer(SGD, model))
    calls, digests, unapplied = [], [], []

    def transform(images):
        calls.append(1)
        return images * (torch.nan if accelerator.process_index == 1 and len(calls) == 3 else 1)

    parameters = tuple(name for name, _ in model.named_parameters())
    for step in train_epoch(accelerator, prepared, [batch] * 5, transform, optimizer, metrics.Classification(), 4):
        unapplied.append(int(step.unapplied))
        digests.append(digest(model, parameters))
    assert unapplied == [0, 0, 1, 2, 3], (accelerator.process_index, unapplied)
    assert digests[0] != digests[1] and len(set(digests[1:])) == 1
    assert same_everywhere(digests)


def parameters_that_take_no_part_are_told(accelerator: Accelerator) -> None:
    model = models.create(ModelConfig(name="test_resnet"), list("abcd"), (32, 32))[0]
    model.forgotten = nn.Linear(2, 2)
    prepared, optimizer = accelerator.prepare(model, make_optimizer(SGD, model))
    batch = {"image": torch.rand(4, 3, 32, 32), "label": torch.arange(4)}
    try:
        with explained("go on", accelerator, 4):
            list(train_epoch(accelerator, prepared, [batch] * 3, nn.Identity(), optimizer, metrics.Classification(), 4))
    except UserError as error:
        assert "can't train parameters that take no part in the loss, as some here do (" in str(error)
    else:
        raise AssertionError("nothing was said")


def a_micro_batch_that_fits_everywhere(accelerator: Accelerator) -> None:
    """Rank 0 has memory for 18 images, rank 1 for 5."""
    config = check({"phases": {"only": phase()}}, "here")
    model = Small(18 if accelerator.process_index == 0 else 5)
    transform = nn.Module()
    transform.forward = lambda images: images / 255
    assert fitting_micro_batch(accelerator, config, model, transform, (8, 8), 32) == 4
    assert model.seen == []  # tried on copies


def corrupt_images(accelerator: Accelerator, corrupted: str) -> None:
    """Skipped on one process, they cost the others no batch, and all count as many."""
    config = DataConfig(source=corrupted, streaming=False, workers=0, batch_size=4, folds=2, on_corrupt="skip")
    source = data.load(config)
    model, _ = models.create(ModelConfig(name="test_resnet"), source.class_names, source.size)
    model, optimizer, train_rows, test_rows = accelerator.prepare(
        model,
        make_optimizer(SGD, model),
        loading.loader(source, "train", config, 2),
        loading.loader(source, "test", config, 4),
    )
    metrics.CHUNK = 8  # so that figures are summed up on each process before the epoch's end
    collected, transform = metrics.Classification(), lambda images: images.float() / 255
    steps = sum(1 for _ in train_epoch(accelerator, model, train_rows, transform, optimizer, collected, 2))
    trained, tested = collected.compute(gather_object), validate(accelerator, model, test_rows, transform, 4)
    assert steps == len(source.train) // 4 and tested["corrupt"] == 2
    assert same_everywhere([steps, trained, tested])
    metrics.CHUNK = 2**16


def a_resumed_epoch_goes_on_behind_its_first_steps(accelerator: Accelerator, parquet: str) -> None:
    """Of a stream and of memory-mapped rows, to the last step and behind it; afterwards epochs are whole again."""
    for streamed in (True, False):
        launch.dispatch(accelerator, streamed)
        config = DataConfig(source=parquet, streaming=streamed, workers=0, shuffle_buffer=50)
        loader = accelerator.prepare(loading.loader(data.load(config), "train", config, 16))

        def images(epoch, steps, loader=loader):
            loader.set_epoch(epoch)
            return [batch["image"].sum().item() for batch in loading.skip_batches(accelerator, loader, steps)]

        images(0, 0)
        whole = images(1, 0)
        assert len(whole) > 5
        for steps in (3, len(whole)):
            assert images(1, steps) == whole[steps:], (streamed, steps)
        assert images(1, 0) == whole
        accelerator.free_memory()
    launch.dispatch(accelerator, streamed=False)


def too_few_rows_are_told(accelerator: Accelerator, parquet: str) -> None:
    """Accelerate would give one process more than there is; only the main one reads and raises."""
    config = DataConfig(source=parquet, streaming=True, workers=0)
    rows = streaming.First(data.load(config).test, 1)
    if accelerator.is_main_process:
        try:
            list(rows)
        except UserError as error:
            assert "1 rows are too few for 2 processes" in str(error)
        else:
            raise AssertionError("nothing was said")


def an_error_of_one_process_is_raised_on_all(accelerator: Accelerator) -> None:
    """Whichever it is; if the others went on, they would wait for it for half an hour."""

    def fail():
        raise UserError("no more room", 7)

    def at_once(failing):
        with raised_on_all():
            if accelerator.process_index == failing:
                fail()

    def of(failing):
        return lambda: fail() if accelerator.process_index == failing else "well"

    for attempt in (
        lambda: at_once(0),
        lambda: at_once(1),
        lambda: on_main(fail),
        lambda: on_all(of(0)),
        lambda: on_all(of(1)),
    ):
        try:
            attempt()
        except UserError as error:
            assert (str(error), error.exit_code) == ("no more room", 7)
        else:
            raise AssertionError("this process has heard of nothing")
    assert on_main(lambda: accelerator.process_index) == 0
    assert on_all(lambda: accelerator.process_index) == [0, 1]


def folders_that_differ_are_told(parquet: str, corrupted: str) -> None:
    """As on machines with disks of their own."""
    for folders in ((parquet, corrupted), (corrupted, parquet)):
        try:
            data.load(DataConfig(source=folders[int(os.environ["RANK"])], streaming=False, on_corrupt="skip"))
        except UserError as error:
            assert "is not the same on all machines (30 + 30 rows, 400 + 80 rows)" in str(error), error
        else:
            raise AssertionError("nothing was said")


def main(parquet: str, corrupted: str) -> None:
    accelerator = Accelerator(
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1, sync_with_dataloader=False),
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True),
    )
    assert accelerator.num_processes == 2
    set_seed(0)
    result = {}

    # Validation: every row once, for row counts that do not divide, memory-mapped and streamed.
    for streamed in (False, True):
        set_seed(0)
        launch.dispatch(accelerator, streamed)
        config = DataConfig(source=parquet, streaming=streamed, workers=0)
        source = data.load(config)
        model, _ = models.create(ModelConfig(name="test_resnet"), source.class_names, source.size)
        prepared = accelerator.prepare_model(model, evaluation_mode=True)
        rows = accelerator.prepare(loading.loader(source, "validation", config, 7))
        result[f"validate_{'streamed' if streamed else 'mapped'}"] = validate(
            accelerator, prepared, rows, lambda images: images.float() / 255, 3
        )
        accelerator.free_memory()

    launch.dispatch(accelerator, streamed=False)
    # Two phases: after each, all ranks hold the same weights, and what was frozen is what it was.
    set_seed(0)
    model, _ = models.create(ModelConfig(name="test_resnet"), list("abcd"), (32, 32))
    config = DataConfig(source=parquet, streaming=False, workers=0)
    source = data.load(config)
    set_seed(0, device_specific=True)
    assert len(set(gather_object([torch.rand(1).item()]))) == 2, "no two ranks draw the same randomness"
    for modules in (("head",), ("layer3", "layer4", "head")):
        trained = tuple(m if m != "head" else "fc" for m in modules)
        frozen = tuple(name for name, _ in model.named_children() if name not in trained)
        before = digest(model, frozen)
        models.freeze_all_but(model, modules)
        optimizer = make_optimizer(PhaseConfig(modules=modules, epochs=1, lr=0.05, optimizer="sgd"), model)
        prepared, optimizer, rows = accelerator.prepare(model, optimizer, loading.loader(source, "train", config, 16))
        collected = metrics.Classification()

        def to_four_classes(loader):
            for batch in loader:
                yield {"image": batch["image"], "label": batch["label"] % 4}

        steps = train_epoch(
            accelerator, prepared, to_four_classes(rows), lambda images: images.float() / 255, optimizer, collected, 16
        )
        images = sum(step.images for step in steps)
        gathered = collected.compute(gather_object)
        model = unwrap(accelerator, prepared)
        assert same_everywhere(gathered), "every rank has the same figures"
        buffers = tuple(name for name, _ in model.named_buffers())
        parameters = tuple(name for name, _ in model.named_parameters() if name not in buffers)
        assert len(set(gather_object([digest(model, parameters)]))) == 1, f"ranks diverged in {modules}"
        assert digest(model, frozen) == before, f"{frozen} were frozen and changed"
        result[modules[0]] = images

    a_resumed_epoch_goes_on_behind_its_first_steps(accelerator, parquet)
    too_few_rows_are_told(accelerator, parquet)
    an_error_of_one_process_is_raised_on_all(accelerator)
    folders_that_differ_are_told(parquet, corrupted)
    a_micro_batch_that_fits_everywhere(accelerator)
    corrupt_images(accelerator, corrupted)
    accelerator.free_memory()
    parameters_that_take_no_part_are_told(accelerator)
    accelerator.free_memory()
    set_seed(0)
    a_loss_that_is_not_finite_on_one_process(
        accelerator, models.create(ModelConfig(name="test_resnet"), list("abcd"), (32, 32))[0]
    )
    if accelerator.is_main_process:
        print(json.dumps(result))
    accelerator.end_training()


if __name__ == "__main__":
    main(*sys.argv[1:])
