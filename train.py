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
import sys
import time
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, set_seed

import augment
import checkpoint
import data
import launch
import models
from engine import train_epoch, unwrap, validate
from metrics import Classification
from phases import EarlyStopping, RunState, Schedule, make_optimizer
from tracking import Tracking, check_finite


def train(config: Config, resume: Path | None = None) -> Path:
    """Run all phases of a configuration and return the run folder, with its summary.json.

    Args:
        resume: a run folder to go on with from its newest checkpoint.

    Raises:
        UserError: anything that the user can mend, from a missing column to a diverging loss.
    """
    accelerator = launch.make_accelerator(config)
    share, micro_batch_size = launch.share_of_batch(config, accelerator)
    if resume:
        launch.check_same(config.environment, accelerator)
    saved, state = checkpoint.newest(resume) if resume else (None, RunState())

    models.check(config.model)
    config.runs_folder()  # one that can't be written is told before data are read
    # Data come before the model: its head and its input depend on them.
    source = data.load(config.data)
    train_rows = data.loader(source, "train", config.data, share, config.seed)
    validation_rows = data.loader(source, "validation", config.data, share, config.seed)

    # All processes start from the same weights; from then on each draws its own augmentation and dropout.
    set_seed(config.seed)
    model, origin = models.create(config.model, source.class_names, data.model_size(source, config.data))
    for phase in config.phases.values():
        models.freeze_all_but(model, phase.modules)  # a misspelt module is told now, not after the first phase
    set_seed(config.seed, device_specific=True)
    train_transform, transform = augment.build(config, model.pretrained_cfg, source.size, accelerator.device)

    run = resume or make_run_folder(accelerator, config)
    tracking = Tracking(accelerator, config, run, epochs_done=state.epoch)
    accelerator.print(f"run: {run}")
    accelerator.print(f"data: {data.describe(source, config.data)}")
    accelerator.print(
        f"model: {config.model.name} from {saved or origin} (order: resume, weights, pretrained, scratch)"
    )

    for index, (name, phase) in enumerate(config.phases.items()):
        if index < state.phase:
            continue
        if index > state.phase:
            state.begin_phase(index)

        # Everything is prepared afresh in each phase: a wrapper made before parameters were unfrozen would not
        # synchronise them. The schedule is not prepared, since Accelerate would step it once per process.
        trained_names = models.freeze_all_but(model, phase.modules)
        optimizer = make_optimizer(phase, model)
        schedule, stopping = Schedule(optimizer, phase), EarlyStopping(phase.early_stopping)
        model, optimizer, train_loader, val_loader = accelerator.prepare(model, optimizer, train_rows, validation_rows)
        if saved:
            checkpoint.restore(accelerator, saved)
            schedule.load_state_dict(state.schedule)
            stopping = EarlyStopping(**state.early_stopping)
            saved = None
        accelerator.print(describe_phase(accelerator, config, name, model, trained_names))

        while state.phase_epoch < phase.epochs and not state.stopped:
            began, lr, images = time.perf_counter(), optimizer.param_groups[0]["lr"], 0
            train_loader.set_epoch(state.epoch)
            metrics = Classification()
            steps = train_epoch(
                accelerator,
                model,
                train_loader,
                train_transform,
                optimizer,
                metrics,
                micro_batch_size,
                config.clip_norm,
            )
            title = f"phase {name}, epoch {state.epoch + 1}"
            for step in tracking.watch(steps, title, data.images_in(train_loader)):
                images += step.images
                state.step += 1
            if not images:
                raise UserError(f"the training split has fewer rows than data.batch_size {config.data.batch_size}")
            trained = metrics.compute(accelerator.gather)
            check_finite(trained["loss"], title)
            training_ended = time.perf_counter()
            validated = validate(accelerator, model, val_loader, transform)
            ended = time.perf_counter()

            # From here on every process has the same figures, and so takes the same decisions.
            schedule.step(validated["top1"])
            best = state.end_epoch(validated["top1"], ended - began, schedule, stopping)
            row = {"phase": name, "epoch": state.epoch, "phase_epoch": state.phase_epoch, "step": state.step, "lr": lr}
            row |= {f"train_{key}": value for key, value in trained.items()}
            row |= {f"val_{key}": value for key, value in validated.items()}
            row |= {"seconds": ended - began, "images_per_second": images / (training_ended - began)}
            for what, figures in (("training", trained), ("validation", validated)):
                if "corrupt" in figures:
                    accelerator.print(f"{title}: {figures['corrupt']} {what} images can't be decoded", file=sys.stderr)
            tracking.epoch(row, best, total=sum(phase.epochs for phase in config.phases.values()))
            if best and accelerator.is_main_process:
                checkpoint.save_best(accelerator.unwrap_model(model), run)
            checkpoint.save(accelerator, state, run)

        if state.phase_epoch < phase.epochs:
            accelerator.print(
                f"phase {name} ended early: {stopping.bad_epochs} epochs without gain in validation top-1"
            )
        model = unwrap(accelerator, model)

    # The test split is read here for the first and only time, with the weights that were best on validation.
    checkpoint.load_best(model, run)
    tested = dict.fromkeys(("loss", "top1", "top5"))
    if source.test is not None:
        model = accelerator.prepare_model(model, evaluation_mode=True)
        test_loader = accelerator.prepare(data.loader(source, "test", config.data, share, config.seed))
        tested = validate(accelerator, model, test_loader, transform)
    summary = {"model": config.model.name, "best_epoch": state.best_epoch, "best_val_top1": state.best_top1}
    summary |= {f"test_{key}": value for key, value in tested.items()}
    summary |= {"epochs": state.epoch, "minutes": state.minutes}
    summary |= {"parameters": sum(parameter.numel() for parameter in model.parameters())}
    tracking.finish(summary)
    accelerator.print(describe_summary(summary, run))
    return run


def make_run_folder(accelerator: Accelerator, config: Config) -> Path:
    """Create the run's folder with its config.yaml and print the configuration; a run never writes into another's."""
    names = [config.run_name or f"{config.recipe}-{time.strftime('%Y%m%d-%H%M%S')}"]
    run = config.runs_folder() / broadcast_object_list(names)[0]
    if accelerator.is_main_process:
        try:
            run.mkdir(parents=True)
        except FileExistsError:
            raise UserError(f"{run} exists: go on with --resume {run}, or choose another --run_name") from None
        except OSError as error:
            raise UserError(f"output_dir: {run} can't be made: {error.strerror}") from error
        # Recorded without its name, so that the same configuration can be run again as it is.
        settled = dataclasses.replace(config.data, streaming=config.data.streams)
        config = dataclasses.replace(config, data=settled, run_name=None, environment=launch.environment(accelerator))
        (run / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")
        print(config.to_yaml())
    accelerator.wait_for_everyone()
    if not (run / "config.yaml").is_file():
        raise UserError(
            f"output_dir: {run} was made by the main process, but this machine can't see it; share the folder"
        )
    return run


def describe_phase(accelerator: Accelerator, config: Config, name: str, model, trained_names: list[str]) -> str:
    phase, parameters = config.phases[name], dict(accelerator.unwrap_model(model).named_parameters())
    trained, total = sum(parameters[key].numel() for key in trained_names), sum(p.numel() for p in parameters.values())
    return (
        f"phase {name}: trains {', '.join(phase.modules)} ({trained:,} of {total:,} parameters) for up to "
        f"{phase.epochs} epochs; {phase.optimizer}, lr {phase.lr:g} {phase.schedule}; {config.data.batch_size} images "
        f"a step on {accelerator.num_processes} x {accelerator.device.type}, precision {accelerator.mixed_precision}"
    )


def describe_summary(summary: dict, run: Path) -> str:
    lines = [f"best validation top-1 {summary['best_val_top1']:.2%} in epoch {summary['best_epoch']}"]
    if summary["test_top1"] is not None:
        lines.append(f"test top-1 {summary['test_top1']:.2%}, top-5 {summary['test_top5']:.2%}")
    return "\n".join([*lines, f"weights: {run}/best   figures: {run}/history.jsonl, {run}/summary.json"])


if __name__ == "__main__":
    with told():
        train(CONFIG, RESUME)
