"""The loops compared: train.py's own, the one of most tutorials, and that of Hugging Face's example.

Each takes a turn (turns.py) when it is ready, saying what it is, and after each epoch.
"""

import json
import os
import time

import turns

CASES = {
    "simple_cnn": ("simple_cnn", "train", ("all",)),
    "deep_cnn": ("deep_cnn", "train", ("all",)),
    "resnet50:head": ("resnet50", "head", ("head",)),
    "resnet50:finetune": ("resnet50", "finetune", ("layer3", "layer4", "head")),
}  # model, phase, and the modules that it trains


def config_of(case: str, source: str, batch_size: int, output_dir: str, **sections):
    """The configuration of an endless run of one case; keywords replace values of its sections."""
    from recipe import check

    model, phase, modules = CASES[case]
    tree = {
        "model": {"name": model},
        # Only a fiftieth is held out, as validation is not measured.
        "data": {"source": str(source), "batch_size": batch_size, "folds": 50, "test_split": None},
        "phases": {phase: {"modules": modules, "epochs": 10**6, "lr": 1e-4, "weight_decay": 1e-4}},
        "tracking": "none",
        "checkpoint": {"every_minutes": None, "keep": 1},
        "output_dir": str(output_dir),
    }
    for name, values in sections.items():
        tree[name] = tree.get(name, {}) | values if isinstance(values, dict) else values
    return check(tree, "benchmark")


def ours(config, report=lambda row: row["images_per_second"]) -> None:
    """Run train.py, ready before anything is decoded; `report` turns an epoch's history row into its value."""
    import train
    from tracking import Tracking

    class TakingTurns(Tracking):
        def __enter__(self):
            turns.take({"what": self.accelerator.mixed_precision.replace("no", "fp32")})
            return super().__enter__()

        def epoch(self, *figures):
            super().epoch(*figures)
            turns.take(report(json.loads(self.history.read_text(encoding="utf-8").splitlines()[-1])))

    train.Tracking = TakingTurns
    train.train(config)


def usual_transforms(mean, std):
    from torchvision import transforms as T

    return T.Compose(
        [
            T.RandomCrop(32, padding=4),
            T.RandomHorizontalFlip(),
            T.ColorJitter(brightness=0.2, contrast=0.2, saturation=0.2),
            T.RandomRotation(15),
            T.ToTensor(),
            T.Normalize(mean, std),
        ]
    )


def usual_optimizer(model, modules, lr: float, weight_decay: float):
    """Freeze by `requires_grad` alone, as most scripts do; Adam gets what trains."""
    import torch

    import models

    models.freeze_all_but(model, modules)
    training = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.Adam(training, lr=lr, weight_decay=weight_decay)


def usual_model(case: str):
    import timm
    import torch

    name, _, modules = CASES[case]
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=100)
    return model, usual_optimizer(model, modules, lr=1e-4, weight_decay=1e-4)


class Plain:
    """The usual loop: torchvision's transforms on PIL images in a DataLoader with a worker per core, fp32, contiguous.

    Args:
        source: `data.Data`, memory-mapped.
        mean, std: the normalisation.
    """

    def __init__(self, source, batch_size: int, mean, std):
        import numpy as np
        import torch
        from PIL import Image
        from torch.utils.data import DataLoader, Dataset
        from torchvision import transforms as T

        import decoding
        import processes

        class Images(Dataset):
            """Like torchvision's CIFAR100: arrays in memory, made PIL images and transformed on access."""

            def __init__(self, rows, transform):
                self.arrays = [np.asarray(decoding.decode(row[source.image])) for row in rows]
                self.labels, self.transform = rows[source.label], transform

            def __len__(self):
                return len(self.labels)

            def __getitem__(self, index):
                return self.transform(Image.fromarray(self.arrays[index])), self.labels[index]

        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.criterion = torch.nn.CrossEntropyLoss()
        workers = processes.cores_per_process()
        training = Images(source.train, usual_transforms(mean, std))
        self.train_loader = DataLoader(training, batch_size, shuffle=True, drop_last=True, num_workers=workers)
        validation = Images(source.validation, T.Compose([T.ToTensor(), T.Normalize(mean, std)]))
        self.val_loader = DataLoader(validation, batch_size, num_workers=workers)

    def train_epoch(self, model, optimizer) -> float:
        """One epoch, the whole model in training mode, frozen layers too; returns images per second."""
        model.train()
        began, seen, loss_sum, correct = time.perf_counter(), 0, 0.0, 0
        for images, labels in self.train_loader:
            images, labels = images.to(self.device), labels.to(self.device)
            optimizer.zero_grad()
            logits = model(images)
            loss = self.criterion(logits, labels)
            loss.backward()
            optimizer.step()
            loss_sum += loss.item()
            correct += (logits.argmax(1) == labels).sum().item()
            seen += len(labels)
        return seen / (time.perf_counter() - began)

    def validate(self, model) -> float:
        """Top-1 on the validation rows."""
        import torch

        model.eval()
        correct = 0
        with torch.no_grad():
            for images, labels in self.val_loader:
                correct += (model(images.to(self.device)).argmax(1).cpu() == labels).sum().item()
        return correct / len(self.val_loader.dataset)


def plain(case: str, source: str, batch_size: int):
    import data
    from config import DataConfig
    from models import CIFAR100_MEAN, CIFAR100_STD

    loop = Plain(
        data.load(DataConfig(source=source, folds=50, test_split=None)), batch_size, CIFAR100_MEAN, CIFAR100_STD
    )
    model, optimizer = usual_model(case)
    model.to(loop.device)
    yield {"what": "fp32"}
    while True:
        yield loop.train_epoch(model, optimizer)


def hf(case: str, source: str, batch_size: int):
    import torch
    from accelerate import Accelerator
    from datasets import Image
    from torch.utils.data import DataLoader

    import data
    from config import DataConfig
    from metrics import TopKAccuracy
    from models import CIFAR100_MEAN, CIFAR100_STD

    os.environ["ACCELERATE_MIXED_PRECISION"] = "no"
    accelerator = Accelerator()
    opened = data.load(DataConfig(source=source, folds=50, test_split=None))
    transforms = usual_transforms(CIFAR100_MEAN, CIFAR100_STD)

    def preprocess(batch):
        batch["pixel_values"] = [transforms(image.convert("RGB")) for image in batch[opened.image]]
        return batch

    def collate(rows):
        return {
            "pixel_values": torch.stack([row["pixel_values"] for row in rows]),
            "labels": torch.tensor([row[opened.label] for row in rows]),
        }

    rows = opened.train.cast_column(opened.image, Image()).with_transform(preprocess)
    loader = DataLoader(rows, shuffle=True, collate_fn=collate, batch_size=batch_size, drop_last=True)
    model, optimizer, loader = accelerator.prepare(*usual_model(case), loader)
    metric = TopKAccuracy(1)
    yield {"what": "fp32"}
    while True:
        model.train()
        began, seen, loss_sum = time.perf_counter(), 0, 0.0
        for batch in loader:
            with accelerator.accumulate(model):
                logits = model(batch["pixel_values"])
                loss = torch.nn.functional.cross_entropy(logits, batch["labels"])
                loss_sum += loss.detach().float()
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            predictions, references = accelerator.gather_for_metrics((logits.argsort(-1, True), batch["labels"]))
            metric.add_batch(predictions=predictions[:, :1], references=references)
            seen += len(references)
        metric.compute()
        yield seen / (time.perf_counter() - began)
