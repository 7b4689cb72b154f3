"""predict.py's output: CSV files, thumbnails of mistakes, and tables for the terminal."""

import contextlib
import csv
import heapq
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import gather_object
from PIL import Image

from errors import UserError
from files import replace
from inference import Predicted
from metrics import IGNORED
from text import plain, shown

WIDEST = 40  # characters of a class's name in a table
COLUMNS = ("id", "label", "name", "probability", "top5")


@contextlib.contextmanager
def predictions_csv(
    accelerator: Accelerator, path: Path, class_names: list[str]
) -> Iterator[Callable[[list[str], Predicted], None]]:
    """Write batches of predictions, with the rows' ids, to a CSV file as `whole_csv` does.

    Columns: the row's id, the most likely class as index and name, its probability, and the indices of the five most
    likely. Rows whose image could not be decoded are left out.
    """
    # Python before 3.13 does not quote a bare carriage return, which would begin a new row for whoever reads the file.
    names = [name.replace("\r", " ") for name in class_names]
    with whole_csv(accelerator, path, COLUMNS) as write_rows:

        def write(ids: list[str], batch: Predicted) -> None:
            ids = [row.replace("\r", " ") for row in ids]
            write_rows(
                (row, classes[0], names[classes[0]], f"{probabilities[0]:.6f}", " ".join(map(str, classes)))
                for row, label, classes, probabilities in zip(
                    ids, batch.labels.tolist(), batch.classes.tolist(), batch.probabilities.tolist(), strict=True
                )
                if label != IGNORED
            )

        yield write


@contextlib.contextmanager
def whole_csv(accelerator: Accelerator, path: Path, columns: tuple[str, ...]) -> Iterator[Callable]:
    """Write rows to a CSV file that appears only when it is complete, and not at all if something fails.

    Every process calls this; the main one writes.
    """
    if not accelerator.is_main_process:
        yield lambda rows: None
        return
    path = Path(os.path.realpath(path))  # a link stays a link
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    with writing(path):
        # File and class names come from outside and may not be valid Unicode.
        file = unfinished.open("w", encoding="utf-8", errors="backslashreplace", newline="")
    writer = csv.writer(file, lineterminator="\n")

    def write(rows) -> None:
        with writing(path):
            writer.writerows(rows)

    try:
        write([columns])
        yield write
        with writing(path):
            file.close()
            replace(unfinished, path)
    finally:
        with contextlib.suppress(OSError):  # the error has already been raised
            file.close()
        unfinished.unlink(missing_ok=True)


@contextlib.contextmanager
def writing(path: Path):
    """Around work on files: turn an OSError into a `UserError`."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path} can't be written: {error.strerror or error}") from error


class Mistakes:
    """The most confident mistakes in the batches added, with images. Each process keeps its own until `gather`."""

    MOST = 24
    SIDE = 96  # pixels, longest of a thumbnail

    def __init__(self):
        self.heap, self.seen = [], 0

    def add(self, ids: list[str], batch: Predicted) -> None:
        for place, row in enumerate(batch.own):
            label, predicted = int(batch.labels[row]), int(batch.classes[row, 0])
            if label in (predicted, IGNORED):
                continue
            # Ties go to the earlier row.
            rank = (float(batch.probabilities[row, 0]), -self.seen - row)
            if len(self.heap) < self.MOST or rank > self.heap[0][:2]:
                push = heapq.heappush if len(self.heap) < self.MOST else heapq.heapreplace
                push(self.heap, (*rank, ids[row], label, predicted, batch.images[place].numpy().copy()))
        self.seen += len(ids)

    def gather(self) -> None:
        """Merge the mistakes of all processes; every process calls this."""
        self.heap = sorted(gather_object(self.heap), key=lambda one: one[:2], reverse=True)[: self.MOST]

    def write(self, folder: Path, name: str, class_names: list[str]) -> list[dict]:
        """Save thumbnails as mistakes/NAME/NN.png in the folder, most confident first; return a dict for each."""
        pictures, told = folder / "mistakes" / name, []
        unfinished = pictures.with_name(f".{name}.{os.getpid()}")
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        for number, (probability, _, row, true, predicted, image) in enumerate(self.heap):
            picture = Image.fromarray(image.transpose(1, 2, 0))
            picture.thumbnail((self.SIDE, self.SIDE))
            picture.save(unfinished / f"{number:02d}.png")
            mistake = {"id": row, "true": class_names[true], "predicted": class_names[predicted]}
            told.append(mistake | {"probability": probability, "thumbnail": f"mistakes/{name}/{number:02d}.png"})
        shutil.rmtree(pictures, ignore_errors=True)
        replace(unfinished, pictures)
        return told


# ---- the terminal ---------------------------------------------------------------------------------------------------


def describe(result: dict) -> str:
    """A split's figures: the means, accuracy by superclass, the hardest and easiest classes, the confused pairs."""
    corrupt = f", {result['corrupt']} of them can't be decoded and don't count" if "corrupt" in result else ""
    lines = [
        f"{result['name']}: {result['rows']:,} images of {result['source']}{corrupt}",
        f"loss {result['loss']:.4f}, top-1 {result['top1']:.2%}, top-5 {result['top5']:.2%}, "
        f"expected calibration error {result['ece']:.2%}",
    ]
    if above := result["superclasses"]:
        lines.append(f"superclass predicted right: {_percent(above['top1'])}")
        lines += _accuracies("superclass", [one for one in above["per_superclass"] if one["rows"]])
    classes = sorted((one for one in result["per_class"] if one["rows"]), key=lambda one: one["top1"])
    if len(classes) <= 10:
        lines += _accuracies("class", classes)
    else:
        lines += _accuracies("hardest classes", classes[:5]) + _accuracies("easiest classes", classes[:-6:-1])
    if result["confused"]:
        lines.append("most confused (true: taken for)")
        for one in result["confused"][:10]:
            lines.append(f"  {shown(one['true'], WIDEST)}: {shown(one['predicted'], WIDEST)}, {one['share']:.1%}")
    return "\n".join(map(plain, lines))


def _accuracies(title: str, rows: list[dict]) -> list[str]:
    names = [shown(one["name"], WIDEST) for one in rows]
    width = max(map(len, (title, *names)))
    lines = [
        f"  {name:{width}}  {_percent(one['top1']):>7}  {one['rows']:6,}" for name, one in zip(names, rows, strict=True)
    ]
    return [f"  {title:{width}}    top-1  images", *lines]


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def describe_robustness(result: dict) -> str:
    """Accuracy under each corruption at each severity, and the means."""
    lines = [
        f"{result['name']}: {result['rows']:,} images in each of 19 x 5. {result['note']}",
        f"  {'top-1 at severity':18}" + "".join(f"{severity:8}" for severity in range(1, 6)) + "    mean",
    ]
    for one in result["corruptions"]:
        cells = "".join(f"{value:8.1%}" for value in (*one["top1"], one["mean"]))
        lines.append(f"  {one['name']:18}{cells}{'' if one['in_mean15'] else '   not in the 15'}")
    lines.append(f"mean over RobustBench's 15 corruptions {result['mean15']:.2%}, over all 19 {result['mean19']:.2%}")
    return "\n".join(map(plain, lines))
