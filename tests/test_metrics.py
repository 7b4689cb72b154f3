import evaluate
import pytest
import torch
import torch.nn.functional as F

from errors import UserError
from metrics import IGNORED, Classification, MeanLoss, TopKAccuracy


def test_against_a_plain_computation():
    torch.manual_seed(0)
    logits, labels = torch.randn(101, 10), torch.randint(10, (101,))
    losses = F.cross_entropy(logits, labels, reduction="none")
    metrics = Classification()
    for rows in torch.arange(101).split(32):
        metrics.add(*metrics.reduce(logits[rows], labels[rows], losses[rows]))
    result = metrics.compute()
    order = logits.argsort(descending=True)
    assert result["top1"] == pytest.approx((order[:, 0] == labels).float().mean().item())
    assert result["top5"] == pytest.approx((order[:, :5] == labels[:, None]).any(1).float().mean().item())
    assert result["loss"] == pytest.approx(losses.mean().item())


def test_fewer_than_five_classes():
    metrics = Classification()
    logits = torch.tensor([[0.0, 1.0, 2.0], [2.0, 1.0, 0.0]])
    metrics.add(*metrics.reduce(logits, torch.tensor([2, 2]), torch.tensor([0.5, 1.5])))
    assert metrics.compute() == {"loss": 1.0, "top1": 0.5, "top5": 1.0}


def test_computing_starts_afresh_and_refuses_nothing():
    metrics = Classification()
    metrics.add(torch.tensor([1.0]), torch.tensor([[0]]), torch.tensor([0]))
    metrics.compute()
    with pytest.raises(UserError, match="no rows"):
        metrics.compute()


def test_rows_without_an_image_count_for_nothing_but_their_number():
    metrics = Classification()
    logits, labels = torch.tensor([[0.0, 1.0], [2.0, 1.0], [3.0, 0.0]]), torch.tensor([1, IGNORED, IGNORED])
    losses = F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="none")
    metrics.add(*metrics.reduce(logits, labels, losses))
    assert metrics.compute() == {"corrupt": 2, "loss": pytest.approx(losses[0].item()), "top1": 1.0, "top5": 1.0}
    metrics.add(*metrics.reduce(logits[1:], labels[1:], losses[1:]))
    with pytest.raises(UserError, match="none of the images can be decoded"):
        metrics.compute()


def test_a_model_that_gives_nan_is_not_counted_as_right():
    metrics = Classification()
    logits = torch.full((4, 10), float("nan"))
    labels = torch.tensor([9, 8, 7, 6])
    metrics.add(*metrics.reduce(logits, labels, torch.full((4,), float("nan"))))
    result = metrics.compute()
    assert result["loss"] != result["loss"]
    assert result["top1"] < 1


def test_they_are_metrics_of_the_evaluate_library():
    assert TopKAccuracy(1, keep_in_memory=True).compute(predictions=[[3], [1]], references=[3, 2]) == {"top1": 0.5}
    loss = MeanLoss(keep_in_memory=True)
    loss.add_batch(predictions=[1.0, 2.0], references=[0, 0])
    loss.add_batch(predictions=[6.0], references=[0])
    assert loss.compute() == {"loss": 3.0}


def test_an_epochs_rows_are_written_to_no_table(monkeypatch):
    """Of 40,000 rows evaluate's table takes half a second."""
    metrics = added(Classification(), [torch.arange(100)])
    monkeypatch.setattr(evaluate.Metric, "_init_writer", lambda *_, **__: pytest.fail("a table is written"))
    assert metrics.compute()["top1"] > 0


def test_what_was_added_before_counts_too():
    metric = TopKAccuracy(1, keep_in_memory=True)
    metric.add_batch(predictions=[[3], [3]], references=[3, 3])
    assert metric.compute(predictions=[[3], [1]], references=[3, 2]) == {"top1": 0.75}
    assert metric.compute(predictions=[[3], [1]], references=[3, 2]) == {"top1": 0.5}, "and not twice"


def a_hundred_rows():
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(100, 10, generator=generator), torch.randint(10, (100,), generator=generator)
    labels[[3, 50, 51]] = IGNORED
    return logits, labels, F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="none")


def added(metrics, rows):
    logits, labels, losses = a_hundred_rows()
    for part in rows:
        metrics.add(*metrics.reduce(logits[part], labels[part], losses[part]))
    return metrics


def test_rows_are_summed_up_as_they_come_to_the_same_figures(monkeypatch):
    rows = torch.arange(100).split(4)
    whole = added(Classification(), rows).compute()
    monkeypatch.setattr("metrics.CHUNK", 7)
    metrics = Classification()
    for part in rows:
        added(metrics, [part])
        assert sum(len(labels) for *_, labels in metrics.rows) < 7, "memory does not grow with the epoch"
    assert metrics.compute() == pytest.approx(whole, rel=1e-12)
    assert 0 < whole["top1"] < whole["top5"] < 1 and whole["corrupt"] == 3


@pytest.mark.parametrize("begun", [0, 1, 5, 24])
def test_what_was_added_before_a_checkpoint_counts_after_it(monkeypatch, begun):
    rows = torch.arange(100).split(4)
    monkeypatch.setattr("metrics.CHUNK", 7)
    saved = added(Classification(), rows[:begun]).state_dict()
    again = Classification()
    again.load_state_dict(saved, torch.device("cpu"))
    assert added(again, rows[begun:]).compute() == added(Classification(), rows).compute()


def test_processes_count_by_their_rows():
    rows = torch.arange(100).split(4)
    one, two = added(Classification(), rows[:5]), added(Classification(), rows[5:])
    one._sum_up()
    figures = two.compute(lambda sums: [one.sums, *sums])
    assert figures == pytest.approx(added(Classification(), rows).compute(), rel=1e-12)
