"""Run by as many processes as are launched, from test_processes.py: train.py's own runs, recorded step by step.

    recorded.py PARQUET FOLDER CASE...

Rank 0 writes FOLDER/CASE.json: for each step the loss of the whole batch and which images were in it; for each epoch
what each process decided on its own; for each evaluation its rows and each process's weights and buffers; whether what
was frozen has stayed so, and what each process drew.
"""

import contextlib
import hashlib
import json
import sys
from pathlib import Path

import torch
from accelerate.utils import gather_object

import engine
import train
from processes import is_main
from recipe import check

PHASES = {
    "head": {"modules": "head", "epochs": 2, "lr": 1e-2, "optimizer": "sgd"},
    "all": {"modules": "all", "epochs": 2, "lr": 1e-2, "optimizer": "sgd"},
}
# Everything on: augmentation, dropout, batch norms that train, a plateau, and an end that comes early.
LIVELY = {
    # So low a rate gains nothing: it falls after six epochs without, and the phase ends after eight.
    "head": {"modules": "head", "epochs": 12, "lr": 1e-6, "schedule": "plateau", "early_stopping": 8},
    "finetune": {"modules": "layer4,head", "epochs": 2, "lr": 1e-3, "schedule": "cosine"},
}
CASES = {
    "fp32": {},
    "fp64": {"double": True},
    "streamed": {"data": {"streaming": True, "shuffle_buffer": 50, "workers": 1}},
    "streamed_again": {"data": {"streaming": True, "shuffle_buffer": 50, "keep_mb": 0}},
    "lively": {"model": "test_resnet", "phases": LIVELY, "policy": "report"},
}


def config_of(case: dict, name: str, parquet: str, folder: str):
    return check(
        {
            "model": {"name": case.get("model", "simple_cnn")},
            "data": {"source": parquet, "batch_size": 16, "workers": 0, "streaming": False} | case.get("data", {}),
            "augment": {"policy": case.get("policy", "none")},
            "phases": case.get("phases", PHASES),
            "tracking": "none",
            "output_dir": folder,
            "run_name": name,
        },
        "here",
    )


def digest(values) -> str:
    return hashlib.blake2b(values.cpu().contiguous().numpy().tobytes(), digest_size=6).hexdigest()


def state_of(model, frozen_alone=False) -> dict[str, str]:
    """Digests of parameters and buffers, all of them or those of the modules that do not train."""
    found = {}
    for name, module in model.named_modules():
        if not frozen_alone or not any(parameter.requires_grad for parameter in module.parameters()):
            for kind in (module.named_parameters, module.named_buffers):
                found |= {f"{name}.{key}": digest(value.detach()) for key, value in kind(recurse=False)}
    return found


def record(config, double: bool) -> dict:
    """Run it with eyes at the loop's two ends: the batches that go in, the steps and decisions that come out."""
    steps, examples, decisions, drawn, frozen, evaluated = [], [], [], [], [], []
    real = {name: getattr(train, name) for name in ("train_epoch", "validate", "EarlyStopping")}
    create, build = train.models.create, train.augment.build

    def created(*args):
        model, origin = create(*args)
        if config.augment.policy == "none":
            for module in model.modules():
                if isinstance(module, torch.nn.Dropout):
                    module.p = 0.0
        return (model.double() if double else model), origin

    def built(*args):
        transforms = build(*args)
        drawn.append(torch.rand(1).item())
        for transform in transforms if double else ():
            transform.register_forward_hook(lambda module, given, images: images.double())
        return transforms

    def watched(loader):
        for batch in loader:
            examples.append(sorted(digest(image) for image in batch["image"]))
            yield batch

    def train_epoch(accelerator, model, loader, *rest):
        bare = accelerator.unwrap_model(model)
        decisions.append(["lr", rest[1].param_groups[0]["lr"]])
        before = state_of(bare, frozen_alone=True)
        for step in real["train_epoch"](accelerator, model, watched(loader), *rest):
            steps.append(accelerator.reduce(step.loss.double(), "mean").item())
            yield step
        frozen.append(state_of(bare, frozen_alone=True) == before)

    def validate(accelerator, model, *rest):
        compute, rows = engine.Classification.compute, []

        def counting(self, *args):
            rows.append(self.waiting + self.sums["counted"] + self.sums["corrupt"])
            return compute(self, *args)

        engine.Classification.compute = counting
        try:
            return real["validate"](accelerator, model, *rest)
        finally:
            engine.Classification.compute = compute
            evaluated.append([rows, state_of(accelerator.unwrap_model(model))])

    class EarlyStopping(real["EarlyStopping"]):
        def step(self, *args):
            decided = super().step(*args)
            decisions.append([*args, self.best, self.bad_epochs, decided])
            return decided

    train.train_epoch, train.validate, train.EarlyStopping = train_epoch, validate, EarlyStopping
    train.models.create, train.augment.build = created, built
    try:
        run = train.train(config)
    finally:
        for name, function in real.items():
            setattr(train, name, function)
        train.models.create, train.augment.build = create, build
    own = {"decisions": decisions, "drawn": drawn, "frozen": frozen, "examples": examples, "evaluated": evaluated}
    everywhere = gather_object([own])
    together = zip(*(each["examples"] for each in everywhere), strict=True)
    return {
        "losses": steps,
        "examples": [sorted(image for share in shares for image in share) for shares in together],
        "history": [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()],
        "test": json.loads((run / "summary.json").read_text()),
        "decisions": [each["decisions"] for each in everywhere],
        "evaluated": [each["evaluated"] for each in everywhere],
        "drawn": [each["drawn"][0] for each in everywhere],
        "frozen": all(all(each["frozen"]) for each in everywhere),
    }


def main(parquet: str, folder: str, *names: str) -> None:
    train.launch.ended = lambda accelerator: contextlib.nullcontext()  # there is another run to come
    for name in names:
        case = CASES[name]
        result = record(config_of(case, name, parquet, folder), case.get("double", False))
        if is_main():
            Path(folder, f"{name}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
