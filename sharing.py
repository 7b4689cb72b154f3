"""Share a run's best weights: the model card beside them in best/, and the upload of both to the hub.

The card is written when a run ends, and removed when one is resumed, since best/ may then change. It is uploaded as it
is, so it can be edited first. Names of classes, columns and folders come from outside: the card escapes them. The hub's
token is read when it is needed and written nowhere.
"""

import contextlib
import json
import re
import shlex
import sys
import warnings
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import (
    CommitOperationAdd,
    EvalResult,
    HfApi,
    ModelCardData,
    get_token,
    is_offline_mode,
    set_client_factory,
)
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import disable_progress_bars, httpx, logging

import hub
import models
from checkpoint import BEST
from config import Config, hub_id
from errors import USAGE, UserError, first_line
from files import write_whole
from recipe import PATCHED, read_yaml
from recipe import check as check_config
from text import plain

HERE = "local-dir:best"  # what the card's example loads, from within the run's folder
SILENCE = 60  # seconds that the hub may take to answer, as it checks an upload first
LOG_IN = "log in with hf auth login, or set HF_TOKEN to a token that may write"
SHOWN = 1000  # classes, at most, in the card
AUGMENTATION = {
    "report": "padded crop, flip, colour jitter of 0.2, rotation by up to 15 degrees",
    "augmix": "padded crop, flip, AugMix without its consistency loss",
    "none": "",
}
MIX = {"mixup": "mixup with alpha 0.2", "cutmix": "CutMix with alpha 1 on half of the images", "none": ""}
# All but harmless characters, such as underscores in words and points in numbers.
MARKUP = re.compile(r"(?!(?<=\d)\.\d)[^\w ,()/+%-]|(?<![^\W_])_|_(?![^\W_])")


# ---- the upload -------------------------------------------------------------------------------------------------


def check(repository: str) -> None:
    """Find out before hours of training what would prevent an upload, as far as possible.

    Raises:
        UserError: the id is invalid, the libraries work offline, or there is no token that the hub knows and that may
            write. Whether it may write to this repository, only the upload shows.
    """
    try:
        hub_id(repository)
    except ValueError as error:
        raise UserError(f"--push_to_hub: {error}, not {repository!r}", USAGE) from None
    if is_offline_mode():
        raise UserError(
            "--push_to_hub: the hub's libraries work offline (HF_HUB_OFFLINE is set, or the hub did not answer): go "
            "online, or leave it out and upload later with python predict.py RUN --push_to_hub",
            USAGE,
        )
    token = _token()
    try:
        account = HfApi(token=token).whoami()
    except Exception as error:  # the network raises many types
        why = _reason(error, token)
        raise UserError(
            f"--push_to_hub: the hub ({hub.endpoint()}) accepts no upload ({why}); {LOG_IN}", USAGE
        ) from error
    access = (account.get("auth") or {}).get("accessToken") or {}
    if access.get("role") == "read":
        raise UserError(f"--push_to_hub: the token of {account.get('name')} is read-only; {LOG_IN}", USAGE)


def push(run: Path, repository: str) -> str:
    """Upload a run's best weights, configuration and card in one commit; return the repository's URL.

    A missing repository is created, as public as the account's settings say. The card of an unfinished run is made only
    for the upload.

    Raises:
        UserError: the hub refused, or did not answer. The run's folder is unchanged.
    """
    token = None
    try:
        token = _token()
        ended = card_of(run).is_file()
        card = card_of(run).read_text(encoding="utf-8") if ended else read_card(run)
        card = card.replace(HERE, f"hf-hub:{repository}")
        operations = [CommitOperationAdd(name, run / "best" / name) for name in BEST]
        operations.append(CommitOperationAdd(card_of(run).name, card.encode()))
        with _patiently_and_quietly():
            api = HfApi(token=token)
            api.create_repo(repository, exist_ok=True)
            api.create_commit(repository, operations, commit_message="Weights, configuration and model card")
    except Exception as error:  # the network, the disk and the libraries between them raise anything
        raise UserError(
            f"{repository} was not uploaded to {hub.endpoint()} ({_reason(error, token)}). What is in {run} is whole; "
            f"to upload it later: python predict.py {shlex.quote(run.as_posix())} --push_to_hub {repository}"
        ) from error
    return f"{hub.endpoint()}/{repository}"


def _token() -> str:
    try:
        token = get_token()
    except Exception as error:  # an unreadable file, a service that gives none
        raise UserError(
            f"--push_to_hub: the hub's token can't be read ({first_line(error)}); {LOG_IN}", USAGE
        ) from None
    if not token:
        raise UserError(f"--push_to_hub: there is no token for the hub ({hub.endpoint()}); {LOG_IN}", USAGE)
    if not re.fullmatch(r"[!-~]+", token):  # the HTTP client would refuse it, and show it
        raise UserError(f"--push_to_hub: the hub's token holds characters that no token has; {LOG_IN}", USAGE)
    return token


@contextlib.contextmanager
def _patiently_and_quietly():
    """Around an upload: a timeout of its own, and no warnings about retried requests.

    Those show URLs, and the ones that weights are uploaded to are signed: as good as a password.
    """
    loudness = logging.get_verbosity()
    logging.set_verbosity_error()
    set_client_factory(lambda: httpx.Client(follow_redirects=True, timeout=SILENCE))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with contextlib.nullcontext() if sys.stderr.isatty() else disable_progress_bars():
                yield
    finally:
        logging.set_verbosity(loudness)
        hub.persist()


def _reason(error: Exception, token: str | None) -> str:
    """What went wrong, without URLs and without the token."""
    while not isinstance(error, HfHubHTTPError) and error.__cause__:
        error = error.__cause__
    said = first_line(error)
    if isinstance(error, HfHubHTTPError):
        status = f"{error.response.status_code} {error.response.reason_phrase}"
        said = f"{status}: {error.server_message.splitlines()[0]}" if error.server_message else status
    return said.replace(token, "***") if token else said


# ---- the card ---------------------------------------------------------------------------------------------------


def card_of(run: Path) -> Path:
    """Where a run's model card is."""
    return run / "best" / "README.md"


def write_card(run: Path) -> None:
    """Write the model card of a finished run; UserError if a file of its folder is missing or damaged."""
    text = read_card(run)
    try:
        write_whole(card_of(run), text)
    except OSError as error:
        raise UserError(f"{card_of(run)} can't be written ({error.strerror or error})") from error


def read_card(run: Path) -> str:
    """The model card of a run, made from its folder.

    Raises:
        UserError: a file of the folder is missing or damaged.
    """
    config = check_config(read_yaml(run / "config.yaml"), str(run / "config.yaml"))
    best, history = _read(run / "best" / "config.json"), _read(run / "history.jsonl")
    summary = _read(run / "summary.json") if (run / "summary.json").exists() else {}
    try:
        return card(config, best, history, summary)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        problem = f"{type(error).__name__}: {first_line(error)}"
        raise UserError(f"the model card of {run} can't be written ({problem}): is a file damaged?") from error


def _read(path: Path):
    """A .json file's value, or a list of a .jsonl file's values."""
    try:
        text = path.read_text(encoding="utf-8")
        return [json.loads(line) for line in text.splitlines()] if path.suffix == ".jsonl" else json.loads(text)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} can't be read ({first_line(error)}): the model card needs it") from error


def card(config: Config, best: dict, history: list[dict], summary: dict) -> str:
    """The model card as Markdown with YAML metadata.

    Args:
        best: best/config.json.
        history: a row for each epoch.
        summary: empty if the run has not ended; then the card has no figures.
    """
    cfg, classes = best["pretrained_cfg"], best["label_names"]
    kind, source = _source(config)
    subset = f", subset {config.data.subset}" if config.data.subset else ""
    origin, base_model = _origin(config, cfg)
    figures = _figures(config, summary)
    measured = [
        (figure.rows, figure.name, f"{figure.value:.4f}" if figure.name == "loss" else f"{figure.value:.2%}")
        for figure in figures
    ]
    height, width = cfg["input_size"][1:]
    facts = {
        "Architecture": f"{config.model.name}, {summary['parameters']:,} parameters" if summary else config.model.name,
        "Weights start from": origin,
        "Data": f"{source}{subset}, split {config.data.train_split}",
        "Classes": len(classes),
        "Images": f"{width}x{height} pixels, RGB" + (", brought to that, bilinear" if config.data.image_size else ""),
        "Mean and std": f"{_numbers(cfg['mean'])} and {_numbers(cfg['std'])}, of values from 0 to 1, by channel",
    }
    parts = [
        f"---\n{_head(config, kind, source, base_model, figures)}\n---",
        f"# {_text(config.model.name)}, {len(classes)} classes of {_text(source)}",
        _table(("", ""), facts.items()),
        "## Figures",
    ]
    if summary:
        if figures:
            parts.append(_table(("rows", "figure", "value"), measured))
        why = "the best on the rows held out of training" if config.data.folds else "the last; no rows were held out"
        parts.append(f"The weights are those of epoch {_text(summary['best_epoch'])}, {why}.")
    else:
        parts.append("The run has not ended: there are no figures yet.")
    shown = classes[:SHOWN]
    parts += [
        "## How to load it",
        _example(best["architecture"]),
        "## Recipe",
        "The phases, one after the other. What a phase does not train is frozen, batch-norm statistics included.",
        _phases(config, history),
        _table(("", ""), _recipe(config).items()),
        "## Classes",
        f"<details>\n<summary>{len(classes)} names</summary>",
        _table(("index", "name"), enumerate(shown)),
        "" if len(shown) == len(classes) else "The others are in config.json.",
        "</details>",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


class Figure(NamedTuple):
    split: str  # of the data
    rows: str  # the same in words
    name: str
    value: float  # a fraction; the loss in nats


def _figures(config: Config, summary: dict) -> list[Figure]:
    data = config.data
    held_out = f"held out of {data.train_split} (fold {data.fold} of {data.folds})"
    figures = [
        Figure(data.train_split, held_out, "top-1", summary.get("best_val_top1")),
        Figure(data.test_split, data.test_split, "top-1", summary.get("test_top1")),
        Figure(data.test_split, data.test_split, "top-5", summary.get("test_top5")),
        Figure(data.test_split, data.test_split, "loss", summary.get("test_loss")),
    ]
    return [figure for figure in figures if figure.value is not None]


def _head(config: Config, kind: str, source: str, base_model: str | None, figures: list[Figure]) -> str:
    """The card's metadata, as YAML."""
    results = [
        EvalResult(
            task_type="image-classification",
            dataset_type=source if kind == "hub" else kind,
            dataset_name=_line(source),
            dataset_revision=config.data.revision if kind == "hub" else None,
            dataset_config=config.data.subset and _line(config.data.subset),
            dataset_split=_line(figure.split),
            metric_type="loss" if figure.name == "loss" else "accuracy",
            metric_name=_line(f"{figure.name}, {figure.rows}"),
            metric_value=figure.value,
        )
        for figure in figures
    ]
    return ModelCardData(
        library_name="timm",
        pipeline_tag="image-classification",
        tags=["image-classification", "timm"],
        base_model=base_model,
        datasets=[source] if kind == "hub" else None,
        metrics=["accuracy"] if figures else None,
        model_name=config.model.name,
        eval_results=results or None,
    ).to_yaml()


def _phases(config: Config, history: list[dict]) -> str:
    trained = Counter(row["phase"] for row in history)
    rows = [
        (name, ", ".join(phase.modules), f"{trained[name]} of {phase.epochs}", phase.optimizer, f"{phase.lr:g}",
         phase.schedule, f"{phase.weight_decay:g}", phase.early_stopping or "off")
        for name, phase in config.phases.items()
    ]  # fmt: skip
    return _table(("phase", "trains", "epochs", "optimizer", "lr", "schedule", "weight decay", "early stopping"), rows)


def _recipe(config: Config) -> dict:
    recipe, patches = {}, config.recipe.partition(PATCHED)[2]
    if patches:
        recipe["Patches (benchmarks/patches.py), which the rest does not tell of"] = patches.replace(".", ", ")
    recipe |= {
        "Augmentation": _augmentation(config),
        "Images a step": config.data.batch_size,
        "Gradients clipped at": config.clip_norm or "off",
        "Seed": config.seed,
    }
    if found := config.environment:
        recipe["Precision"] = "float32" if found.mixed_precision == "no" else f"mixed, {found.mixed_precision}"
        recipe["Device"] = f"{found.processes} x {found.device_type} ({found.device})"
        recipe["Versions"] = ", ".join(f"{name} {version}" for name, version in found.versions.items())
    return recipe


def _augmentation(config: Config) -> str:
    distortion = "speckle noise or Gaussian blur on half of the images" if config.augment.distort else ""
    done = (AUGMENTATION[config.augment.policy], distortion, MIX[config.augment.mix])
    return ", ".join(filter(None, done)) or "none"


def _source(config: Config) -> tuple[str, str]:
    """The data source's kind and name; of a path, the name is only the last component."""
    source = config.data.source
    try:
        kind = config.data.kind
    except UserError:  # it has gone since the run began
        kind = "local"
    if kind == "hub":
        return kind, source
    if kind == "embedded":
        return kind, "images drawn by code"
    return {"folder": "imagefolder"}.get(kind, kind), Path(source).name or "local data"


def _origin(config: Config, cfg: dict) -> tuple[str, str | None]:
    """What the weights started from, in words, and its hub repository if it has one."""
    if config.model.weights:
        return f"local weights, {Path(config.model.weights).name}", None
    if config.model.pretrained:
        repository = cfg.get("hf_hub_id") or None
        return f"timm's pretrained weights, {repository or cfg.get('tag') or config.model.name}", repository
    return "scratch (random initialisation)", None


def _example(architecture: str) -> str:
    lines = ["import timm", "import torch", "from PIL import Image, ImageOps", "from torchvision.transforms import v2"]
    if architecture in models.default_cfgs:
        lines.append(f"import models  # models.py of Phases, which registers {architecture} with timm")
    lines += [
        "",
        f'model = timm.create_model("{HERE}", pretrained=True).eval()',
        "cfg = model.pretrained_cfg",
        'height, width = cfg["input_size"][1:]',
        "prepare = v2.Compose([",
        "    v2.ToImage(),",
        "    v2.ToDtype(torch.float32, scale=True),",
        '    v2.Normalize(cfg["mean"], cfg["std"]),',
        "])",
        'image = ImageOps.exif_transpose(image).convert("RGB")  # image: of PIL',
        "image = ImageOps.fit(image, (width, height), Image.Resampling.BILINEAR)",
        "with torch.inference_mode():",
        "    logits = model(prepare(image).unsqueeze(0))",
        'print(cfg["label_names"][logits.argmax()])',
    ]
    before = "It takes the project that trained it: run this in its folder.\n\n" * (architecture in models.default_cfgs)
    code = "\n".join(lines)
    return f"{before}```python\n{code}\n```"


def _numbers(values) -> str:
    return ", ".join(f"{value:g}" for value in values)


def _table(head: tuple[str, ...], rows) -> str:
    """A Markdown table whose cells are escaped."""
    lines = [head, ["---"] * len(head), *([_text(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _line(value) -> str:
    """Foreign text on one line, single-spaced."""
    return " ".join(plain(str(value)).split())


def _text(value) -> str:
    """Foreign text as inert Markdown: every character that may be markup becomes a character reference."""
    return MARKUP.sub(lambda sign: f"&#{ord(sign[0])};", _line(value))
