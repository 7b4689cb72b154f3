"""How fast can one process read and decode images for all, and how much faster is it if each reads its own?

    python benchmarks/reading.py                                        # embedded images, 32x32
    python benchmarks/reading.py --data CIFAR100 --workers 0 1 2 --processes 1 2
    python benchmarks/reading.py --size 224 --rows 1000                 # as JPEG of that size, enlarged

A stream is read by the main process, whose workers decode for all processes. The loaders' rates are measured over all
processes together, without training: `first`, a stream's first pass, with opening, shuffling within a tenth of its rows
and keeping them; `kept`, from memory; `again`, a stream too large to keep; `mapped`, the same rows memory-mapped
(`data.streaming false`), where each process reads and decodes its own. They take turns; the median, lowest and highest
images per second are printed and saved as JSON.
"""

import argparse
import contextlib
import io
import json
import statistics
import tempfile
import time
from pathlib import Path

import loops
import turns

from errors import reported

PASSES = ("first", "kept", "again", "mapped")


def rows_of(args, folder: Path) -> Path:
    """The rows as parquet; with --size as enlarged JPEGs."""
    source = turns.subset(args.data, args.rows, folder)
    if not args.size:
        return source
    import datasets

    rows = datasets.load_dataset("parquet", data_files=str(source / "train.parquet"))["train"]
    image = next(name for name, feature in rows.features.items() if isinstance(feature, datasets.Image))

    def enlarge(row):
        file = io.BytesIO()
        row[image].convert("RGB").resize((args.size, args.size)).save(file, "JPEG", quality=90)
        return {image: {"bytes": file.getvalue(), "path": None}}

    (folder / "enlarged").mkdir()
    rows.map(enlarge, features=rows.features).to_parquet(folder / "enlarged" / "train.parquet")
    return folder / "enlarged"


def measure(args) -> None:
    """In each process: all passes in turns; the main one prints the rates."""
    import data
    import launch
    import loading
    from config import DataConfig

    accelerator = launch.make_accelerator(loops.config_of("simple_cnn", args.data, args.batch_size, "runs"))
    options = {"workers": args.workers[0], "test_split": None, "batch_size": args.batch_size}
    options |= {"shuffle_buffer": max(1, args.rows // 10)}
    rates = {name: [] for name in PASSES}
    for name in PASSES * args.rounds:
        keep_mb = 0 if name == "again" else 2**16
        config = DataConfig(source=args.data, streaming=name != "mapped", keep_mb=keep_mb, **options)
        launch.dispatch(accelerator, streamed=name != "mapped")
        with contextlib.redirect_stdout(io.StringIO()):  # a stream's messages
            began = time.perf_counter()
            opened = data.load(config)
            loader = loading.loader(opened, "train", config, args.batch_size // accelerator.num_processes)
            loader = accelerator.prepare(loader)
            for epoch in range(1 if name in ("first", "mapped") else 2):
                accelerator.wait_for_everyone()
                began = began if name == "first" else time.perf_counter()
                loader.set_epoch(epoch)
                batches = sum(1 for _ in loader)
        rates[name].append(batches * args.batch_size / (time.perf_counter() - began))
        accelerator.free_memory()
    if accelerator.is_main_process:
        print(json.dumps(rates), flush=True)
    accelerator.end_training()


def run(args, source: Path, processes: int, workers: int) -> dict[str, list[float]]:
    options = ["--data", source, "--rows", args.rows, "--batch_size", args.batch_size, "--rounds", args.rounds]
    return json.loads(turns.launched(processes, *options, "--workers", workers)[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=turns.positive, help="pixels a side of JPEG images [as they are]")
    parser.add_argument("--rows", type=turns.positive, default=5000, help="images that are read [5000]")
    parser.add_argument("--batch_size", type=turns.positive, default=64, help="of all processes together [64]")
    parser.add_argument("--processes", type=turns.positive, nargs="+", default=[1], help="numbers of them [1]")
    parser.add_argument("--workers", type=turns.count, nargs="+", default=[0, 1, 2], help="numbers of them [0 1 2]")
    parser.add_argument("--rounds", type=turns.positive, default=5, help="turns of each [5]")
    turns.add_options(parser, "reading")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    turns.prepare()
    if args.measure:
        return measure(args)
    turns.check_shares(parser, args)
    said, rows = turns.conditions(), []
    turns.tell(said)
    with tempfile.TemporaryDirectory() as folder:
        source = rows_of(args, Path(folder))
        for processes in args.processes:
            for workers in args.workers:
                for name, rates in run(args, source, processes, workers).items():
                    rows.append({"pass": name, "processes": processes, "workers": workers, "image_size": args.size})
                    rows[-1] |= {"rows": args.rows, "images_per_second": round(statistics.median(rates))}
                    rows[-1] |= {"spread": [round(min(rates)), round(max(rates))]}
                    print(json.dumps(rows[-1]), flush=True)
                    turns.save(args.output, said, rows)


if __name__ == "__main__":
    with reported():
        main()
