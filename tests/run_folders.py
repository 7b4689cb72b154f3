"""Run folders as train.py and predict.py leave them, made up: histories, predictions, thumbnails."""

import io
import json
import random
from pathlib import Path

import yaml
from PIL import Image

SUPERCLASSES = 5


def config(phases: dict[str, int], **values) -> dict:
    """A whole configuration's outline; `values` replace its sections' values, as in `data={"fold": 1}`."""
    tree = {
        "model": {"name": "resnet50", "pretrained": True},
        "data": {"source": "uoft-cs/cifar100", "folds": 5, "fold": 0, "batch_size": 64},
        "phases": {
            name: {"modules": ["head"], "epochs": epochs, "lr": 1e-3, "schedule": "plateau"}
            for name, epochs in phases.items()
        },
        "seed": 0,
        "output_dir": "runs",
        "environment": {"mixed_precision": "bf16", "processes": 1, "device_type": "cpu"},
    }
    for name, value in values.items():
        tree[name] = tree.get(name, {}) | value if isinstance(value, dict) else value
    return tree


def history(phases: dict[str, int], jump: float = 0.1, start: float = 0.3, seed: int = 0) -> list[dict]:
    """A row per epoch: validation top-1 rises by a point an epoch, and by `jump` where the phase changes."""
    rows, top1, chance = [], start, random.Random(seed)
    for index, (name, epochs) in enumerate(phases.items()):
        for epoch in range(epochs):
            top1 = min(0.95, top1 + (0.01 if epoch else jump * (index > 0)))
            lr = (1e-3 if index == 0 else 1e-4) * (0.1 if epoch >= 7 else 1)
            count = len(rows) + 1
            row = {
                "phase": name, "epoch": count, "phase_epoch": epoch + 1, "step": 625 * count, "lr": lr,
                "train_loss": 4.0 * (1 - top1), "train_top1": min(1.0, top1 + 0.05), "train_top5": 0.7,
                "val_loss": 4.2 * (1 - top1) + 0.05 * chance.random(), "val_top1": top1, "val_top5": 0.75,
                "seconds": 60.0, "images_per_second": 1000.0 if index == 0 else 500.0, "seconds_left": 0.0,
            }  # fmt: skip
            rows.append(row)
    return rows


def write_run(folder: Path, phases: dict[str, int], rows: list[dict] | None = None, finished: bool = True, **values):
    """A run folder; `rows` are its history's, `values` go to `config`."""
    folder.mkdir(parents=True)
    rows = history(phases) if rows is None else rows
    (folder / "config.yaml").write_text(yaml.safe_dump(config(phases, **values), sort_keys=False))
    (folder / "history.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if finished:
        figures = {"test_loss": 2.345, "test_top1": 0.4321, "test_top5": 0.7, "parameters": 23_712_932}
        (folder / "summary.json").write_text(json.dumps(figures))
    return folder


def png(side: int = 32, seed: int = 0) -> bytes:
    written = io.BytesIO()
    noise = random.Random(seed).randbytes(side * side * 3)
    Image.frombytes("RGB", (side, side), noise).save(written, "PNG")
    return written.getvalue()


def split(name: str, classes: list[str], mistakes: int = 24, seed: int = 0, **values) -> dict:
    """Predictions on a split: 20 images a class, most of them right, the rest mostly taken for the next class."""
    chance, count = random.Random(seed), len(classes)
    confusion = [[0] * count for _ in classes]
    for true in range(count):
        for _ in range(20):
            hit = chance.random() < 0.3 + 0.6 * true / count
            confusion[true][true if hit else (true + chance.choice([1, 1, 1, 2, 7])) % count] += 1
    right = [confusion[i][i] for i in range(count)]
    pairs = sorted(
        ((confusion[i][j], classes[i], classes[j]) for i in range(count) for j in range(count) if i != j), reverse=True
    )
    groups = [list(range(i, count, SUPERCLASSES)) for i in range(min(SUPERCLASSES, count))]
    return {
        "kind": "split", "name": name, "source": "uoft-cs/cifar100", "rows": 20 * count, "limit": None, "tta": None,
        "split": "test", "loss": 1.9, "top1": sum(right) / (20 * count), "top5": 0.9, "ece": 0.043,
        "class_names": classes, "confusion": confusion,
        "per_class": [{"name": it, "rows": 20, "top1": n / 20} for it, n in zip(classes, right, strict=True)],
        "superclasses": {
            "top1": 0.8,
            "per_superclass": [
                {"name": f"group {i}", "rows": 20 * len(group), "superclass_top1": 0.95,
                 "top1": sum(right[j] for j in group) / (20 * len(group))} for i, group in enumerate(groups)
            ],
        },
        "reliability": [
            {"low": i / 15, "high": (i + 1) / 15, "rows": 0 if i == 3 else 10 * i,
             "confidence": None if i == 3 else (i + 0.5) / 15, "accuracy": None if i == 3 else (i / 15) ** 1.3}
            for i in range(15)
        ],
        "confused": [{"true": a, "predicted": b, "rows": n, "share": n / 20} for n, a, b in pairs[:20] if n],
        "mistakes": [
            {"id": f"test/{i}", "true": classes[i % count], "predicted": classes[(i + 1) % count],
             "probability": 0.99 - i / 100, "thumbnail": f"mistakes/{name}/{i:02d}.png"} for i in range(mistakes)
        ],
    } | values  # fmt: skip


CORRUPTIONS = [
    *("gaussian_noise", "shot_noise", "impulse_noise", "defocus_blur", "glass_blur", "motion_blur", "zoom_blur"),
    *("snow", "frost", "fog", "brightness", "contrast", "elastic_transform", "pixelate", "jpeg_compression"),
    *("speckle_noise", "gaussian_blur", "spatter", "saturate"),
]


def corrupted(kind: str, name: str | None = None, mean15: float = 0.251, **values) -> dict:
    return {
        "kind": kind, "name": name or kind, "source": "uoft-cs/cifar100", "rows": 10_000, "limit": None, "tta": None,
        "seed": 0, "mean15": mean15, "mean19": 0.26, "note": f"What {kind} figures are, in a sentence.",
        "corruptions": [
            {"name": it, "in_mean15": i < 15, "top1": [0.5 - 0.02 * i - 0.02 * s for s in range(5)], "mean": 0.3}
            for i, it in enumerate(CORRUPTIONS)
        ],
    } | values  # fmt: skip


def write_predictions(run: Path, *found: dict, side: int = 32) -> None:
    """RUN/predictions/NAME.json and the thumbnails that it names, each another picture."""
    for it in found:
        folder = run / "predictions"
        folder.mkdir(exist_ok=True)
        (folder / f"{it['name']}.json").write_text(json.dumps(it))
        for number, mistake in enumerate(it.get("mistakes", ())):
            path = folder / mistake["thumbnail"]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(png(side, number))
