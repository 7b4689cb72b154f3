"""From opened data to the loaders that training reads: who decodes what, when and in which order."""

import atexit
import dataclasses
import math
import multiprocessing
import signal

import torch
from accelerate import Accelerator
from accelerate.data_loader import DataLoaderDispatcher
from accelerate.utils import parse_flag_from_env
from torch.utils.data import DataLoader, Dataset, Sampler
from tqdm import tqdm

from config import DataConfig
from data import Data, is_streamed
from decoding import Collate
from processes import cores_per_process, is_main, no_bar
from workers import outlive_signals

FEW = 2000  # rows of small images, which decode faster than a worker starts
LITTLE = 1 / 20  # of a GPU's memory


class DecodedImages(Dataset):
    """Decoded rows in the machine's or a GPU's memory. Whole batches are fetched, so there is nothing to collate.

    Args:
        images: uint8 (N, 3, H, W).
        labels: int64 (N,), on the same device.
    """

    def __init__(self, images: torch.Tensor, labels: torch.Tensor):
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, rows: list[int]) -> dict[str, torch.Tensor]:
        index = torch.tensor(rows)
        if self.images.is_cuda:
            index = index.pin_memory().to(self.images.device, non_blocking=True)
        return {"image": self.images[index], "label": self.labels[index]}


class RowsAsIndices(Dataset):
    """A data set whose indices are the rows themselves: its sampler reads them, the loader's workers decode them."""

    def __getitems__(self, rows: list[dict]) -> list[dict]:
        return rows


def keep_decoded(source: Data, config: DataConfig, device: torch.device, watch=lambda batches: batches) -> Data:
    """The same data with the training and validation rows decoded in memory, if they fit in `keep_mb`.

    Epochs then decode nothing and need no workers. If the images take little of a GPU's memory, they are kept there.
    Streams, images of several sizes and data that do not fit are left to be decoded on demand.

    Args:
        watch: passes batches on, and may raise.

    Raises:
        UserError: as `Collate` does for a row.
    """
    splits = {"train": source.train, "validation": source.validation}
    splits = {name: rows for name, rows in splits.items() if rows is not None}
    collate = _collate(source, "train", config)
    height, width = collate.shape
    if any(isinstance(rows, Sampler) for rows in splits.values()):
        return source
    total = sum(map(len, splits.values()))
    if total * 3 * height * width > config.keep_mb * 2**20:
        return source
    kept, place = {}, device if _takes_little(device, total * 3 * height * width) else torch.device("cpu")
    with tqdm(total=total, desc="decoding", unit=" images", leave=False, disable=no_bar()) as bar:
        for name, rows in splits.items():
            images = torch.empty(len(rows), 3, height, width, dtype=torch.uint8)
            labels = torch.empty(len(rows), dtype=torch.int64)
            workers = 0
            if len(rows) > FEW:  # nothing trains yet, so no core is spared
                workers = _workers(config, spared=0)
            begin = 0
            # Its own generator, so that workers' seeds are not drawn from the generator that training uses.
            for batch in watch(
                DataLoader(
                    rows,
                    batch_size=256,
                    num_workers=workers,
                    collate_fn=collate,
                    worker_init_fn=outlive_signals,
                    generator=torch.Generator(),
                )
            ):
                if batch["image"].shape[2:] != (height, width):
                    return source
                end = begin + len(batch["label"])
                images[begin:end], labels[begin:end] = batch["image"], batch["label"]
                bar.update(end - begin)
                begin = end
            kept[name] = DecodedImages(images.to(place), labels.to(place))
    return dataclasses.replace(source, **kept)


def describe(source: Data) -> str:
    """When and where the training images are decoded."""
    if is_streamed(source):
        return "streamed"
    if isinstance(source.train, DecodedImages):
        return f"decoded once and kept {'on the GPU' if source.train.images.is_cuda else 'in memory'}"
    return "decoded in each epoch"


def _takes_little(device: torch.device, size: int) -> bool:
    """Whether `size` bytes are little for that GPU."""
    return device.type == "cuda" and size < LITTLE * torch.cuda.get_device_properties(device).total_memory


def loader(source: Data, split: str, config: DataConfig, batch_size: int) -> DataLoader | None:
    """A loader of one split ('train', 'validation' or 'test'), to be prepared by Accelerate; None without that split.

    Training rows are reshuffled each epoch (by the stream, or by the sampler that Accelerate seeds), and an incomplete
    last batch is dropped.

    Args:
        batch_size: images per batch of one process.
    """
    rows, training = getattr(source, split), split == "train"
    if rows is None:
        return None
    kept, streamed = isinstance(rows, DecodedImages), isinstance(rows, Sampler)
    on_gpu = kept and rows.images.is_cuda
    reads = not streamed or is_main()  # only the main process reads a stream
    return DataLoader(
        RowsAsIndices() if streamed else rows,
        sampler=rows if streamed else None,
        batch_size=batch_size,
        shuffle=training if not streamed else None,
        drop_last=training,
        num_workers=_workers(config) if reads and not kept else 0,
        # Not persistent: a loader draws a random number whenever it starts workers, and a resumed run has to draw as
        # often as an uninterrupted one.
        persistent_workers=False,
        worker_init_fn=outlive_signals,
        pin_memory=_uses_gpu() and not on_gpu,
        collate_fn=_as_it_is if kept else _collate(source, split, config),
    )


def batches(dataset, config: DataConfig, batch_size: int, collate=None) -> DataLoader:
    """A loader that keeps a data set's order; without `collate` whole batches are fetched, as from `DecodedImages`.

    For predictions: they wait for images to be read or made, so there are more workers than in training.
    """
    return DataLoader(
        dataset,
        batch_size=batch_size,
        num_workers=min(_workers(config, most=16), math.ceil(len(dataset) / batch_size)),
        worker_init_fn=outlive_signals,
        pin_memory=_uses_gpu(),
        collate_fn=collate or _as_it_is,
    )


def _uses_gpu() -> bool:
    """Whether this run computes on a GPU: Accelerate's variable keeps it off one that is there."""
    return torch.cuda.is_available() and not parse_flag_from_env("ACCELERATE_USE_CPU")


def _collate(source: Data, split: str, config: DataConfig) -> Collate:
    return Collate(
        source.image,
        source.label,
        len(source.class_names),
        source.size,
        config.image_size,
        split=config.test_split if split == "test" else config.train_split,
        skip=config.on_corrupt == "skip",
    )


def _as_it_is(batch):
    return batch


@atexit.register
def _end_workers() -> None:
    """End workers still there when the command ends, as after an unexpected error. Python would ask them only once."""
    workers = multiprocessing.active_children()
    if workers and hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch would report their deaths as another error
    for worker in workers:
        worker.kill()


def skip_batches(accelerator: Accelerator, prepared_loader, steps: int):
    """A prepared training loader that skips an epoch's first `steps` steps without drawing random numbers.

    For a dispatched loader Accelerate's own function would count batches, of which a step takes one per process.
    """
    if isinstance(prepared_loader, DataLoaderDispatcher):
        prepared_loader.skip_batches = steps  # in this epoch; set again for the next
        return prepared_loader
    return accelerator.skip_first_batches(prepared_loader, steps) if steps else prepared_loader


def stop_idle_workers(source: Data, *prepared_loaders) -> None:
    """Drop the workers once a stream is kept as pixels: there is nothing to decode, and they slow training down.

    They stay if images have to be cropped or made smaller.
    """
    if is_streamed(source) and source.train.stream.decoded:
        for prepared in prepared_loaders:
            if prepared is not None and not prepared.base_dataloader.collate_fn.must_fit():
                prepared.base_dataloader.num_workers = 0


def images_per_epoch(prepared_loader, global_batch: int, source: Data) -> int | None:
    """Images that a prepared training loader yields in one epoch, over all processes.

    For a stream not yet read to its end, an estimate from the dataset's description; None if that gives no number.
    """
    try:
        return len(prepared_loader) * global_batch
    except TypeError:
        return source.train.stream.expected


def _workers(config: DataConfig, most: int = 4, spared: int = 1) -> int:
    """`data.workers`, or this process's share of the cores, less `spared` for training itself; between 1 and `most`."""
    if config.workers is not None:
        return config.workers
    if multiprocessing.get_start_method() != "fork":  # each imports everything anew: seconds, and most of a GB
        most = min(most, 4)
    return min(most, max(1, cores_per_process() - spared))
