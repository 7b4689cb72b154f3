"""Loss and accuracy as `evaluate.Metric` classes of this project, which need no download from the hub.

`Classification` collects an epoch's rows and computes their metrics.
"""

import datasets
import evaluate
import numpy as np
import torch
from torch import Tensor

from errors import UserError

CHUNK = 2**16  # rows summed up at once
IGNORED = -1  # the label of a row that no loss or metric counts: its image could not be decoded


class RowMetric(evaluate.Metric):
    """A metric over rows; predictions and references are arrays, or lists of lists."""

    def compute(self, *, predictions=None, references=None, **options):
        """The metric over these rows and those added before."""
        # evaluate would write each row to a table and read it back, in Python: half a second for 40,000 rows.
        given = predictions is not None and references is not None and len(predictions) == len(references)
        if given and self.writer is None and not options:
            return self._compute(predictions, references)
        return super().compute(predictions=predictions, references=references, **options)


class TopKAccuracy(RowMetric):
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


class MeanLoss(RowMetric):
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
    """Collects one epoch's rows and computes `loss`, `top1` and `top5` at its end.

    The rows stay on the device, so that no step has to wait for it. Every CHUNK rows they are summed up, so that
    memory does not grow with the epoch.
    """

    PARTS = ("losses", "classes", "labels")
    SUMS = ("loss", "top1", "top5", "counted", "corrupt")  # the metrics' own names, and two row counts

    def __init__(self):
        self.metrics = [TopKAccuracy(1, keep_in_memory=True), TopKAccuracy(5, keep_in_memory=True)]
        self.loss = MeanLoss(keep_in_memory=True)
        self._start_afresh()

    def _start_afresh(self) -> None:
        self.rows: list[tuple[Tensor, Tensor, Tensor]] = []  # those not summed up yet
        self.waiting = 0  # how many these are
        self.sums = dict.fromkeys(self.SUMS, 0.0)

    @staticmethod
    def reduce(logits: Tensor, labels: Tensor, losses: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What to keep of a batch: losses (B,), the (up to) 5 likeliest classes (B, 5), labels (B,)."""
        return losses.detach().float(), logits.detach().topk(min(5, logits.shape[1])).indices, labels

    def add(self, losses: Tensor, classes: Tensor, labels: Tensor) -> None:
        self.rows.append((losses, classes, labels))
        self.waiting += len(labels)
        if self.waiting >= CHUNK:
            self._sum_up()

    def state_dict(self) -> dict[str, Tensor]:
        """Rows not summed up yet: `losses` (N,), `classes` (N, 5), `labels` (N,); and the earlier rows' `sums` (5,).

        Empty ones are left out.
        """
        state = {name: torch.cat(part) for name, part in zip(self.PARTS, zip(*self.rows, strict=True), strict=False)}
        if any(self.sums.values()):
            state["sums"] = torch.tensor(list(self.sums.values()), dtype=torch.float64)
        return state

    def load_state_dict(self, state: dict[str, Tensor], device: torch.device) -> None:
        self._start_afresh()
        if "sums" in state:
            self.sums = dict(zip(self.SUMS, state["sums"].tolist(), strict=True))
        if "labels" in state:
            self.add(*(state[name].to(device) for name in self.PARTS))

    def compute(self, gather=lambda sums: sums) -> dict[str, float]:
        """The metrics of all rows added since the last call; if any were ignored, their number as `corrupt`.

        Args:
            gather: joins the processes' lists (of one dict each) if their rows were not gathered batch by batch.

        Raises:
            UserError: no rows were added, or none that count.
        """
        self._sum_up()
        gathered = gather([self.sums])
        sums = {name: sum(each[name] for each in gathered) for name in self.SUMS}
        self._start_afresh()
        if not sums["counted"] + sums["corrupt"]:
            raise UserError("there are no rows to judge: the split is empty", shared=True)
        if not sums["counted"]:
            raise UserError("none of the images can be decoded", shared=True)
        figures = {name: sums[name] / sums["counted"] for name in ("loss", "top1", "top5")}
        return figures | ({"corrupt": int(sums["corrupt"])} if sums["corrupt"] else {})

    def _sum_up(self) -> None:
        if not self.rows:
            return
        losses, classes, labels = (torch.cat(part).cpu().numpy() for part in zip(*self.rows, strict=True))
        self.rows, self.waiting = [], 0
        counted = labels != IGNORED
        losses, classes, labels = losses[counted], classes[counted], labels[counted]
        self.sums["corrupt"] += len(counted) - len(labels)
        self.sums["counted"] += len(labels)
        if not len(labels):
            return
        self.sums["loss"] += self.loss.compute(predictions=losses, references=labels)["loss"] * len(labels)
        for metric in self.metrics:
            for name, share in metric.compute(predictions=classes, references=labels).items():
                self.sums[name] += round(share * len(labels))  # hits: a tie between epochs does not depend on chunks
