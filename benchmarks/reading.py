"""How many images a second can one process read and decode for all, and how much faster is every process for itself?

    python benchmarks/reading.py                                  # embedded images, 32x32
    python benchmarks/reading.py --data CIFAR100 --workers 0 1 2 4
    python benchmarks/reading.py --size 224                       # as JPEG of that size, enlarged

A stream is read by the main process, whose workers decode for all processes. Measured are its passes without any
training: `first`, that keeps what it reads; `kept`, from memory; `again`, of a stream that is too large to keep;
`mapped`, the same rows memory-mapped (`data.streaming false`), which each process reads and decodes for itself. They
take turns; the medians of images per second are shown, and as JSON saved, with the lowest and the highest.
"""

import argparse
import contextlib
import io
import json
import statistics
import tempfile
import time
from pathlib import Path

import turns

from errors import told

PASSES = ("first", "kept", "again", "mapped")


def rows_of(args, folder: Path) -> Path:
    """The rows as parquet; enlarged to JPEG where that is asked for."""
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

    rows.map(enlarge, features=rows.features).to_parquet(source / "train.parquet")
    return source


def passes(source: Path, workers: int, batch_size: int, rounds: int) -> dict[str, list[float]]:
    """Rates of each pass, one for each round."""
    import data
    import loading
    from config import DataConfig

    rates = {name: [] for name in PASSES}

    def one(name, opened, config, epoch=0):
        loader = loading.loader(opened, "train", config, batch_size, seed=0)
        if hasattr(loader.sampler, "set_epoch"):
            loader.sampler.set_epoch(epoch)
        began, images = time.perf_counter(), 0
        for batch in loader:
            images += len(batch["label"])
        rates[name].append(images / (time.perf_counter() - began))

    for name in PASSES * rounds:
        with contextlib.redirect_stdout(io.StringIO()):  # what a stream says of itself
            streamed, keep_mb = name != "mapped", 0 if name == "again" else 2**16
            config = DataConfig(
                source=str(source), streaming=streamed, keep_mb=keep_mb, workers=workers, test_split=None
            )
            opened = data.load(config)
            if name in ("kept", "again"):  # the second pass of each
                for _ in opened.train:
                    pass
            one(name, opened, config, epoch=int(name in ("kept", "again")))
    return rates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=turns.positive, help="pixels a side of JPEG images [as they are]")
    parser.add_argument("--rows", type=turns.positive, default=5000, help="images that are read [5000]")
    parser.add_argument("--batch_size", type=turns.positive, default=64)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2], help="numbers of workers [0 1 2]")
    parser.add_argument("--rounds", type=turns.positive, default=5)
    turns.add_options(parser, "reading")
    args = parser.parse_args()
    turns.prepare()
    said, rows = turns.conditions(), []
    turns.tell(said)
    with tempfile.TemporaryDirectory() as folder:
        source = rows_of(args, Path(folder))
        for workers in args.workers:
            for name, rates in passes(source, workers, args.batch_size, args.rounds).items():
                rows.append({"pass": name, "workers": workers, "image_size": args.size, "rows": args.rows})
                rows[-1] |= {"images_per_second": round(statistics.median(rates)), "spread": _span(rates)}
                print(json.dumps(rows[-1]), flush=True)
                turns.save(args.output, said, rows)


def _span(rates: list[float]) -> list[int]:
    return [round(min(rates)), round(max(rates))]


if __name__ == "__main__":
    with told():
        main()
