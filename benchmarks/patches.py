"""train.py as it is, but for one thing: patches for experiments that are no options.

    accelerate launch benchmarks/patches.py drifting_batch_norm -- --config recipes/resnet50.yaml --seed 1

trains with the patches that are named before `--` and with train.py's options after it. There are the report's faults,
put back to show what each costs; tricks that were tried, and are an option only if they helped (docs/results.md); and
what makes training fast, taken out (levers.py). `python benchmarks/patches.py --list` tells their names.
"""

import argparse
import dataclasses
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import hub
from commandline import parse
from config import PLAIN_NAME
from errors import USAGE, UserError, told

PATCHES = {}  # by name
MIXING, GROUPING = ("mixup", "cutmix"), ("no_decay_on_norms", "layer_decay")
AUGMENTING = (*MIXING, "trivial_augment", "erasing", "noise_and_blur", "unaugmented")
EXCLUSIVE = (MIXING, GROUPING)


def named(function):
    PATCHES[function.__name__] = function
    return function


def patch(module, name: str, make) -> None:
    """Put what `make` makes of it in the place of a module's attribute, which has to be there."""
    setattr(module, name, make(getattr(module, name)))


# ---- the report's faults --------------------------------------------------------------------------------------------


@named
def drifting_batch_norm():
    """A bare model.train(): frozen layers normalise by the batch, and their statistics drift."""
    import engine

    unfolded()
    patch(engine, "train_mode", lambda _: lambda model: model.train())


@named
def other_normalisation():
    """Validation and test with CIFAR-100's mean and deviation, not the weights' own. Not predict.py."""
    import augment
    import models

    def make(build):
        def build_differently(config, cfg, device):
            other = cfg | {"mean": models.CIFAR100_MEAN, "std": models.CIFAR100_STD}
            if other == cfg:
                raise UserError("other_normalisation: these weights were trained with CIFAR-100's own")
            return build(config, cfg, device)[0], build(config, other, device)[1]

        return build_differently

    patch(augment, "build", make)


# ---- tricks that were tried -----------------------------------------------------------------------------------------


def training_loss(loss) -> None:
    """Put loss(cross_entropy, logits, labels) in the place of the cross-entropy in training, not in validation."""
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

    patch(engine, "F", make)


@named
def label_smoothing():
    """A tenth of each target is spread over all classes."""
    training_loss(lambda real, logits, labels: real(logits, labels, label_smoothing=0.1))


def mixed(mix) -> None:
    """Training images become those of mix(images, partners), and their loss that of both labels, by share.

    A batch's partners are the batch reversed. `mix` gives the images and which share (B,) of each is its own.
    """
    import augment

    kept = []

    def make(real):
        class Mixed(real):
            def augment(self, images):
                images = super().augment(images)
                images, share = mix(images, images.flip(0))
                kept[:] = [share]
                return images

        return Mixed

    def loss(real, logits, labels):
        (share,) = kept
        return share * real(logits, labels) + (1 - share) * real(logits, labels.flip(0))

    patch(augment, "ReportAugment", make)
    training_loss(loss)


@named
def mixup():
    """Zhang et al. (2018), alpha 0.2."""
    import torch

    def mix(images, partners):
        share = torch.distributions.Beta(0.2, 0.2).sample((len(images),)).to(images.device)
        weight = share.view(-1, 1, 1, 1)
        return weight * images + (1 - weight) * partners, share

    mixed(mix)


@named
def cutmix():
    """Yun et al. (2019), alpha 1, on half of the images."""
    import torch

    def mix(images, partners):
        count, _, height, width = images.shape
        aside, centre_y, centre_x, used = torch.rand(4, count, 1, device=images.device)
        side = torch.where(used < 0.5, aside.sqrt(), 0) / 2  # half of the box's, relative; its area is uniform
        rows = (torch.arange(height, device=images.device) + 0.5) / height
        columns = (torch.arange(width, device=images.device) + 0.5) / width
        box = ((rows - centre_y).abs() < side)[:, None, :, None] & ((columns - centre_x).abs() < side)[:, None, None, :]
        return torch.where(box, partners, images), 1 - box.float().mean((1, 2, 3))

    mixed(mix)


def augmented(more) -> None:
    """After the report's augmentation, images (B, 3, H, W) in [0, 1] go through more(images)."""
    import augment

    def make(real):
        class More(real):
            def augment(self, images):
                return more(super().augment(images))

        return More

    patch(augment, "ReportAugment", make)


@named
def trivial_augment():
    """Mueller & Hutter (2021): one operation of random strength, drawn for each image; torchvision's, one by one."""
    import torch
    from torchvision.transforms.v2 import TrivialAugmentWide

    trivial = TrivialAugmentWide()

    def more(images):
        return torch.stack([trivial(image) for image in (255 * images).round().to(torch.uint8)]).float() / 255

    augmented(more)


@named
def erasing():
    """A square of half the side, at a random place and cut off at the border, becomes grey: cutout (2017)."""
    import torch

    def more(images):
        count, _, height, width = images.shape
        centre_y, centre_x = torch.rand(2, count, 1, device=images.device)
        rows = (torch.arange(height, device=images.device) + 0.5) / height
        columns = (torch.arange(width, device=images.device) + 0.5) / width
        inside_y, inside_x = (rows - centre_y).abs() < 0.25, (columns - centre_x).abs() < 0.25
        return images.masked_fill(inside_y[:, None, :, None] & inside_x[:, None, None, :], 0.5)

    augmented(more)


@named
def noise_and_blur():
    """Half of the images get Gaussian noise or a Gaussian blur. These are two of the 15 corruptions that are judged."""
    import torch
    from torchvision.transforms.v2.functional import gaussian_blur

    def more(images):
        which, strength = torch.rand(2, len(images), 1, 1, 1, device=images.device)
        noisy = (images + 0.1 * strength * torch.randn_like(images)).clamp(0, 1)
        blurred = gaussian_blur(images, [3, 3], [0.8])
        return torch.where(which < 0.25, noisy, torch.where(which < 0.5, blurred, images))

    augmented(more)


def grouped(groups) -> None:
    """Each phase's optimizer gets groups(phase, named parameters that train) in the place of one group."""
    import train

    def make(make_optimizer):
        def make_grouped(phase, model):
            optimizer = make_optimizer(phase, model)
            defaults = {key: value for key, value in optimizer.param_groups[0].items() if key != "params"}
            training = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
            optimizer.param_groups[:] = [defaults | group for group in groups(phase, training)]
            return optimizer

        return make_grouped

    patch(train, "make_optimizer", make)


@named
def no_decay_on_norms():
    """Weight decay on matrices and filters only, not on norms and biases."""

    def groups(phase, training):
        wide = [parameter for _, parameter in training if parameter.ndim > 1]
        narrow = [parameter for _, parameter in training if parameter.ndim <= 1]
        return [{"params": wide}, {"params": narrow, "weight_decay": 0.0}]

    grouped(groups)


@named
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


@named
def ema():
    """Validation, best/ and test take an exponential moving average of the weights (some 500 steps). No --resume."""
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

    patch(train, "train_epoch", make_train)
    patch(train, "validate", make_validate)
    patch(checkpoint, "save_best", make_save)
    patch(checkpoint, "load_best", make_load)


# ---- what makes training fast, taken out or put in ------------------------------------------------------------------


@named
def unfolded():
    """Frozen batch norms stay what they are, instead of becoming part of their convolutions."""
    import folding

    patch(folding, "fold", lambda _: lambda *_: 0)


@named
def contiguous():
    """Images in torch's default memory layout, as weights are, instead of channels_last."""
    import torch

    patch(torch, "channels_last", lambda _: torch.contiguous_format)


@named
def weights_channels_last():
    """Weights in channels_last, as images are, instead of torch's default memory layout."""
    import torch

    import launch

    patch(launch, "in_its_layout", lambda _: lambda model, _: model.to(memory_format=torch.channels_last))


@named
def unfused():
    """Optimizers that update one tensor after the other."""
    import phases

    def make(real):
        class Unfused(real):
            found_inf = property(lambda self: None, lambda self, value: None)  # only fused ones may be told

            def __init__(self, parameters, fused, **options):
                super().__init__(parameters, **options)

        return Unfused

    for name in ("Adam", "AdamW", "SGD"):
        patch(phases, name, make)


@named
def unaugmented():
    """Training images are normalised only: what the report's scripts did without meaning to."""
    import augment

    patch(augment.ReportAugment, "augment", lambda _: augment.Normalize.augment)


@named
def read_in_each_step():
    """Loss and accuracy as Python numbers after each step."""
    from metrics import Classification

    def reading(add):
        def read_and_add(self, losses, classes, labels):
            losses.mean().item(), (classes[:, 0] == labels).sum().item()
            add(self, losses, classes, labels)

        return read_and_add

    patch(Classification, "add", reading)


@named
def one_thread():
    """What accelerate launch sets a CPU training to."""
    import launch

    patch(launch, "cores_per_process", lambda _: lambda: 1)


@named
def glibc_as_it_is():
    """The allocator gives memory back to the system and asks for it anew, in each step."""
    import launch

    patch(launch, "keep_memory", lambda _: lambda device: None)


@named
def no_grad_trunk():
    """ResNet's frozen beginning under an explicit no_grad."""
    import torch
    from timm.models.resnet import ResNet

    def forward_features(self, images):
        stages = (self.conv1, self.bn1, self.act1, self.maxpool, self.layer1, self.layer2, self.layer3, self.layer4)
        for stage in stages:
            frozen = not any(parameter.requires_grad for parameter in stage.parameters())
            with torch.set_grad_enabled(not frozen and torch.is_grad_enabled()):
                images = stage(images)
        return images

    patch(ResNet, "forward_features", lambda _: forward_features)


@named
def compiled():
    """torch.compile for the model of each phase."""
    import folding

    def compiling(fold):
        def fold_and_compile(model, *rest):
            count = fold(model, *rest)
            model.compile()
            return count

        return fold_and_compile

    patch(folding, "fold", compiling)


# ---- the command line -----------------------------------------------------------------------------------------------


def main() -> None:
    own, rest = sys.argv[1:], []
    if "--" in own:
        own, rest = own[: own.index("--")], own[own.index("--") + 1 :]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("patches", nargs="*", metavar="PATCH", help="what to change; --list tells")
    parser.add_argument("--list", action="store_true", help="print the patches and end")
    args = parser.parse_args(own)
    if args.list:
        for name, function in PATCHES.items():
            print(f"{name:34s} {' '.join((function.__doc__ or '').split())}")
        return
    if not args.patches:
        parser.error("name a patch; --list tells which there are")
    if unknown := [name for name in args.patches if name not in PATCHES]:
        parser.error(f"there is no patch {unknown[0]}; --list tells which there are")
    for group in EXCLUSIVE:
        if len(both := [name for name in args.patches if name in group]) > 1:
            parser.error(f"{both[0]} and {both[1]} don't go together")
    config, resume = parse(rest)
    suffix = "".join(f".{name}" for name in args.patches)
    if len(config.recipe + suffix) > PLAIN_NAME["max_length"]:
        parser.error("that many patches have no room in the recipe's name, which says them; name fewer")
    if resume and not config.recipe.endswith(suffix):
        raise UserError(f"--resume: {resume} was started as {config.recipe}, not with these patches", USAGE)
    if resume and "ema" in args.patches:
        raise UserError(f"--resume: averaged weights are in no checkpoint; delete {resume} and start again", USAGE)
    if config.augment.policy == "none" and (lost := [name for name in args.patches if name in AUGMENTING]):
        raise UserError(f"augment.policy none leaves nothing for {lost[0]} to change", USAGE)
    hub.check(config, resume)
    import launch
    import train

    # A run says under its recipe's name, in its config.yaml, what was patched; and how to go on with the same patches.
    script = " ".join(("benchmarks/patches.py", *args.patches, "--"))
    patch(launch, "way_on", lambda way_on: lambda *run: way_on(*run).replace("train.py", script, 1))
    for name in args.patches:
        PATCHES[name]()
    train.train(dataclasses.replace(config, recipe=config.recipe.removesuffix(suffix) + suffix), resume)


if __name__ == "__main__":
    with told():
        main()
