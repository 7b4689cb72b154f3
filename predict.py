"""Evaluate a run's best weights, or classify other images with them.

    python predict.py runs/NAME                                # the test split
    python predict.py runs/NAME --split validation             # the rows held out of training
    python predict.py runs/NAME --data.source ~/other          # other labelled images of the same classes
    python predict.py runs/NAME --images ~/photos              # a folder of unlabelled images
    python predict.py runs/NAME --robustness                   # 19 corruptions x 5 severities, made from the test split
    python predict.py runs/NAME --cifar100c ~/CIFAR-100-C      # the published ones
    python predict.py runs/NAME --ood ~/distorted              # the course's submission.csv
    python predict.py runs/NAME --push_to_hub USER/MODEL       # predict nothing: upload best/
    accelerate launch --mixed_precision bf16 predict.py ...    # precision, processes: as in training

Results are printed and written to runs/NAME/predictions/: figures as JSON, predictions as CSV, and thumbnails of the
most confident mistakes. Image size and normalisation are those of training, read from the run.
"""

import argparse
import dataclasses
import os
import re
from pathlib import Path

import hub
from config import Config
from errors import USAGE, UserError, reported
from predict_options import WHICH_DATA, parse

if __name__ == "__main__":
    with reported():
        ARGS, CONFIG = parse(description=__doc__)  # before the slow import of torch
        if not (ARGS.images or ARGS.cifar100c or ARGS.ood or ARGS.push_to_hub):  # these need no data of the run
            hub.check(CONFIG, ARGS.run)

import json

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image

import analysis
import corruptions
import data
import decoding
import distorted
import faults
import launch
import loading
import sharing
import sources
import streaming
from files import write_whole
from inference import Classifier, described
from metrics import IGNORED, Classification
from predictions import Mistakes, describe, describe_robustness, predictions_csv, whole_csv, writing
from processes import is_main, raised_on_all
from runfolder import suffix


def predict(args: argparse.Namespace, config: Config) -> None:
    """Do what the command line asks for; every process calls this, the main one writes.

    Raises:
        UserError: anything the user can fix: a damaged run, missing data, or data of other classes.
    """
    # Fail fast: check what is cheap before loading anything.
    class_names, _ = described(args.run)
    paths = image_files(args.images)[: args.limit] if args.images else None
    files = order = None
    if args.ood or args.cifar100c:
        files = distorted.course(args.ood) if args.ood else distorted.cifar100c(args.cifar100c, args.limit)
        order = distorted.known_classes(class_names, "--ood" if args.ood else "--cifar100c")

    # A run trained on a GPU can be judged anywhere: do not demand a GPU for it.
    config = dataclasses.replace(config, sync_batch_norm=False, tf32=config.tf32 and launch.has_tf32())
    accelerator = launch.make_accelerator(config, launch.precision_of_training(config))
    folder = args.run / "predictions"
    with raised_on_all(), writing(folder):
        folder.mkdir(exist_ok=True)
        if args.output and not os.path.isdir(args.output.absolute().parent):
            raise UserError(f"--output: there is no folder {args.output.absolute().parent}", USAGE)
    share, micro_batch_size = launch.share_of_batch(config, accelerator)
    if micro_batch_size == share:
        launch.tune_allocator(accelerator.device)
    with faults.explained("then run predict.py again", accelerator, micro_batch_size), launch.ended(accelerator):
        model = Classifier(accelerator, config, args.run, args.tta)
        if args.images:
            images(args, accelerator, model, paths, folder)
        elif args.ood:
            submission(args, accelerator, model, files, order, folder)
        elif args.cifar100c:
            robustness(args, accelerator, model, files, model.labels_of(order, "--cifar100c"), folder)
        elif args.robustness:
            robustness(args, accelerator, model, *_corrupted(args, model), folder)
        else:
            split(args, accelerator, model, folder)


def upload(args: argparse.Namespace) -> None:
    """Push best/ and its model card to the hub, from one process; UserError if that fails."""
    if is_main():
        sharing.check(args.push_to_hub)
        print(f"uploaded: {sharing.push(args.run, args.push_to_hub)}")


# ---- labelled images ------------------------------------------------------------------------------------------------


def split(args: argparse.Namespace, accelerator: Accelerator, model: Classifier, folder: Path) -> None:
    """Write a split's figures as NAME.json, its predictions as NAME.csv, and mistakes' thumbnails."""
    part = args.split or "test"
    source, loader, ids = _opened(args, model, part)
    launch.dispatch(accelerator, streamed=ids is None)
    superclasses = data.superclasses(source) if accelerator.is_main_process else None
    name = _name(args, part, model.config.data.named)
    target = args.output or folder / f"{name}.csv"
    metrics, mistakes, labels, classes, confidence, seen = Classification(), Mistakes(), [], [], [], 0
    with predictions_csv(accelerator, target, model.class_names) as write:
        for batch in model(loader, ids and len(ids), part, model.labels_of(source.class_names, "data.source")):
            names = [str(ids[row] if ids else row) for row in range(seen, seen + len(batch.labels))]
            write(names, batch)
            mistakes.add(names, batch)
            metrics.add(batch.losses, batch.classes, batch.labels)
            counted = batch.labels != IGNORED
            labels.append(batch.labels[counted])
            classes.append(batch.classes[counted, 0])
            confidence.append(batch.probabilities[counted, 0])
            seen += len(batch.labels)
        mistakes.gather()
        figures = metrics.compute()
        if accelerator.is_main_process:
            result = {"kind": "split", "name": name, "split": part} | _facts(args, model, accelerator, seen) | figures
            rows = (torch.cat(each).numpy() for each in (labels, classes, confidence))
            result |= analysis.analyse(*rows, model.class_names, superclasses)
            with writing(folder):
                result["mistakes"] = mistakes.write(folder, name, model.class_names)
                write_whole(folder / f"{name}.json", json.dumps(result, indent=1) + "\n")
    if accelerator.is_main_process:
        print(f"{describe(result)}\nwritten: {folder}/{name}.json, {target}")


def _opened(args: argparse.Namespace, model: Classifier, part: str, size: tuple[int, int] | None = None):
    """Open a split: (its data, a loader of its rows in order, the rows' numbers or None for a stream).

    Args:
        size: resize every image to this height and width; None: only if a batch's differ, or are too large.
    """
    config = model.config.data
    if part == "test" and config.test_split is None:
        raise UserError(
            f"{args.run}: its data have no test split (data.test_split is null); --split validation?", USAGE
        )
    if part == "validation" and config.folds is None:
        raise UserError(f"{args.run}: no rows were held out of its training split (data.folds is null)", USAGE)
    if part == "validation":
        config = dataclasses.replace(config, test_split=None)  # which has no part in it
    source = data.load(config, model.config.seed, only_test=part == "test")
    source = dataclasses.replace(source, size=size or source.size)
    rows = getattr(source, part)
    if args.limit:
        if config.streams:
            rows = streaming.First(rows, args.limit)
        else:
            count, limit = len(rows), min(args.limit, len(rows))
            sorted_by_class = config.kind == "folder"
            rows = rows.select(np.arange(limit) * count // limit if sorted_by_class else range(limit))
        source = dataclasses.replace(source, **{part: rows})
    loader = loading.loader(source, part, config, model.batch_size)
    return source, loader, None if config.streams else list(rows[decoding.ROW])


def _name(args: argparse.Namespace, part: str, source: str) -> str:
    """The stem of a split's files: the data options that were given, the split, then `suffix`.

    Raises:
        UserError: there are files of that name, of other data than `source`.
    """
    chosen = [_plain_name(vars(args)[f"data.{name}"]) for name in WHICH_DATA if f"data.{name}" in vars(args)]
    name = "-".join([*chosen, part]) + suffix(args.tta, args.limit, args.seed)
    if chosen:  # of a path only the last part, so that other data may have the same name
        _check_same_source(args.run / "predictions" / f"{name}.json", source)
    return name


def _check_same_source(path: Path, source: str) -> None:
    """UserError if a file of predictions is of another source."""
    try:
        before = json.loads(path.read_text(encoding="utf-8"))["source"]
    except (OSError, ValueError, KeyError, TypeError):  # none, or none that is worth keeping
        return
    if before != source:
        raise UserError(f"{path} is of other data, {before}: move it away, and its CSV and mistakes, to judge {source}")


# ---- images without labels ------------------------------------------------------------------------------------------


def image_files(folder: Path) -> list[Path]:
    """All files below a folder with an image's extension, sorted, but not hidden ones.

    Raises:
        UserError: there are none, or one is in a format that is not read here.
    """
    readable = {ending for ending, kind in Image.registered_extensions().items() if kind in decoding.FORMATS}
    paths = []
    for path in sorted(folder.rglob("*")):
        if sources.is_hidden(path, folder) or not os.path.isfile(path):
            continue
        if path.suffix.lower() in readable:
            paths.append(path)
        elif path.suffix.lower() in sources.UNKNOWN:
            raise UserError(
                f"--images: {path}: {path.suffix} files are not read here; convert it, to PNG for one", USAGE
            )
    if not paths:
        raise UserError(f"--images: {folder} holds no image files", USAGE)
    return paths


def images(
    args: argparse.Namespace, accelerator: Accelerator, model: Classifier, paths: list[Path], folder: Path
) -> None:
    """Write predictions for image files as CSV; an id is the path below --images."""
    rows = [{"image": {"bytes": None, "path": str(path)}, "label": 0} for path in paths]
    config = dataclasses.replace(model.config.data, source=str(args.images))
    skip = config.on_corrupt == "skip"
    collate = decoding.Collate(
        "image", "label", 1, data.first_size(rows, "image", config, None), config.image_size, skip=skip
    )
    loader = loading.batches(rows, config, model.batch_size, collate)
    target = args.output or folder / f"images-{_plain_name(args.images)}{suffix(args.tta, args.limit, args.seed)}.csv"
    seen = corrupt = 0
    with predictions_csv(accelerator, target, model.class_names) as write:
        for batch in model(loader, len(rows), "images"):
            ids = [path.relative_to(args.images).as_posix() for path in paths[seen : seen + len(batch.labels)]]
            write(ids, batch)
            seen += len(batch.labels)
            corrupt += int((batch.labels == IGNORED).sum())
    left_out = f", {corrupt:,} can't be decoded" if corrupt else ""
    accelerator.print(f"written: {target} ({seen - corrupt:,} images{left_out})")


# ---- distorted images -----------------------------------------------------------------------------------------------


def submission(
    args: argparse.Namespace,
    accelerator: Accelerator,
    model: Classifier,
    files: distorted.Files,
    order: list[str],
    folder: Path,
) -> None:
    """Write the course's submission: `id,label` for each row of its 19 files, with CIFAR-100's label numbers."""
    target, seen = args.output or folder / f"submission{suffix(args.tta, args.limit, args.seed)}.csv", 0
    label_of = [order.index(name) for name in model.class_names]
    with whole_csv(accelerator, target, ("id", "label")) as write:
        for batch in model(loading.batches(files, model.config.data, model.batch_size), len(files), "submission"):
            ids = map(distorted.course_id, range(seen, seen + len(batch.labels)))
            write((row, label_of[predicted]) for row, predicted in zip(ids, batch.classes[:, 0].tolist(), strict=True))
            seen += len(batch.labels)
    accelerator.print(f"written: {target} ({seen:,} rows)")


def _corrupted(args: argparse.Namespace, model: Classifier) -> tuple[distorted.Corrupted, torch.Tensor]:
    """The decoded test split under all corruptions, and the map from its labels to the model's."""
    source, loader, _ = _opened(args, model, "test")
    batches = _decoded(loader, model.config.data.keep_mb)
    if len({batch["image"].shape[2:] for batch in batches}) > 1:  # mixed sizes: resize all to the model's
        _, loader, _ = _opened(args, model, "test", model.size)
        batches = _decoded(loader, model.config.data.keep_mb)
    labels = torch.cat([batch["label"] for batch in batches])
    if not len(labels):
        raise UserError("none of the images can be decoded", shared=True)
    pixels = torch.cat([batch["image"] for batch in batches]).permute(0, 2, 3, 1)
    rows = distorted.Corrupted(pixels, labels.numpy(), args.seed or 0)
    return rows, model.labels_of(source.class_names, "data.source")


def _decoded(loader, keep_mb: int) -> list[dict[str, torch.Tensor]]:
    """All batches of a loader, without what can't be decoded; UserError if they take more than `keep_mb`."""
    batches, size = [], 0
    for batch in loader:
        counted = batch["label"] != IGNORED
        batches.append({name: part if counted.all() else part[counted] for name, part in batch.items()})
        size += batch["image"].numel()
        if size > keep_mb * 2**20:
            ways = "raise it, or give a --limit" if keep_mb else "give another"
            raise UserError(
                "--robustness keeps the decoded test split in memory, which takes more than data.keep_mb "
                f"{keep_mb} MB: {ways}"
            )
    return batches


def robustness(
    args: argparse.Namespace,
    accelerator: Accelerator,
    model: Classifier,
    images: distorted.Corrupted | distorted.Files,
    labels_of: torch.Tensor,
    folder: Path,
) -> None:
    """Write accuracy by corruption and severity, and the means, as robustness.json or cifar100c.json."""
    loader = loading.batches(images, model.config.data, model.batch_size)
    kind = "cifar100c" if args.cifar100c else "robustness"
    name = _name(args, kind, model.config.data.named)
    predicted = model(loader, len(images), kind, labels_of)
    found = distorted.table(torch.cat([batch.classes[:, 0] == batch.labels for batch in predicted]).numpy())
    result = {"kind": kind, "name": name} | _facts(args, model, accelerator, len(images) // distorted.CELLS)
    if args.cifar100c:
        result |= {"source": str(args.cifar100c), "note": "The published files of CIFAR-100-C."}
    else:
        seed = images.seed
        note = f"Made here from the test split, seed {seed}: not comparable with figures on the published files."
        result |= {"seed": seed, "version": corruptions.VERSION, "note": note}
    result |= found
    if accelerator.is_main_process:
        with writing(folder):
            write_whole(folder / f"{name}.json", json.dumps(result, indent=1) + "\n")
    accelerator.print(f"{describe_robustness(result)}\nwritten: {folder}/{name}.json")


# ---- files ----------------------------------------------------------------------------------------------------------


def _facts(args: argparse.Namespace, model: Classifier, accelerator: Accelerator, rows: int) -> dict:
    facts = {"source": model.config.data.named, "rows": rows, "limit": args.limit, "tta": args.tta}
    return facts | {"epochs": model.epochs, "precision": accelerator.mixed_precision}


def _plain_name(path: str | Path) -> str:
    return re.sub(r"[^\w.-]+", "-", Path(path).expanduser().absolute().name).strip(".-")[:60] or "data"


if __name__ == "__main__":
    with reported():
        if ARGS.push_to_hub:
            upload(ARGS)
        else:
            predict(ARGS, CONFIG)
