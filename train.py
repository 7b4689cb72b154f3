"""Train an image classifier in phases.

    accelerate launch train.py                                            # Part 3: ResNet-50 on CIFAR-100, two phases
    accelerate launch --mixed_precision bf16 train.py                     # the same in bf16, on a GPU or a CPU
    accelerate launch --multi_gpu --num_processes 4 train.py              # the same batches, shared by four GPUs
    accelerate launch train.py --config recipes/deep_cnn.yaml --seed 1    # another recipe, one value overridden
    accelerate launch train.py --resume runs/NAME                         # continue a stopped or killed run
    python train.py --help                                                # every option

A run is a model, a data source and a list of phases. A phase says which modules train, for how many epochs and how;
everything else is frozen. Parts 1 and 2 of the report are runs with one phase, Part 3 is a run with two.
"""

import hub
import workers
from commandline import parse
from config import Config
from errors import Interrupted, reported

if __name__ == "__mp_main__":  # a loader's worker that was not forked; what it imports here takes seconds
    workers.outlive_signals()
if __name__ == "__main__":
    with reported():
        CONFIG, RESUME = parse()  # answers --help and misspelt options before torch takes its seconds
        hub.check(CONFIG, RESUME)  # the libraries read at import time whether to work offline

import contextlib
import time
from functools import partial
from pathlib import Path

from accelerate.utils import gather_object, set_seed
from torch import nn

import augment
import checkpoint
import data
import faults
import folding
import graphs
import launch
import loading
import models
import profiling
import runs
import sharing
from engine import bare, train_epoch, unwrap, validate
from interrupt import Interrupt
from metrics import Classification
from phases import EarlyStopping, RunState, Schedule, make_optimizer
from processes import on_main
from tracking import Tracking

NOT_JUDGED = {"loss": None, "top1": None, "top5": None}  # for a split that does not exist


def train(config: Config, resume: Path | None = None) -> Path:
    """Run all phases of a configuration and return the run folder, with its summary.json.

    Args:
        resume: a run folder, to continue from its newest checkpoint.

    Raises:
        UserError: anything the user can fix, from a missing column to a diverging loss.
        Interrupted: a signal came; if anything was trained, a checkpoint holds all of it.
    """
    accelerator = launch.make_accelerator(config)
    if config.push_to_hub:
        on_main(lambda: sharing.check(config.push_to_hub))
    if not resume:
        launch.hint_at_launch(accelerator, config.environment)
        config = runs.settled(accelerator, config)
    with contextlib.ExitStack() as stack:
        run = stack.enter_context(runs.opened(accelerator, config, resume))
        resume_hint = launch.resume_hint(accelerator, run, config.push_to_hub)
        saved = checkpoint.newest(run)
        state = saved.state if saved else RunState()
        if resume:
            config = runs.check_changes(accelerator, config, run, phases_begun=state.phase + 1 if saved else 0)
        share, micro_batch_size = launch.share_of_batch(config, accelerator)
        explained = partial(faults.explained, resume_hint, accelerator, run=run, resumed=bool(resume))
        stack.enter_context(explained(micro_batch_size))

        # Data come before the model, whose head and input depend on them.
        start = models.without_weights(config.model) if saved else config.model
        models.check(start)
        source = data.load(config.data, config.seed)
        launch.dispatch(accelerator, data.is_streamed(source))
        data.check_batch(source, config.data)
        size = data.model_size(source, config.data)

        # All processes start from the same weights; from then on each draws its own augmentation and dropout.
        set_seed(config.seed)
        model, origin = models.create(start, source.class_names, size)
        model = launch.suited(model, accelerator.device)
        facts = {"data": data.facts(source), "pretrained_cfg": model.pretrained_cfg}
        if saved:
            saved.check_same("data", facts["data"])
            model.pretrained_cfg = facts["pretrained_cfg"] = saved.facts["pretrained_cfg"]
        for phase in config.phases.values():
            models.freeze_all_but(model, phase.modules)  # reports a misspelt module now, not after the first phase
        set_seed(config.seed, device_specific=True)
        augmentation, transform = augment.build(config, model.pretrained_cfg, accelerator.device)
        if config.data.micro_batch_size == "auto":
            micro_batch_size = faults.fitting_micro_batch(accelerator, config, model, augmentation, size, share)
            stack.enter_context(explained(micro_batch_size))  # inside the one above, as only this size is right now
            config = runs.record(config, run, micro_batch_size=micro_batch_size)
            accelerator.print(f"data.micro_batch_size auto: {micro_batch_size} images fit in a forward pass")
        elif resume:
            runs.record(config, run)  # only now that all of it is known to be valid
        mix = augment.mixing(config.augment.mix, micro_batch_size)
        if config.cuda_graphs and accelerator.device.type == "cuda":
            augmentation = graphs.Replayed(augmentation)
        if micro_batch_size == share:
            launch.tune_allocator(accelerator.device)
        accelerator.gradient_accumulation_steps = share // micro_batch_size
        if config.sync_batch_norm:  # only after the trial steps, in which processes must not wait for one another
            model = models.synchronised(model)

        accelerator.print(f"{config.to_yaml()}\nrun: {run}\ndata: {data.describe(source, config.data)}")
        accelerator.print(
            f"model: {config.model.name} from {saved.path if saved else origin} "
            "(order: resume, weights, pretrained, scratch)"
        )
        if not resume:
            launch.hint_at_speed(accelerator)
        tracking = stack.enter_context(Tracking(accelerator, config, run, state))
        checkpoints = checkpoint.Checkpoints(accelerator, config.checkpoint, run, facts, saved)
        interrupt = stack.enter_context(Interrupt(accelerator, resume_hint))
        stack.enter_context(launch.ended(accelerator))

        source = loading.keep_decoded(source, config.data, accelerator.device, interrupt.watch)
        train_size = None if data.is_streamed(source) else len(source.train)
        accelerator.print(f"images: {loading.describe(source)}")
        accelerator.print(f"batch: {launch.describe_batch(config, accelerator, micro_batch_size, train_size)}")
        raw_train_loader = loading.loader(source, "train", config.data, share)
        raw_val_loader = loading.loader(source, "validation", config.data, share)

        for index, (name, phase) in enumerate(config.phases.items()):
            if index < state.phase:
                continue
            if index > state.phase:
                state.begin_phase(index)

            # Everything is prepared afresh in each phase: a wrapper made before parameters were unfrozen would not
            # synchronise them. The schedule is not prepared, since Accelerate would step it once per process.
            models.freeze_all_but(model, phase.modules)
            optimizer = make_optimizer(phase, model)
            schedule, stopping = Schedule(optimizer, phase), EarlyStopping(phase.early_stopping)
            metrics = Classification()
            model, optimizer, train_loader, val_loader = accelerator.prepare(
                model, optimizer, raw_train_loader, raw_val_loader
            )
            launch.own_generators(train_loader, val_loader)
            if saved:
                epoch_so_far = checkpoint.restore(accelerator, saved, run)
                metrics.load_state_dict(epoch_so_far, accelerator.device)
                if state.phase_epoch:
                    schedule.load_state_dict(state.schedule)
                    stopping = EarlyStopping(**state.early_stopping)
                saved = None  # restored once, not in later phases
            precision = accelerator.mixed_precision
            folded = folding.fold(bare(accelerator, model), size, precision)
            recorded = config.cuda_graphs and graphs.record(accelerator, model, (micro_batch_size, 3, *size))
            accelerator.print(describe_phase(config, name, model, precision, folded, recorded))

            profile = config.profile  # for the first epoch of this phase trained here from its start
            while state.phase_epoch < phase.epochs and not state.stopped:
                title, lr = f"phase {name}, epoch {state.epoch + 1}", optimizer.param_groups[0]["lr"]
                began = time.perf_counter() - state.epoch_seconds  # as if a resumed epoch had not been interrupted
                train_loader.set_epoch(state.epoch)
                loading.stop_idle_workers(source, train_loader, val_loader)
                # If resumed in mid-epoch, skip what was trained on before. That draws no random numbers.
                rest = loading.skip_batches(accelerator, train_loader, state.epoch_step)
                steps = train_epoch(
                    accelerator, model, rest, augmentation, optimizer, metrics, micro_batch_size, config.clip_norm, mix
                )
                if profile and not state.epoch_step and accelerator.is_main_process:
                    steps = profiling.traced(steps, profile, run / "profile" / f"{name}.json.gz")
                    profile = None
                total = loading.images_per_epoch(train_loader, config.data.batch_size, source)
                try:
                    for _ in tracking.watch(steps, title, total, state.epoch_step):  # each turn is an optimizer step
                        state.end_step(time.perf_counter() - began)
                        if checkpoints.due(state):
                            tracking.check_savable(model, title)
                            checkpoints.save(state, metrics)
                        interrupt.check()
                    validated = NOT_JUDGED
                    if val_loader is not None:
                        val_batches = interrupt.watch(val_loader)
                        validated = validate(accelerator, model, val_batches, transform, micro_batch_size)
                        tracking.check_validated(validated["loss"], title)
                    else:
                        tracking.check_savable(model, title)
                except Interrupted:
                    tracking.check_savable(model, title)
                    checkpoints.save(state, metrics)
                    raise

                # From here on every process has the same metrics and so makes the same decisions.
                trained, seconds = metrics.compute(gather_object), time.perf_counter() - began
                schedule.step(validated["top1"])
                state.stopped = stopping.step(validated["top1"])
                best = state.end_epoch(validated["top1"], seconds, schedule, stopping)
                tracking.epoch(name, state, lr, trained, validated, seconds, best)
                if best and accelerator.is_main_process:
                    checkpoint.save_best(bare(accelerator, model), run)
                checkpoints.save(state, metrics)

            if state.phase_epoch < phase.epochs:
                accelerator.print(
                    f"phase {name} ended early: {stopping.bad_epochs} epochs without gain in validation top-1"
                )
            model = unwrap(accelerator, model)
            folding.unfold(model)

        # The test split is judged here for the first and only time, with the weights that did best on validation
        # (without folds, the last ones).
        checkpoint.load_best(model, run)
        tested = NOT_JUDGED
        if source.test is not None:
            # With everything frozen, every batch norm that follows a convolution is folded, as in predict.py.
            model = accelerator.prepare_model(model.requires_grad_(False), evaluation_mode=True)
            folding.fold(bare(accelerator, model), size, accelerator.mixed_precision)
            test_loader = accelerator.prepare(loading.loader(source, "test", config.data, share))
            tested = validate(accelerator, model, interrupt.watch(test_loader), transform, micro_batch_size)
        summary = {"model": config.model.name, "best_epoch": state.best_epoch, "best_val_top1": state.best_top1}
        summary |= {f"test_{key}": value for key, value in tested.items()}
        summary |= {"epochs": state.epoch, "minutes": state.minutes}
        summary |= {"parameters": sum(parameter.numel() for parameter in model.parameters())}
        tracking.finish(summary)
        if accelerator.is_main_process:
            sharing.write_card(run)
        accelerator.print(describe_summary(summary, run))
    # By now the run is complete, unlocked and logged, and no other process waits for the upload to end.
    if config.push_to_hub and accelerator.is_main_process:
        print(f"uploaded: {sharing.push(run, config.push_to_hub)}")
    return run


def describe_phase(config: Config, name: str, model: nn.Module, precision: str, folded: int, recorded: bool) -> str:
    phase, parameters = config.phases[name], list(model.parameters())
    trained, total = sum(it.numel() for it in parameters if it.requires_grad), sum(it.numel() for it in parameters)
    return (
        f"phase {name}: trains {', '.join(phase.modules)} ({trained:,} of {total:,} parameters) for up to "
        f"{phase.epochs} epochs; {phase.optimizer}, lr {phase.lr:g} {phase.schedule}; "
        f"precision {precision}; {folded} frozen batch norms folded"
        f"{', recorded as CUDA graphs' * recorded}"
    )


def describe_summary(summary: dict, run: Path) -> str:
    lines = ["no validation: the weights are the last epoch's"]
    if summary["best_val_top1"] is not None:
        lines = [f"best validation top-1 {summary['best_val_top1']:.2%} in epoch {summary['best_epoch']}"]
    if summary["test_top1"] is not None:
        lines.append(f"test top-1 {summary['test_top1']:.2%}, top-5 {summary['test_top5']:.2%}")
    return "\n".join([*lines, f"weights: {run}/best   figures: {run}/history.jsonl, {run}/summary.json"])


if __name__ == "__main__":
    with reported():
        train(CONFIG, RESUME)
