"""Patches that change what is learned: the report's faults, put back to show what each costs, and tricks.

A trick becomes an option of train.py once a recipe should use it (docs/results.md says what it gains).
"""

import patching
import speed

from errors import UserError

AUGMENTING = ("trivial_augment", "erasing", "noise_and_blur", "unaugmented")  # on top of the report's policy
EXCLUSIVE = (("no_decay_on_norms", "layer_decay"), ("ema", "flips_averaged"))  # of each, only one


# ---- the report's faults --------------------------------------------------------------------------------------------


@patching.named
def drifting_batch_norm():
    """Plain model.train(): frozen layers normalise by the batch, and their statistics drift."""
    import engine

    speed.unfolded()
    patching.patch(engine, "train_mode", lambda _: lambda model: model.train())


@patching.named
def other_normalisation():
    """Validate and test with CIFAR-100's mean and std, not the weights' own (if they are the same: ImageNet's).

    The report's scripts did so on the distorted images. predict.py is not patched.
    """
    from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

    import augment
    import models

    def make(build):
        def build_differently(config, cfg, device):
            other = cfg | {"mean": models.CIFAR100_MEAN, "std": models.CIFAR100_STD}
            if other == cfg:
                other = cfg | {"mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD}
            return build(config, cfg, device)[0], build(config, other, device)[1]

        return build_differently

    patching.patch(augment, "build", make)


@patching.named
def unaugmented():
    """Training images are only normalised, as the report's scripts did by mistake."""
    import augment

    patching.patch(augment.ReportAugment, "augment", lambda _: augment.Normalize.augment)


# ---- tricks that were tried -----------------------------------------------------------------------------------------


def training_loss(loss) -> None:
    """Replace the cross-entropy by loss(cross_entropy, logits, labels) in training, not in validation."""
    import types

    import torch

    import engine

    def make(functional):
        real = functional.cross_entropy

        def cross_entropy(logits, labels, **options):
            if not torch.is_grad_enabled():
                return real(logits, labels, **options)
            return loss(lambda *args, **more: real(*args, **options, **more), logits, labels)

        return types.SimpleNamespace(cross_entropy=cross_entropy)

    patching.patch(engine, "F", make)


@patching.named
def label_smoothing():
    """A tenth of each target is spread over all classes."""
    training_loss(lambda real, logits, labels: real(logits, labels, label_smoothing=0.1))


def augmented(more) -> None:
    """Apply more(images) to (B, 3, H, W) in [0, 1] after the report's augmentation."""
    import augment

    def make(real):
        class More(real):
            def augment(self, images):
                return more(super().augment(images))

        return More

    patching.patch(augment, "ReportAugment", make)


@patching.named
def trivial_augment():
    """Mueller & Hutter (2021): one random operation of random strength per image; torchvision's, one by one."""
    import torch
    from torchvision.transforms.v2 import TrivialAugmentWide

    import graphs

    trivial = TrivialAugmentWide()
    patching.patch(graphs, "Replayed", lambda _: lambda function: function)  # a graph would replay one draw

    def more(images):
        return torch.stack([trivial(image) for image in (255 * images).round().to(torch.uint8)]).float() / 255

    augmented(more)


@patching.named
def erasing():
    """Cutout (2017): a grey square of half the side at a random place, clipped at the border."""
    import torch

    def more(images):
        count, _, height, width = images.shape
        centre_y, centre_x = torch.rand(2, count, 1, device=images.device)
        rows = (torch.arange(height, device=images.device) + 0.5) / height
        columns = (torch.arange(width, device=images.device) + 0.5) / width
        inside_y, inside_x = (rows - centre_y).abs() < 0.25, (columns - centre_x).abs() < 0.25
        return images.masked_fill(inside_y[:, None, :, None] & inside_x[:, None, None, :], 0.5)

    augmented(more)


@patching.named
def noise_and_blur():
    """Half of the images get Gaussian noise or blur. This noise is one of the robustness mean's 15 corruptions."""
    import torch
    from torchvision.transforms.v2.functional import gaussian_blur

    def more(images):
        which, strength = torch.rand(2, len(images), 1, 1, 1, device=images.device)
        noisy = (images + 0.1 * strength * torch.randn_like(images)).clamp(0, 1)
        blurred = gaussian_blur(images, [3, 3], [0.8])
        return torch.where(which < 0.25, noisy, torch.where(which < 0.5, blurred, images))

    augmented(more)


def grouped(groups) -> None:
    """Give each phase's optimizer groups(phase, named trainable parameters) instead of one group."""
    import train

    def make(make_optimizer):
        def make_grouped(phase, model):
            optimizer = make_optimizer(phase, model)
            defaults = {key: value for key, value in optimizer.param_groups[0].items() if key != "params"}
            training = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
            optimizer.param_groups[:] = [defaults | group for group in groups(phase, training)]
            return optimizer

        return make_grouped

    patching.patch(train, "make_optimizer", make)


@patching.named
def no_decay_on_norms():
    """Weight decay on matrices and filters only, not on norms and biases."""

    def groups(phase, training):
        wide = [parameter for _, parameter in training if parameter.ndim > 1]
        narrow = [parameter for _, parameter in training if parameter.ndim <= 1]
        return [{"params": wide}, {"params": narrow, "weight_decay": 0.0}]

    grouped(groups)


@patching.named
def layer_decay():
    """Each stage before the last learns 0.7 times as fast as the one after it."""

    def groups(phase, training):
        depth = {"fc": 0, "layer4": 1, "layer3": 2, "layer2": 3, "layer1": 4, "conv1": 5, "bn1": 5}
        by_stage = {}
        for name, parameter in training:
            module = name.split(".")[0]
            if module not in depth:
                raise UserError(f"layer_decay: made for ResNets; this model has a {module}")
            by_stage.setdefault(depth[module], []).append(parameter)
        return [{"params": by_stage[stage], "lr": phase.lr * 0.7**stage} for stage in sorted(by_stage)]

    grouped(groups)


@patching.named
def ema():
    """Validation, best/ and test use an exponential moving average of the weights (~500 steps). No --resume."""
    import contextlib

    import torch

    import checkpoint
    import train

    averages = {}

    def average(model, share):
        for name, value in model.state_dict().items():
            if value.is_floating_point() and name in averages and averages[name].shape == value.shape:
                averages[name].lerp_(value.detach(), share)
            else:
                averages[name] = value.detach().clone()

    @contextlib.contextmanager
    def averaged(model):
        own = {name: value.detach().clone() for name, value in model.state_dict().items()}
        model.load_state_dict({name: averages.get(name, value) for name, value in own.items()})
        try:
            yield
        finally:
            model.load_state_dict(own)

    def make_train(train_epoch):
        def epoch(accelerator, model, *rest):
            for step in train_epoch(accelerator, model, *rest):
                with torch.no_grad():
                    average(accelerator.unwrap_model(model), 1 / 500 if averages else 1.0)
                yield step

        return epoch

    def make_validate(validate):
        def judge(accelerator, model, *rest):
            with averaged(accelerator.unwrap_model(model)):
                return validate(accelerator, model, *rest)

        return judge

    def make_save(save_best):
        def save(model, run):
            with averaged(model):
                save_best(model, run)

        return save

    def make_load(load_best):
        def load(model, run):
            averages.clear()
            load_best(model, run)

        return load

    patching.patch(train, "train_epoch", make_train)
    patching.patch(train, "validate", make_validate)
    patching.patch(checkpoint, "save_best", make_save)
    patching.patch(checkpoint, "load_best", make_load)


@patching.named
def flips_averaged():
    """Validation and test average the probabilities of each image and its mirror image, as predict.py --tta flips."""
    from torch import nn

    import train
    from inference import log_probabilities

    class Averaged(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, images):
            return log_probabilities(self.model, images, "flips")

    def make(validate):
        return lambda accelerator, model, *rest: validate(accelerator, Averaged(model), *rest)

    patching.patch(train, "validate", make)
