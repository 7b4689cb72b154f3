"""Splits that are read as they arrive, by the main process alone, which dispatches batches to the others.

What the first training epoch reads stays in memory if it fits in `data.keep_mb`, decoded as far as that fits, too.
Later epochs and validation then read nothing more, and rows are shuffled fully, not just within a shuffle buffer.
"""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, islice

import numpy as np
from datasets import IterableDataset
from torch.utils.data import Sampler
from tqdm import tqdm

from config import DataConfig
from decoding import CorruptImage, bytes_of, decode
from errors import USAGE, UserError, first_line
from processes import is_main, world_size

MB = 2**20  # bytes
CHUNK, CHUNK_MB = 64, 16  # the most rows, and their images' size, that are read at once
AHEAD = 8  # chunks read in advance
CONNECTIONS = 16  # files fetched at once, if each image is its own file
BUFFER_MB = 1024  # the most that images in the shuffle buffer may take, encoded
PIECE = 16  # rows read from one file before the next file's turn
FIRST = 1000  # training rows whose classes are counted, to see whether rows are sorted by class


class Shuffled:
    """A split's rows in an order of each epoch's own: files are shuffled, rows within a buffer.

    The buffer of `datasets` is bounded in rows only, copies all of them twice, and fails if they take 2 GiB.

    Args:
        rows: rows with undecoded images.
        image: the image column.
        most: rows in the buffer; fewer if their images take more than `BUFFER_MB`.
        seed: seeds the orders.
    """

    def __init__(self, rows: IterableDataset, image: str, most: int, seed: int):
        # Mixing several shards takes threads, which cost 5 seconds an epoch to stop; one shard needs none.
        mixed = min(10, rows.num_shards)
        self.rows = rows.shuffle(seed, buffer_size=PIECE * mixed, max_buffer_input_shards=mixed)
        self.image, self.most, self.seed, self.epoch = image, most, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.rows.set_epoch(epoch)
        self.epoch = epoch

    def __iter__(self) -> Iterator[dict]:
        draw, buffer, size = np.random.default_rng((self.seed, self.epoch)), [], 0
        for row in self.rows:
            buffer.append(row)
            size += self._size(row)
            while len(buffer) > self.most or size > BUFFER_MB * MB:
                place = draw.integers(len(buffer))
                buffer[place], buffer[-1] = buffer[-1], buffer[place]
                size -= self._size(buffer[-1])
                yield buffer.pop()
        yield from (buffer[place] for place in draw.permutation(len(buffer)))

    def _size(self, row: dict) -> int:
        return len((row[self.image] or {}).get("bytes") or b"")  # files that are still to be read take no room


class Stream(Sampler):
    """A split that is read anew in each pass, a little ahead of its consumer.

    Rows are dicts, with images as {"bytes", "path"}. It is a sampler so that a loader's workers can decode what the
    main process reads here: for `loading.RowsAsIndices` the rows themselves are the indices.

    Args:
        rows: rows with undecoded images.
        image: the image column.
        source: the source's name, for messages.
    """

    def __init__(self, rows: IterableDataset | Shuffled, image: str, source: str):
        self.rows, self.image, self.source = rows, image, source
        self.looked_at, self.begun = [], None

    def look(self) -> Iterator[dict]:
        """Rows from the first on. The next pass yields them again, then reads on: nothing is read twice."""
        self.begun = iter(self.rows)
        for row in self.begun:
            self.looked_at.append(row)
            yield row

    def __iter__(self) -> Iterator[dict]:
        rows = chain(self.looked_at, self.begun) if self.begun else iter(self.rows)
        self.looked_at, self.begun = [], None
        reader, fetcher = ThreadPoolExecutor(1), ThreadPoolExecutor(CONNECTIONS)

        def with_bytes(row: dict) -> dict:
            encoded = row[self.image] or {}
            return row | {self.image: {"bytes": bytes_of(encoded), "path": encoded.get("path")}}

        def read() -> list[dict]:
            chunk, room = [], CHUNK_MB * MB
            while len(chunk) < CHUNK and room > 0 and (row := next(rows, None)):
                chunk.append(row)
                encoded = (row[self.image] or {}).get("bytes")
                room -= len(encoded) if encoded else MB / 4  # a file's size is not known yet
            files = any(row[self.image] and row[self.image]["bytes"] is None for row in chunk)
            return list((fetcher.map if files else map)(with_bytes, chunk))

        chunks, given = deque(reader.submit(read) for _ in range(AHEAD)), 0
        try:
            while chunk := chunks.popleft().result():
                chunks.append(reader.submit(read))
                given += len(chunk)
                yield from chunk
            if given < world_size():  # Accelerate pads evaluation's last batch with a row for each process
                raise UserError(f"data.source: {self.source}: {given} rows are too few for {world_size()} process(es)")
        except (UserError, GeneratorExit):
            raise
        except Exception as error:  # whatever can go wrong with a file, a format or a connection
            raise UserError(f"data.source: {self.source} can't be read any further: {first_line(error)}") from error
        finally:
            reader.shutdown(cancel_futures=True)
            fetcher.shutdown()


class TrainingStream:
    """A training split whose training rows and validation rows are both read in one pass.

    Args:
        label: the label column.
        classes: how many there are.
        is_validation: whether an image's bytes make its row a validation row.
        config: sets the shuffle buffer and how much is kept in memory.
        seed: seeds the order.
    """

    def __init__(
        self,
        rows: IterableDataset,
        image: str,
        label: str,
        classes: int,
        is_validation: Callable[[bytes], bool],
        config: DataConfig,
        seed: int,
    ):
        shuffled = Shuffled(rows, image, config.shuffle_buffer, seed)
        self.in_order, self.shuffled = (Stream(each, image, config.source) for each in (rows, shuffled))
        self.image, self.label, self.classes, self.is_validation, self.seed = image, label, classes, is_validation, seed
        self.keep_mb, self.batch_size = config.keep_mb, config.batch_size
        self.kept: dict[bool, list[dict]] = {}  # training rows under False, validation rows under True
        self.whole = self.too_large = False  # all rows are kept; they are too large to keep
        self.decoded = False  # all rows are kept as pixels
        self.training, self.validation = Part(self, validation=False), Part(self, validation=True)
        said = (rows.info.splits or {}).get(rows.split)  # the dataset's own description, if there is one
        trained = 1 if config.folds is None else 1 - 1 / config.folds
        self.expected = round(said.num_examples * trained) if said and said.num_examples else None  # estimate

    def rows_of(self, validation: bool, epoch: int) -> Iterator[dict]:
        """The validation rows, or an epoch's training rows in that epoch's order.

        Raises:
            UserError: there are too few; known only at the end.
        """
        assert is_main(), "the loader has to be one whose batches are dispatched"
        rows = 0
        for row in self._rows_of(validation, epoch):
            rows += 1
            yield row
        self._check(rows, validation)

    def _rows_of(self, validation: bool, epoch: int) -> Iterator[dict]:
        if not (validation or self.whole or self.too_large):
            if not epoch:
                return self._first_pass()
            for _ in tqdm(self._first_pass(), "reading the stream again", unit=" images", leave=False, disable=None):
                if self.too_large:
                    break
        if self.whole:
            rows = self.kept[validation]
            order = range(len(rows)) if validation else np.random.default_rng((self.seed, epoch)).permutation(len(rows))
            return (rows[number] for number in order)
        self.shuffled.rows.set_epoch(epoch)
        rows = self.in_order if validation else self.shuffled
        return (row for row in rows if self._is_validation(row) == validation)

    def _first_pass(self) -> Iterator[dict]:
        """The first epoch's training rows. At the end either all rows are kept or none."""
        limit, size, self.kept, labels = self.keep_mb * MB, 0, {False: [], True: []}, []
        for row in self.shuffled:
            validation, size = self._is_validation(row), size + len(row[self.image]["bytes"])
            if not self.too_large:
                self.kept[validation].append(row)
                if size > limit:
                    self.too_large, self.kept = True, {}
                    larger = f"larger than data.keep_mb {self.keep_mb}" if self.keep_mb else "not kept (data.keep_mb 0)"
                    tqdm.write(f"stream: {larger}, so each epoch reads it again")
            if not validation:
                if len(labels) < FIRST:
                    labels.append(row[self.label])
                    self._warn_if_sorted(labels)
                yield row
        if not self.too_large:
            decoded, self.whole = self._decode(limit - size), True
            parts = {"training": self.kept[False], "validation": self.kept[True]}
            self.decoded = decoded == sum(map(len, parts.values()))
            rows = " and ".join(f"{len(rows):,} {name}" for name, rows in parts.items() if rows)
            tqdm.write(
                f"stream: {rows} rows ({size / MB:.0f} MB) have been read, "
                f"and are kept in memory, {decoded:,} of them decoded: later epochs read no more"
            )

    def _decode(self, room: int) -> int:
        """Replace encoded images by pixels while `room` (bytes) lasts; returns the number of rows decoded."""
        rows, decoded = [row for part in self.kept.values() for row in part], 0
        for row in tqdm(rows, "decoding", unit=" images", leave=False, disable=None):
            encoded = row[self.image]
            try:
                pixels = np.array(decode(encoded))
            except CorruptImage:
                continue  # stays encoded; reported or skipped when the row is used
            room -= pixels.nbytes - len(encoded["bytes"])
            if room < 0:
                break
            row[self.image] = pixels
            decoded += 1
        return decoded

    def _warn_if_sorted(self, labels: list[int]) -> None:
        """After the first rows: say so if they have less than a quarter of the classes that a random draw would."""
        if len(labels) < FIRST:
            return
        found, drawn = len(set(labels)), self.classes * (1 - (1 - 1 / self.classes) ** FIRST)
        if found == 1 or found < drawn / 4:
            tqdm.write(
                f"warning: the stream's first {FIRST:,} training rows are of {found} of {self.classes} classes: its "
                "files seem to be sorted by class, and it is shuffled only within data.shuffle_buffer rows until it is "
                "kept in memory. --data.streaming false shuffles fully"
            )

    def _check(self, rows: int, validation: bool) -> None:
        if validation and rows < world_size():
            raise UserError(
                f"{self.in_order.source}: {rows} validation rows (data.folds, data.fold) for {world_size()} process(es)"
            )
        if not validation and rows < self.batch_size:
            raise UserError(
                f"{self.in_order.source}: {rows} training rows are fewer than data.batch_size {self.batch_size}: "
                "lower it"
            )

    def _is_validation(self, row: dict) -> bool:
        return self.is_validation(row[self.image]["bytes"])


class Part(Sampler):
    """The training rows or the validation rows of a `TrainingStream`; images kept decoded come as pixels."""

    def __init__(self, stream: TrainingStream, validation: bool):
        self.stream, self.is_validation, self.epoch = stream, validation, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[dict]:
        return self.stream.rows_of(self.is_validation, self.epoch)

    def __len__(self) -> int:
        if not self.stream.whole:
            raise TypeError("how many rows a stream has is known at its end")
        return len(self.stream.kept[self.is_validation])


class First(Sampler):
    """Only the first `count` rows of a stream."""

    def __init__(self, rows: Sampler, count: int):
        self.rows, self.count = rows, count

    def __iter__(self) -> Iterator[dict]:
        if self.count < world_size():
            raise UserError(f"{self.count} rows are too few for {world_size()} processes", USAGE)
        return islice(iter(self.rows), self.count)
