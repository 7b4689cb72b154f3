"""Inference with a trained model: one code path for every source of images and every use of the predictions."""

import dataclasses
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import Tensor, nn
from tqdm import tqdm

import augment
import checkpoint
import folding
import launch
import models
from config import Config
from engine import bare
from errors import UserError
from metrics import IGNORED
from processes import no_bar

TOP = 5  # classes kept per image, if there are that many
SHIFT = 1 / 16  # fraction of the side by which --tta shifts moves an image: 2 pixels of 32


@dataclass
class Predicted:
    """Predictions for B images, gathered from all processes, on the CPU. K = min(5, classes).

    The images themselves are not gathered: `images` holds only this process's, and `own` their rows.
    """

    labels: Tensor  # int64 (B,); IGNORED where an image could not be decoded
    losses: Tensor  # (B,), nats
    classes: Tensor  # int64 (B, K), most likely first
    probabilities: Tensor  # (B, K)
    images: Tensor  # uint8 (len(own), 3, H, W)
    own: range


class Classifier:
    """A run's best weights, with the classes, image size and normalisation they were trained with.

    Every process creates one and calls it. `config` is the run's, with the size to resize images to; `epochs` is the
    number of epochs the run had finished (None: unknown).

    Args:
        tta: average probabilities over views of each image: 'flips' (the image and its mirror image) or 'shifts' (both,
            and each moved slightly to the upper left and to the lower right); None: the image alone.

    Raises:
        UserError: best/ is damaged, or does not fit the run's configuration.
    """

    def __init__(self, accelerator: Accelerator, config: Config, run: Path, tta: str | None = None):
        self.accelerator, self.tta = accelerator, tta
        self.class_names, self.size = described(run)
        self.epochs = checkpoint.epochs_finished(run)
        if self.size[0] == self.size[1]:
            config = dataclasses.replace(config, data=dataclasses.replace(config.data, image_size=self.size[0]))
        self.config = config
        self.batch_size, self.micro_batch_size = launch.share_of_batch(config, accelerator)
        best = dataclasses.replace(config.model, pretrained=False, weights=str(run / "best"))
        model, _ = models.create(best, self.class_names, self.size)
        try:
            checkpoint.load_best(model, run)  # strict: no head is replaced here
        except RuntimeError as error:
            raise UserError(f"{run}/best is damaged: its weights and its config.json do not fit ({error})") from error
        model = launch.suited(model, accelerator.device).requires_grad_(False)
        _, self.transform = augment.build(config, model.pretrained_cfg, accelerator.device)
        self.model = accelerator.prepare_model(model, evaluation_mode=True)
        # Training may have replaced best/ between two processes' reads.
        broadcast(list(self.model.state_dict().values()))
        folding.fold(bare(accelerator, self.model), self.size, accelerator.mixed_precision)

    def labels_of(self, class_names: list[str], source: str) -> Tensor:
        """Map the data's class indices to this model's, by class name; IGNORED (-1) maps to itself.

        Raises:
            UserError: the data have a class that the model does not know.
        """
        place = {name: index for index, name in enumerate(self.class_names)}
        unknown = [name for name in class_names if name not in place]
        if unknown:
            more = f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
            raise UserError(
                f"{source}: its classes {', '.join(unknown[:5])}{more} are not among the {len(self.class_names)} that "
                "this run was trained on; classes are matched by name"
            )
        return torch.tensor([*map(place.get, class_names), IGNORED])

    @torch.inference_mode()
    def __call__(self, loader, total: int | None, title: str, labels_of: Tensor | None = None) -> Iterator[Predicted]:
        """Predict a loader's images, in its order, each exactly once, with a progress bar on a terminal.

        Args:
            loader: not yet prepared; batches of `image` uint8 (B, 3, H, W) and `label` (B,).
            total: images in it, None if unknown.
            labels_of: map from the loader's labels to the model's, from the method of that name.
        """
        accelerator = self.accelerator
        self.model.eval()
        with tqdm(total=total, desc=title, unit=" images", leave=False, disable=no_bar()) as bar:
            for batch in accelerator.prepare(loader):
                pieces = batch["image"].split(self.micro_batch_size)
                log_probabilities = torch.cat([self._log_probabilities(images) for images in pieces])
                labels = batch["label"] if labels_of is None else labels_of.to(accelerator.device)[batch["label"]]
                losses = F.nll_loss(log_probabilities, labels, ignore_index=IGNORED, reduction="none")
                top = log_probabilities.topk(min(TOP, log_probabilities.shape[1]))
                # Gather batch by batch: the last one is padded to give all processes equal shares.
                gathered = accelerator.gather_for_metrics((labels, losses, top.indices, top.values.exp()))
                rows = len(gathered[0])
                first = accelerator.process_index * len(labels)
                own = range(min(first, rows), min(first + len(labels), rows))  # the others are padding
                bar.update(rows)
                yield Predicted(*(part.cpu() for part in gathered), batch["image"][: len(own)].cpu(), own)

    def _log_probabilities(self, images: Tensor) -> Tensor:
        """`log_probabilities` of uint8 images (B, 3, H, W), brought to the model's size."""
        images = self.transform(images)
        if images.shape[2:] != self.size:  # non-square images are never resized, as in training
            (height, width), (found_height, found_width) = self.size, images.shape[2:]
            raise UserError(
                f"images of {found_width}x{found_height} pixels: this run's model takes {width}x{height}, and "
                "images are only resized to squares"
            )
        return log_probabilities(self.model, images, self.tta)


def log_probabilities(model: nn.Module, images: Tensor, tta: str | None) -> Tensor:
    """Log of the mean over views of the probabilities (B, classes), for normalised images (B, 3, H, W)."""
    shown = views(images, tta)
    each = torch.stack([model(view).float().log_softmax(1) for view in shown])
    return each.logsumexp(0) - math.log(len(shown))


def views(images: Tensor, tta: str | None) -> list[Tensor]:
    """The views of normalised images (B, 3, H, W) to average over; moved ones are padded by reflection."""
    shown = [images] if tta is None else [images, images.flip(3)]
    if tta == "shifts":
        down, right = (max(1, round(SHIFT * side)) for side in images.shape[2:])
        height, width = images.shape[2:]
        padded = [F.pad(view, (right, right, down, down), mode="reflect") for view in shown]
        shown += [
            view[:, :, top : top + height, left : left + width]
            for view in padded
            for top, left in ((0, 0), (2 * down, 2 * right))
        ]
    return shown


def described(run: Path) -> tuple[list[str], tuple[int, int]]:
    """Class names, and the model's input size (height, width) in pixels, from a run's best/.

    Raises:
        UserError: its config.json is damaged.
    """
    path = run / "best" / "config.json"
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        names, (_, height, width) = saved["label_names"], saved["pretrained_cfg"]["input_size"]
        if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
            raise ValueError("label_names is not a list of names")
        if not all(type(side) is int and 0 < side <= 4096 for side in (height, width)):
            raise ValueError("input_size is not three whole numbers")
    except (OSError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({type(error).__name__}: {error})") from error
    return names, (height, width)
