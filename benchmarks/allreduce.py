"""What does it cost to share gradients between processes: how many bytes, how much of a step?

    python benchmarks/allreduce.py                              # ResNet-50's two phases on 1, 2 and 4 processes
    python benchmarks/allreduce.py --processes 2 --batch_size 64

For each number of processes, torch's elastic launcher starts them on this machine. Each keeps its share of the batch on
its device and makes forward, backward and optimizer steps, alternately with gradients all-reduced, as in training, and
without. On a CPU (gloo) the bytes sent per step are counted at the loopback interface, beside the bytes needed, both
over all processes: a ring takes 2 (processes - 1) times the size of the trained parameters, and batch-norm statistics
go from the main process to the others before each forward pass.
"""

import argparse
import contextlib
import json
import statistics
import time
from pathlib import Path

import loops
import turns

from errors import reported

STEPS = 4  # counted per block
PHASES = ("resnet50:head", "resnet50:finetune")


def loopback_bytes() -> int | None:
    """Bytes sent over loopback so far; None where Linux doesn't count them."""
    path = Path("/sys/class/net/lo/statistics/tx_bytes")
    return int(path.read_text()) if path.exists() else None


def measure(args) -> None:
    """In each process: measure the phases; the main one prints a row each."""
    import torch
    from torch.nn import functional as F

    import launch
    import models
    from config import ModelConfig
    from engine import train_mode, unwrap
    from phases import make_optimizer

    config = loops.config_of(PHASES[0], "embedded", args.batch_size, "runs")
    accelerator = launch.make_accelerator(config)
    launch.tune_allocator(accelerator.device)
    share = args.batch_size // accelerator.num_processes
    images = torch.randn(share, 3, 32, 32, device=accelerator.device)
    labels = torch.randint(100, (share,), device=accelerator.device)
    torch.manual_seed(0)
    model, _ = models.create(ModelConfig(name="resnet50"), [str(number) for number in range(100)], (32, 32))
    for name in PHASES:
        phase = next(iter(loops.config_of(name, "embedded", args.batch_size, "runs").phases.values()))
        models.freeze_all_but(model, phase.modules)
        prepared, optimizer = accelerator.prepare(model, make_optimizer(phase, model))
        train_mode(prepared)
        seconds, sent = {True: [], False: []}, []

        for number in range(2 * args.blocks + 2):
            reduced = not number % 2
            with contextlib.nullcontext() if reduced else accelerator.no_sync(prepared):
                # The first step of a block does what DDP left over from the block before: not counted.
                for step in range(STEPS + 1):
                    if step <= 1:
                        accelerator.wait_for_everyone()
                        before, began = loopback_bytes(), time.perf_counter()
                    accelerator.backward(F.cross_entropy(prepared(images), labels))
                    optimizer.step()
                    optimizer.zero_grad()
                if accelerator.device.type == "cuda":
                    torch.cuda.synchronize()
            took = (time.perf_counter() - began) / STEPS
            accelerator.wait_for_everyone()
            if number >= 2:  # the first of each kind is a warm-up
                seconds[reduced].append(took)
                if reduced and before is not None:
                    sent.append((loopback_bytes() - before) / STEPS)
        trained = 4 * sum(p.numel() for p in model.parameters() if p.requires_grad)
        buffers = sum(buffer.numel() * buffer.element_size() for buffer in model.buffers())
        others = accelerator.num_processes - 1
        row = {"phase": name, "processes": accelerator.num_processes, "batch_size": args.batch_size}
        row |= {"trained_bytes": trained, "buffer_bytes": buffers}
        row |= {"needed_bytes": others * (2 * trained + buffers)}
        row |= {"sent_bytes": round(statistics.median(sent)) if sent else None}
        row |= {"step_seconds": round(statistics.median(seconds[True]), 4)}
        ratios = [one / two for one, two in zip(seconds[True], seconds[False], strict=True)]
        row |= {"reduced_over_alone": round(statistics.median(ratios), 3)}
        if accelerator.is_main_process:
            print(json.dumps(row), flush=True)
        model = unwrap(accelerator, prepared)
    accelerator.end_training()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=turns.positive, nargs="+", default=[1, 2, 4], help="[1 2 4]")
    parser.add_argument("--batch_size", type=turns.positive, default=64, help="of all processes together [64]")
    parser.add_argument("--blocks", type=turns.positive, default=5, help="of four steps, of each kind [5]")
    parser.add_argument("--output", type=turns.output, default=Path("allreduce"), help="name of what is written")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    turns.prepare()
    if args.measure:
        return measure(args)
    turns.check_shares(parser, args)
    said, rows = turns.conditions(), []
    turns.tell(said)
    for processes in args.processes:
        for line in turns.launched(processes, "--batch_size", args.batch_size, "--blocks", args.blocks):
            rows.append(json.loads(line))
            print(line, flush=True)
            turns.save(args.output, said, rows)


if __name__ == "__main__":
    with reported():
        main()
