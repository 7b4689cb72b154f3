"""Run by torchrun on two processes, from test_launch.py: asserts on every rank, and rank 0 prints what it measured."""

import hashlib
import json
import sys

import torch
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.utils import GradientAccumulationPlugin, gather_object, set_seed
from torch import nn

import data
import models
from config import DataConfig, ModelConfig, PhaseConfig
from engine import train_epoch, unwrap, validate
from metrics import Classification
from phases import make_optimizer


def digest(model: nn.Module, prefixes: tuple[str, ...] = ("",)) -> str:
    state = {key: value for key, value in model.state_dict().items() if key.startswith(prefixes)}
    return hashlib.sha256(b"".join(value.cpu().numpy().tobytes() for value in state.values())).hexdigest()


def main(parquet: str) -> None:
    accelerator = Accelerator(
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1, sync_with_dataloader=False),
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True),
    )
    assert accelerator.num_processes == 2
    set_seed(0)
    result = {}

    # Validation: every row once, for row counts that do not divide, memory-mapped and streamed.
    for streaming in (False, True):
        set_seed(0)
        config = DataConfig(source=parquet, streaming=streaming, workers=0)
        source = data.load(config)
        model, _ = models.create(ModelConfig(name="test_resnet"), source.class_names, source.size)
        prepared = accelerator.prepare_model(model, evaluation_mode=True)
        rows = accelerator.prepare(data.loader(source, "validation", config, 7, seed=0))
        result[f"validate_{'streamed' if streaming else 'mapped'}"] = validate(
            accelerator, prepared, rows, lambda images: images.float() / 255, 3
        )
        accelerator.free_memory()

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
        prepared, optimizer, rows = accelerator.prepare(
            model, optimizer, data.loader(source, "train", config, 16, seed=0)
        )
        metrics = Classification()

        def to_four_classes(loader):
            for batch in loader:
                yield {"image": batch["image"], "label": batch["label"] % 4}

        steps = train_epoch(
            accelerator, prepared, to_four_classes(rows), lambda images: images.float() / 255, optimizer, metrics, 16
        )
        images = sum(step.images for step in steps)
        gathered = metrics.compute(accelerator.gather)
        model = unwrap(accelerator, prepared)
        assert len(set(gather_object([json.dumps(gathered)]))) == 1, "every rank has the same figures"
        buffers = tuple(name for name, _ in model.named_buffers())
        parameters = tuple(name for name, _ in model.named_parameters() if name not in buffers)
        assert len(set(gather_object([digest(model, parameters)]))) == 1, f"ranks diverged in {modules}"
        assert digest(model, frozen) == before, f"{frozen} were frozen and changed"
        result[modules[0]] = images
    if accelerator.is_main_process:
        print(json.dumps(result))
    accelerator.end_training()


if __name__ == "__main__":
    main(sys.argv[1])
