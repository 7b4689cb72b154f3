"""Loss and accuracy as `evaluate.Metric` classes of this project, which need no download from the hub."""

import datasets
import evaluate
import numpy as np
import torch
from torch import Tensor

from errors import UserError

CHUNK = 2**16  # rows that are computed at once: what evaluate makes of them takes several times their memory
IGNORED = -1  # the label of a row that no loss and no figure counts: its image could not be decoded


class TopKAccuracy(evaluate.Metric):
    """Share of rows whose label is among the k classes with the largest logits.

    `predictions` are (N, >= k) class indices, most likely first; `references` are (N,) labels. Fractions in [0, 1].
    """

    def __init__(self, k: int, **kwargs):
        self.k = k
        super().__init__(config_name=f"top{k}", **kwargs)

    def _info(self):
        return evaluate.MetricInfo(
            description=self.__doc__,
            citation="",
            features=datasets.Features(
                predictions=datasets.Sequence(datasets.Value("int32")), references=datasets.Value("int32")
            ),
        )

    def _compute(self, predictions, references):
        hits = np.asarray(predictions)[:, : self.k] == np.asarray(references)[:, None]
        return {f"top{self.k}": float(hits.any(axis=1).mean())}


class MeanLoss(evaluate.Metric):
    """Mean of per-row losses `predictions` (N,), in nats, summed in float64."""

    def _info(self):
        return evaluate.MetricInfo(
            description=self.__doc__,
            citation="",
            features=datasets.Features(predictions=datasets.Value("float32"), references=datasets.Value("int32")),
        )

    def _compute(self, predictions, references):
        return {"loss": float(np.asarray(predictions, dtype=np.float64).mean())}


class Classification:
    """Collects one epoch's rows and computes `loss`, `top1` and `top5` once, at its end.

    What is collected stays on the device, so that no step has to wait for it.
    """

    PARTS = ("losses", "classes", "labels")

    def __init__(self):
        self.metrics = [TopKAccuracy(1, keep_in_memory=True), TopKAccuracy(5, keep_in_memory=True)]
        self.loss = MeanLoss(keep_in_memory=True)
        self.rows: list[tuple[Tensor, Tensor, Tensor]] = []

    @staticmethod
    def reduce(logits: Tensor, labels: Tensor, losses: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What has to be kept of a batch: losses (B,), the up to 5 likeliest classes (B, 5), labels (B,)."""
        return losses.detach().float(), logits.detach().topk(min(5, logits.shape[1])).indices, labels

    def add(self, losses: Tensor, classes: Tensor, labels: Tensor) -> None:
        self.rows.append((losses, classes, labels))

    def state_dict(self) -> dict[str, Tensor]:
        """The rows added so far: `losses` (N,), `classes` (N, 5), `labels` (N,); nothing if there are none."""
        return {name: torch.cat(part) for name, part in zip(self.PARTS, zip(*self.rows, strict=True), strict=False)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.rows = [tuple(state[name] for name in self.PARTS)] if state else []

    def compute(self, gather=lambda rows: rows) -> dict[str, float]:
        """The figures of all rows added since the last call, and as `corrupt` how many were ignored, if any were.

        Args:
            gather: brings the rows of all processes together, where that has not been done batch by batch.

        Raises:
            UserError: nothing was added, or nothing that counts.
        """
        if not self.rows:
            raise UserError("there are no rows to judge: the split is empty")
        losses, classes, labels = (
            part.cpu().numpy() for part in gather(tuple(torch.cat(part) for part in zip(*self.rows, strict=True)))
        )
        self.rows = []
        counted = labels != IGNORED
        if not counted.any():
            raise UserError("none of the images can be decoded")
        ignored = len(labels) - int(counted.sum())
        losses, classes, labels = losses[counted], classes[counted], labels[counted]
        result = dict.fromkeys(("loss", "top1", "top5"), 0.0)
        for begin in range(0, len(labels), CHUNK):
            part = slice(begin, begin + CHUNK)
            figures = self.loss.compute(predictions=losses[part], references=labels[part])
            for metric in self.metrics:
                figures |= metric.compute(predictions=classes[part], references=labels[part])
            for name, value in figures.items():
                result[name] += value * len(labels[part]) / len(labels)
        return result | ({"corrupt": ignored} if ignored else {})
