"""Networks and their weights: SimpleCNN, DeepCNN and a small-stem ResNet-50, besides all of timm's.

The project's own networks are registered with timm, so that every model comes from `timm.create_model`, and a run's
best/ folder loads wherever this module has been imported (a plain timm backbone needs timm alone).
"""

import dataclasses
import difflib
import json
import math
from pathlib import Path

import timm
import torch
from huggingface_hub import try_to_load_from_cache
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.layers import convert_sync_batchnorm
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.resnet import Bottleneck, ResNet
from torch import Tensor, nn

import hub
from config import ModelConfig
from errors import USAGE, UserError, first_line

SAME_WEIGHTS = {"resnet50_small_stem": "resnet50"}  # architectures with another one's weights, key for key
CIFAR100_MEAN = (0.5071, 0.4865, 0.4409)  # of the training split's pixels, by channel
CIFAR100_STD = (0.2673, 0.2564, 0.2762)


# ---- the report's own networks ----------------------------------------------------------------------------------


class ConvNet(nn.Module):
    """Convolutions, each followed by 2x2 max pooling, then fully connected layers; the last of them is the head.

    Args:
        filters: output channels of the 3x3 convolutions.
        hidden: widths of the fully connected layers before the head.
        batch_norm: whether each convolution is followed by batch norm.
        grid: the feature map is averaged to this many cells a side (at 32x32 it has them already).
        drop_rate: dropout before each fully connected layer but the first.
    """

    def __init__(self, filters, hidden, batch_norm, grid, drop_rate=0.0, num_classes=100, in_chans=3, **_):
        super().__init__()
        self.num_classes, self.num_features, self.head_hidden_size = num_classes, filters[-1], hidden[-1]
        layers, channels = [], in_chans
        for width in filters:
            norm = [nn.BatchNorm2d(width)] if batch_norm else []
            layers += [nn.Conv2d(channels, width, 3, padding=1, bias=not batch_norm), *norm, nn.ReLU(), nn.MaxPool2d(2)]
            channels = width
        self.features = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(grid))
        layers, channels = [], filters[-1] * grid**2
        for width in hidden:
            layers += [nn.Linear(channels, width), nn.ReLU(), nn.Dropout(drop_rate)]
            channels = width
        self.hidden = nn.Sequential(nn.Flatten(), *layers)
        self.fc = nn.Linear(channels, num_classes)

    def get_classifier(self) -> nn.Linear:
        return self.fc

    def reset_classifier(self, num_classes: int, global_pool=None) -> None:
        self.num_classes = num_classes
        self.fc = nn.Linear(self.fc.in_features, num_classes)

    def forward_features(self, images: Tensor) -> Tensor:
        return self.features(images)

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        features = self.hidden(features)
        return features if pre_logits else self.fc(features)

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W), normalised, to logits (B, num_classes)."""
        return self.forward_head(self.forward_features(images))


def _cfg(url: str = "", **kwargs) -> dict:
    """A timm `pretrained_cfg` for 32x32 images, normalised with CIFAR-100's figures."""
    cfg = {"url": url, "num_classes": 100, "input_size": (3, 32, 32), "pool_size": None, "classifier": "fc"}
    cfg |= {"mean": CIFAR100_MEAN, "std": CIFAR100_STD, "interpolation": "bilinear", "crop_pct": 1.0}
    return cfg | kwargs


default_cfgs = generate_default_cfgs(
    {
        "simple_cnn.none": _cfg(first_conv="features.0"),
        "deep_cnn.none": _cfg(first_conv="features.0"),
        "resnet50_small_stem.a1_in1k": _cfg(
            hf_hub_id="timm/resnet50.a1_in1k",
            num_classes=1000,
            first_conv="conv1",
            mean=(0.485, 0.456, 0.406),
            std=(0.229, 0.224, 0.225),
        ),
    }
)


@register_model
def simple_cnn(pretrained: bool = False, **kwargs) -> ConvNet:
    """Part 1 of the report: two convolutions (32, 64), fully connected 512, dropout 0.5."""
    arch = {"filters": (32, 64), "hidden": (512,), "batch_norm": False, "grid": 8, "drop_rate": 0.5}
    return build_model_with_cfg(ConvNet, "simple_cnn", pretrained, **(arch | kwargs))


@register_model
def deep_cnn(pretrained: bool = False, **kwargs) -> ConvNet:
    """Part 2 of the report: four convolutions (64-512) with batch norm, fully connected 1024 and 512, dropout 0.2."""
    arch = {"filters": (64, 128, 256, 512), "hidden": (1024, 512), "batch_norm": True, "grid": 2, "drop_rate": 0.2}
    return build_model_with_cfg(ConvNet, "deep_cnn", pretrained, **(arch | kwargs))


@register_model
def resnet50_small_stem(pretrained: bool = False, **kwargs) -> ResNet:
    """timm's ResNet-50 for 32x32 images: the first convolution runs at stride 1, and there is no max pooling.

    The weights are the plain ResNet-50's, key for key; only the feature maps are four times as wide and high.
    """
    arch = {"block": Bottleneck, "layers": (3, 4, 6, 3)}
    model = build_model_with_cfg(ResNet, "resnet50_small_stem", pretrained, **(arch | kwargs))
    model.conv1.stride = (1, 1)
    model.maxpool = nn.Identity()
    return model


# ---- making a model ---------------------------------------------------------------------------------------------


def check(config: ModelConfig) -> None:
    """Check before any data are read that the model and its weights exist, as far as can be seen by then.

    Raises:
        UserError: there is no such model or file, or we are offline and its pretrained weights are not cached.
    """
    repository = _architecture_cfg(config.name).get("hf_hub_id")
    if config.weights:
        _weights_file(Path(config.weights), config.name)
    if config.pretrained and not config.weights and hub.offline() and repository:
        names = ("model.safetensors", "pytorch_model.bin")
        if not any(isinstance(try_to_load_from_cache(repository, name), str) for name in names):
            raise hub.unreachable(f"timm's pretrained {config.name}")


def without_weights(config: ModelConfig) -> ModelConfig:
    """The same model for a resumed run: its checkpoint has all weights, and those it started from may be gone."""
    return dataclasses.replace(config, pretrained=False, weights=None)


def create(config: ModelConfig, class_names: list[str], size: tuple[int, int]) -> tuple[nn.Module, str]:
    """The configured model with a head for these classes, and a phrase that says what it starts from.

    The precedence is weights, pretrained, scratch (a resumed run overwrites all of them with its checkpoint). The
    normalisation that goes with the weights is in the model's `pretrained_cfg` (`mean`, `std`), and from there in the
    run's best/ folder: training, evaluation and prediction all take it from this one place.

    Args:
        size: height and width in pixels of the images that the model will see.

    Raises:
        UserError: no such model, no such weights, or weights that do not fit it.
    """
    arguments = {"num_classes": len(class_names)}
    if _architecture_cfg(config.name).get("fixed_input_size"):
        arguments["img_size"] = size[0] if size[0] == size[1] else size  # a ViT's position embedding depends on it
    pretrained = config.pretrained and not config.weights
    try:
        model = timm.create_model(config.name, pretrained=pretrained, **arguments)
    except Exception as error:  # whatever hub, safetensors and torch raise
        if pretrained and hub.offline():
            raise hub.unreachable(f"timm's pretrained {config.name}") from error
        raise UserError(
            f"model.name: {config.name} can't be made for {size[1]}x{size[0]} images: {first_line(error)}"
        ) from error

    _try_size(model, config.name, size, len(class_names))
    cfg = dict(model.pretrained_cfg)
    if config.weights:
        saved_cfg, origin = _load_weights(model, Path(config.weights), config.name)
        cfg |= saved_cfg
    elif pretrained:
        name = timm.models.split_model_name_tag(config.name)[0]
        origin = f"timm's pretrained {name}.{cfg.get('tag', '')} from {cfg.get('hf_hub_id') or cfg.get('url')}"
    else:
        cfg |= {"mean": CIFAR100_MEAN, "std": CIFAR100_STD}
        origin = "scratch"
    cfg |= {"input_size": (3, *size), "num_classes": len(class_names), "label_names": list(class_names)}
    cfg |= {"crop_pct": 1.0, "test_input_size": None, "test_crop_pct": None, "pool_size": None}
    model.pretrained_cfg = model.default_cfg = cfg
    return model, origin


@torch.no_grad()
def _try_size(model: nn.Module, name: str, size: tuple[int, int], classes: int) -> None:
    """Raise UserError if it can't take images of that size or gives no logits (in eval mode, which changes nothing)."""
    model.eval()
    try:
        logits = model(torch.zeros(2, 3, *size))
    except Exception as error:  # whatever a layer raises if its input has become too small
        raise UserError(
            f"model.name: {name} can't take {size[1]}x{size[0]} images ({first_line(error)}); "
            "set a size to resize them to, for example --data.image_size 224",
            USAGE,
        ) from error
    if getattr(logits, "shape", None) != (2, classes):
        raise UserError(f"model.name: {name} is no classifier: it has no output for each of {classes} classes", USAGE)
    model.train()


def _architecture_cfg(name: str) -> dict:
    """timm's pretrained_cfg of a model name; UserError with the nearest names if there is no such model."""
    known = timm.list_models() + timm.list_pretrained()
    if name.startswith(("hf-hub:", "hf_hub:", "local-dir:")) or name not in known:
        close = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
        raise UserError(f"model.name: timm has no model '{name}'; nearest: {', '.join(close) or 'none'}", USAGE)
    cfg = timm.get_pretrained_cfg(name)
    return cfg.to_dict() if cfg else {}


def _load_weights(model: nn.Module, path: Path, name: str) -> tuple[dict, str]:
    """Load a .safetensors file or a run's best/ folder into the model; a head of another size stays newly initialised.

    Returns:
        The normalisation that the weights were trained with, if recorded, and a phrase for where they came from.
    """
    file, cfg = _weights_file(path, name)
    try:
        state = load_file(file)
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"model.weights: {file} is not a safetensors file ({first_line(error)}); others are not read, since "
            "a pickle can run code"
        ) from error
    broken = [key for key, tensor in state.items() if tensor.is_floating_point() and not tensor.isfinite().all()]
    if broken:
        rest = f" and {len(broken) - 4} more" if len(broken) > 4 else ""
        raise UserError(f"model.weights: {file} has NaN or infinity in {', '.join(broken[:4])}{rest}")

    own = model.state_dict()
    different = [key for key in dict.fromkeys([*own, *state]) if _shape(state, key) != _shape(own, key)]
    heads = head_names(model)
    other_head = [key for key in different if key in own and key in state and any(_is_under(key, it) for it in heads)]
    wrong = [
        f"{key} ({_shape(state, key)} in the file, {_shape(own, key)} in the model)"
        for key in different
        if key not in other_head
    ]
    if wrong:
        rest = f" and {len(wrong) - 4} more" if len(wrong) > 4 else ""
        raise UserError(f"model.weights: {file} does not fit {name}: {', '.join(wrong[:4])}{rest}")
    said = f"; its head has {len(state[other_head[0]])} classes and is replaced by a new one" if other_head else ""
    model.load_state_dict(state | {key: own[key] for key in other_head})
    return cfg, f"weights {path}{said}"


def _weights_file(path: Path, name: str) -> tuple[Path, dict]:
    """The .safetensors file that `model.weights` means, and the normalisation that a best/ folder records."""
    try:
        path = path.expanduser()
        is_folder, exists = path.is_dir(), path.exists()
    except (OSError, RuntimeError) as error:  # a name that is too long, an unknown ~user
        raise UserError(f"model.weights: {path} can't be read: {error}", USAGE) from None
    if not exists:
        raise UserError(f"model.weights: there is no file or folder {path}", USAGE)
    if not is_folder:
        return path, {}
    file, described = path / "model.safetensors", path / "config.json"
    if not file.is_file() or not described.is_file():
        raise UserError(f"model.weights: {path} holds no model.safetensors and config.json; give a run's best/ folder")
    try:
        saved = json.loads(described.read_text(encoding="utf-8"))
        cfg = {key: tuple(map(float, saved["pretrained_cfg"][key])) for key in ("mean", "std")}
        if any(len(values) != 3 or not all(map(math.isfinite, values)) for values in cfg.values()) or 0 in cfg["std"]:
            raise ValueError("mean and std are three numbers each, and std is not 0")
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise UserError(f"model.weights: {described} is not timm's ({type(error).__name__}: {error})") from error
    architecture, wanted = str(saved.get("architecture")), timm.models.split_model_name_tag(name)[0]
    if architecture not in (wanted, SAME_WEIGHTS.get(wanted)):
        raise UserError(f"model.weights: {path} is a {architecture}, but model.name is {name}", USAGE)
    return file, cfg


def _shape(state: dict, key: str) -> str:
    return "x".join(map(str, state[key].shape)) or "scalar" if key in state else "missing"


# ---- what trains in a phase -------------------------------------------------------------------------------------


def synchronised(model: nn.Module) -> nn.Module:
    """The model with batch norms that take their statistics from all processes; keys and values stay the same."""
    return convert_sync_batchnorm(model)


def head_names(model: nn.Module) -> list[str]:
    """Names of timm's classifier: one, or two for distilled models and others with a second head, as VOLO.

    A network of your own need not have `get_classifier`; then 'head' is a name like any other.
    """
    if not hasattr(model, "get_classifier"):
        return ["head"]
    classifiers, modules = model.get_classifier(), dict(model.named_modules())
    classifiers = classifiers if isinstance(classifiers, tuple) else (classifiers,)
    names = [name for name, module in modules.items() if any(module is one for one in classifiers)]
    said = model.pretrained_cfg.get("classifier") or ()  # what timm drops from weights for other classes
    said = (said,) if isinstance(said, str) else said
    return names + [name for name in said if name in modules and not any(_is_under(name, head) for head in names)]


def freeze_all_but(model: nn.Module, modules: tuple[str, ...]) -> list[str]:
    """Let only these modules train, and return the names of the parameters that do.

    Args:
        modules: module or parameter names; 'head' is the classifier whatever its name, 'all' is everything.

    Raises:
        UserError: the model has no parameters under one of the names.
    """
    prefixes = []
    for module in modules:
        prefixes += head_names(model) if module == "head" else [module]
    names = [name for name, _ in model.named_parameters()]
    for prefix in prefixes:
        if prefix != "all" and not any(_is_under(name, prefix) for name in names):
            known = dict.fromkeys([name.split(".")[0] for name in names] + ["head", "all"])
            above, depth = prefix.rpartition(".")[0], prefix.count(".") + 1
            inside = dict.fromkeys(".".join(name.split(".")[:depth]) for name in names if _is_under(name, above))
            raise UserError(
                f"modules: this model has no '{prefix}' to train; it has {', '.join(known)}"
                f"{f'; inside {above}: ' * bool(inside)}{', '.join(inside)}",
                USAGE,
            )
    training = [name for name in names if any(prefix == "all" or _is_under(name, prefix) for prefix in prefixes)]
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in training)
    return training


def _is_under(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(f"{prefix}.")
