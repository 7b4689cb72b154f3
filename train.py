"""Train an image classifier in phases.

    accelerate launch train.py                                            # Part 3: ResNet-50 on CIFAR-100, two phases
    accelerate launch --mixed_precision bf16 train.py                     # the same in bf16, on a GPU or a CPU
    accelerate launch --multi_gpu --num_processes 4 train.py              # the same on four GPUs
    accelerate launch train.py --config recipes/deep_cnn.yaml --seed 1    # another recipe, one value overridden
    python train.py --help                                                # every option

A run is a model, a data source and a list of phases. A phase says which modules train, for how many epochs and how;
everything else is frozen. Parts 1 and 2 of the report are runs with one phase, Part 3 is a run with two.
"""

import hub
from config import Config, parse
from errors import UserError, told

if __name__ == "__main__":
    with told():
        CONFIG, RESUME = parse()  # --help and misspelt options are answered here, before torch takes its seconds
        hub.check(CONFIG)  # and the libraries must know before they are imported whether there is a hub

import dataclasses
import json
import math
import time
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, set_seed
from torch import nn
from tqdm import tqdm

import augment
import checkpoint
import data
import launch
import models
from engine import train_epoch, unwrap, validate
from metrics import Classification
from phases import EarlyStopping, RunState, Schedule, make_optimizer
from tracking import Tracking

READ_EVERY = 20  # steps between two looks at the loss: each one waits for the device


def train(config: Config, resume: Path | None = None) -> Path:
    """Run all phases of a configuration and return the run folder, with its summary.json.

    Args:
        resume: a run folder to go on with from its newest checkpoint.

    Raises:
        UserError: anything that the user can mend, from a missing column to a diverging loss.
    """
    accelerator = launch.make_accelerator(config)
    share, micro_batch_size = launch.share_of_batch(config, accelerator)
    path, state = checkpoint.newest(resume) if resume else (None, RunState())

    # Data first: the model's head and its input depend on it.
    source = data.load(config.data)
    processes = launch.local_processes()
    loaders = {
        split: data.loader(source, split, config.data, share, config.seed, processes)
        for split in ("train", "validation")
    }
    size = (config.data.image_size,) * 2 if config.data.image_size else source.size

    # All processes start from the same weights; after that each draws its own augmentation and dropout.
    set_seed(config.seed)
    model, origin = models.create(config.model, source.class_names, size)
    for phase in config.phases.values():
        models.freeze_all_but(model, phase.modules)  # a misspelt module is told now, not after the first phase
    set_seed(config.seed, device_specific=True)
    normalization = {key: model.pretrained_cfg[key] for key in ("mean", "std")}
    transforms = augment.build(
        config.augment.policy, **normalization, image_size=config.data.image_size, size=source.size
    )
    transforms = tuple(transform.to(accelerator.device) for transform in transforms)

    run = resume or make_run_folder(accelerator, config)
    accelerator.print(f"{'resuming' if resume else 'run'} {run} (epoch {state.epoch + 1} is next)")
    accelerator.print(
        f"data: {config.data.source}, {len(source.class_names)} classes from column '{source.label}', ", end=""
    )
    accelerator.print(f"{'streamed' if config.data.streams else 'memory-mapped'}, validation 1/{config.data.folds}")
    accelerator.print(f"model: {config.model.name}, {origin if not resume else f'resumes from {path}'}")
    tracking = Tracking(accelerator, config, run, state.epoch)

    for index, name in enumerate(config.phases):
        if index < state.phase:
            continue
        if path is None and index > 0:
            state.begin_phase(index)
        model = train_phase(
            accelerator, config, name, model, loaders, transforms, state, run, tracking, micro_batch_size, path
        )
        path = None

    # The test split is read here for the first and only time, with the weights that were best on validation.
    checkpoint.load_best(model, run)
    summary = {
        "model": config.model.name,
        "best_epoch": state.best_epoch,
        "best_val_top1": state.best_top1,
        **test(accelerator, config, model, source, transforms[1], share),
        "epochs": state.epoch,
        "minutes": round(state.minutes, 2),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }
    if accelerator.is_main_process:
        (run / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    tracking.finish(summary)
    accelerator.print(f"best validation top-1 {state.best_top1:.2%} in epoch {state.best_epoch}")
    if summary["test_top1"] is not None:
        accelerator.print(f"test top-1 {summary['test_top1']:.2%}, top-5 {summary['test_top5']:.2%}")
    accelerator.print(f"weights: {run}/best   figures: {run}/summary.json, {run}/history.jsonl")
    accelerator.end_training() if not tracking.wandb else None
    return run


def train_phase(
    accelerator: Accelerator,
    config: Config,
    name: str,
    model: nn.Module,
    loaders: dict,
    transforms: tuple[nn.Module, nn.Module],
    state: RunState,
    run: Path,
    tracking: Tracking,
    micro_batch_size: int,
    checkpoint_path: Path | None,
) -> nn.Module:
    """Train one phase to its end, from its last checkpoint if there is one, and return the bare model."""
    phase = config.phases[name]
    training = models.freeze_all_but(model, phase.modules)
    optimizer = make_optimizer(phase, model)
    schedule, stopping = Schedule(optimizer, phase), EarlyStopping(phase.early_stopping)
    # Everything is prepared afresh: a wrapper made for the last phase would not synchronise what was frozen then.
    model, optimizer, train_loader, val_loader = accelerator.prepare(
        model, optimizer, loaders["train"], loaders["validation"]
    )
    if checkpoint_path:
        checkpoint.restore(accelerator, checkpoint_path)
        schedule.load_state_dict(state.schedule)
        stopping = EarlyStopping(**state.early_stopping)

    parameters = dict(accelerator.unwrap_model(model).named_parameters())
    accelerator.print(
        f"phase {name}: trains {', '.join(phase.modules)} "
        f"({sum(parameters[key].numel() for key in training):,} of {sum(p.numel() for p in parameters.values()):,} "
        f"parameters), up to {phase.epochs} epochs, {phase.optimizer}, lr {phase.lr:g}, {phase.schedule}; "
        f"{config.data.batch_size} images a step on {accelerator.num_processes} process(es)"
    )
    metrics = Classification()
    total_epochs = sum(phase.epochs for phase in config.phases.values())
    while state.phase_epoch < phase.epochs and not state.phase_ended:
        began = time.perf_counter()
        lr = optimizer.param_groups[0]["lr"]
        train_loader.set_epoch(state.epoch)
        images = 0
        steps = train_epoch(
            accelerator, model, train_loader, transforms[0], optimizer, metrics, micro_batch_size, config.clip_norm
        )
        with progress_bar(accelerator, train_loader, f"{name} {state.phase_epoch + 1}/{phase.epochs}") as bar:
            for number, step in enumerate(steps):
                images += step.images
                state.step += 1
                bar.update(step.images)
                if number % READ_EVERY == 0:
                    loss = step.loss.item()
                    bar.set_postfix(loss=f"{loss:.3f}")
                    if not math.isfinite(loss):
                        raise UserError(
                            f"the loss became {loss} in phase {name}, epoch {state.epoch + 1}, step {state.step}; lower "
                            f"--phases.{name}.lr or clip with --clip_norm 1. The last good weights are in {run}/best"
                        )
        if not images:
            raise UserError(
                f"the training split has fewer rows than one batch: data.batch_size {config.data.batch_size}"
            )
        trained = metrics.compute(accelerator.gather)
        seconds_training = time.perf_counter() - began
        validated = validate(accelerator, model, val_loader, transforms[1])
        seconds = time.perf_counter() - began

        # Every process has the same figures from here on, and so takes the same decisions.
        state.epoch += 1
        state.phase_epoch += 1
        state.minutes += seconds / 60
        schedule.step(validated["top1"])
        state.phase_ended = stopping.step(validated["top1"])
        state.schedule, state.early_stopping = schedule.state_dict(), dataclasses.asdict(stopping)
        best = state.is_best(validated["top1"])
        row = {"phase": name, "epoch": state.epoch, "phase_epoch": state.phase_epoch, "lr": lr}
        row |= {f"train_{key}": value for key, value in trained.items()}
        row |= {f"val_{key}": value for key, value in validated.items()}
        row |= {
            "seconds": round(seconds, 2),
            "images_per_second": round(images / seconds_training, 1),
            "step": state.step,
        }
        tracking.epoch(row, best, total_epochs)
        if best and accelerator.is_main_process:
            checkpoint.save_best(accelerator.unwrap_model(model), run)
        checkpoint.save(accelerator, state, run)
        if state.phase_ended:
            accelerator.print(f"phase {name} ends early: {stopping.bad_epochs} epochs without gain in validation top-1")
    return unwrap(accelerator, model)


def test(accelerator, config, model, source, transform, share) -> dict[str, float | None]:
    """Figures on the test split, `test_loss`, `test_top1`, `test_top5`; None where the data have no such split."""
    if source.test is None:
        return dict.fromkeys(("test_loss", "test_top1", "test_top5"))
    loader = data.loader(source, "test", config.data, share, config.seed, launch.local_processes())
    model, loader = accelerator.prepare_model(model, evaluation_mode=True), accelerator.prepare(loader)
    return {f"test_{key}": value for key, value in validate(accelerator, model, loader, transform).items()}


def make_run_folder(accelerator: Accelerator, config: Config) -> Path:
    """Create the run's folder with its config.yaml and print the configuration; a run never writes into another's."""
    names = [config.run_name or f"{config.recipe}-{time.strftime('%Y%m%d-%H%M%S')}"]
    run = Path(config.output_dir).expanduser() / broadcast_object_list(names)[0]
    if accelerator.is_main_process:
        try:
            run.mkdir(parents=True)
        except FileExistsError:
            raise UserError(f"{run} exists: go on with --resume {run}, or choose another --run_name") from None
        except OSError as error:
            raise UserError(f"output_dir: {run} can't be made: {error.strerror}") from error
        # Without its name, so that the same configuration can be run again.
        config = dataclasses.replace(config, run_name=None, environment=launch.environment(accelerator))
        (run / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")
        print(config.to_yaml())
    accelerator.wait_for_everyone()
    return run


def progress_bar(accelerator: Accelerator, loader, title: str) -> tqdm:
    """A bar in images, on a terminal and on the main process only."""
    try:
        total = len(loader) * loader.total_batch_size
    except TypeError:  # a stream does not know its length
        total = None
    hidden = None if accelerator.is_main_process else True  # None: hidden unless on a terminal
    return tqdm(total=total, desc=title, unit=" images", leave=False, disable=hidden)


if __name__ == "__main__":
    with told():
        train(CONFIG, RESUME)
