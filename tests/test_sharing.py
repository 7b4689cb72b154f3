"""The model card, and its upload with the weights to a hub on loopback."""

import dataclasses
import io
import json
import os
import re
import runpy
from pathlib import Path

import pytest
import timm
import torch
from accelerate import Accelerator
from conftest import ROOT, TWO_PHASES, phase
from hub_server import HubServer
from huggingface_hub import ModelCard, constants
from huggingface_hub.utils import HFValidationError, validate_repo_id
from PIL import Image
from safetensors.torch import load_file
from test_hub import closed_port
from test_launch import TORCHRUN, TWO_PROCESSES

import augment
import checkpoint
import decoding
import launch
import models
import predict
import runs
import sharing
import train
from commandline import parse
from config import hub_id
from errors import UserError
from recipe import check, read_yaml

TOKEN = "hf_markermarkermarker"
HOSTILE = ["<script>alert(1)</script>", "a|b", "---", "\"quoted\" 'twice'", "two\nlines", "\u202egnp.exe", "قطة", "",
           "# head", "[x](http://x.example)", "`code`", "&amp;", "*bold*", "_it_", "\\|",
           "\ud800", "blue_whale"]  # fmt: skip


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A hub to write to, which this process and its children take for theirs."""
    (tmp_path / "hub").mkdir()
    with HubServer({}, store=tmp_path / "hub", token=TOKEN) as hub:
        take_for_the_hub(monkeypatch, hub.url)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub


def take_for_the_hub(monkeypatch, url):
    monkeypatch.setenv("HF_ENDPOINT", url)
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")  # which the server does not speak
    monkeypatch.setattr(constants, "ENDPOINT", url)  # read when the library was imported
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)


@pytest.fixture
def ended(make_config, tmp_path):
    """Make the folder of a run as it is after its end, without training: `ended(classes, **sections)`."""

    def make(classes=("cat", "dog"), summary=None, **sections):
        config = make_config(**sections)
        run = tmp_path / "runs" / "run"
        (run / "checkpoints").mkdir(parents=True)
        config = dataclasses.replace(config, environment=launch.environment(Accelerator(cpu=True)))
        (run / "config.yaml").write_text(config.to_yaml())
        start = dataclasses.replace(config.model, pretrained=False, weights=None)
        model, _ = models.create(start, list(classes), (32, 32))
        checkpoint.save_best(model, run)
        rows = [{"phase": "head", "epoch": 1}, {"phase": "finetune", "epoch": 2}]
        (run / "history.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        figures = {"model": config.model.name, "best_epoch": 2, "best_val_top1": 0.5125, "test_loss": 1.25,
                   "test_top1": 0.4875, "test_top5": 0.9, "epochs": 2, "minutes": 1.0, "parameters": 12345}  # fmt: skip
        (run / "summary.json").write_text(json.dumps(figures | (summary or {})))
        return run

    return make


def card_text(run) -> str:
    sharing.write_card(run)
    return (run / "best" / "README.md").read_text(encoding="utf-8")


def rows_of(text: str) -> dict[str, list[str]]:
    """The rows of all tables by their first cell, split as Markdown splits them."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    return {row[0]: row[1:] for row in cells}


# ---- the card ---------------------------------------------------------------------------------------------------


def test_the_card_says_what_the_run_says(ended):
    run = ended(phases=TWO_PHASES)
    text = card_text(run)
    head = ModelCard(text).data
    assert (head.library_name, head.pipeline_tag) == ("timm", "image-classification")
    assert "datasets" not in head.to_dict() and "base_model" not in head.to_dict()
    figures = {result.metric_name: result.metric_value for result in head.eval_results}
    assert figures == {"top-1, held out of train (fold 0 of 5)": 0.5125, "top-1, test": 0.4875, "top-5, test": 0.9,
                       "loss, test": 1.25}  # fmt: skip
    assert {result.dataset_type for result in head.eval_results} == {"parquet"}
    rows = rows_of(text)
    assert rows["head"] == ["head", "1 of 1", "adam", "0.001", "constant", "0", "off"]
    assert rows["finetune"][:2] == ["layer4, head", "1 of 1"]
    assert rows["Weights start from"] == ["scratch (random initialisation)"]
    assert rows["Images"] == ["32x32 pixels, RGB"]
    assert rows["Mean and std"][0].startswith("0.5071, 0.4865, 0.4409 and 0.2673, 0.2564, 0.2762")
    assert rows["Precision"] == ["float32"]
    assert f"torch {torch.__version__.partition('+')[0]}" in rows["Versions"][0]
    assert "epoch 2" in text and "51.25%" in text and "12,345 parameters" in text
    assert (rows["0"], rows["1"]) == (["cat"], ["dog"])


@pytest.mark.parametrize(
    ("augmentation", "said"),
    [
        ({}, "padded crop, flip, colour jitter of 0.2, rotation by up to 15 degrees"),
        ({"policy": "none"}, "none"),
        ({"policy": "none", "mix": "mixup"}, "mixup with alpha 0.2"),
        ({"policy": "augmix", "mix": "cutmix", "distort": True},
         "padded crop, flip, AugMix without its consistency loss, speckle noise or Gaussian blur on half of the "
         "images, CutMix with alpha 1 on half of the images"),
    ],
)  # fmt: skip
def test_the_card_says_how_training_images_were_augmented(ended, augmentation, said):
    assert rows_of(card_text(ended(augment=augmentation)))["Augmentation"] == [said]


def test_a_subset_is_named(ended):
    text = card_text(ended(data={"source": "uoft-cs/cifar100", "subset": "part"}))
    assert rows_of(text)["Data"] == ["uoft-cs/cifar100, subset part, split train"]
    assert {result.dataset_config for result in ModelCard(text).data.eval_results} == {"part"}


def test_the_commit_of_a_dataset_is_named(ended):
    text = card_text(ended(data={"source": "uoft-cs/cifar100", "revision": "0123456"}))
    assert {result.dataset_revision for result in ModelCard(text).data.eval_results} == {"0123456"}


def test_a_patched_run_says_so(ended):
    rows = rows_of(card_text(ended(recipe="resnet50..ema.unaugmented")))
    assert rows["Patches (benchmarks/patches&#46;py), which the rest does not tell of"] == ["ema, unaugmented"]


def test_figures_that_are_not_there_are_left_out(ended):
    nothing = dict.fromkeys(("test_loss", "test_top1", "test_top5"))
    text = card_text(ended(summary=nothing, data={"test_split": None}))
    assert [result.metric_value for result in ModelCard(text).data.eval_results] == [0.5125]
    assert not re.search(r"\bNone\b|\bnull\b", text)


def test_a_run_that_has_not_ended_has_a_card_without_figures(ended):
    run = ended()
    (run / "summary.json").unlink()
    text = card_text(run)
    assert "The run has not ended" in text
    assert "model-index" not in text and "0.5125" not in text and "51.25" not in text


@pytest.mark.parametrize(
    ("model", "said", "base"),
    [
        ({"pretrained": True}, "timm&#39;s pretrained weights, timm/test_resnet&#46;r160_in1k",
         "timm/test_resnet.r160_in1k"),
        ({"weights": "/home/somebody/secret/own.safetensors"}, "local weights, own&#46;safetensors", None),
        ({"weights": "/home/somebody/x.safetensors", "pretrained": True}, "local weights, x&#46;safetensors", None),
        ({}, "scratch (random initialisation)", None),
    ],
)  # fmt: skip
def test_the_card_says_what_the_weights_started_from(ended, model, said, base):
    text = card_text(ended(model=model))
    assert rows_of(text)["Weights start from"] == [said]
    assert ModelCard(text).data.base_model == base
    assert "somebody" not in text


@pytest.mark.parametrize(
    ("source", "name", "kind"),
    [
        ("uoft-cs/cifar100", "uoft-cs/cifar100", "uoft-cs/cifar100"),
        ("/nowhere/of/somebody/photos", "photos", "local"),
        ("embedded", "images drawn by code", "embedded"),
    ],
)
def test_the_source_is_a_data_set_of_the_hub_or_a_bare_name(ended, source, name, kind):
    text = card_text(ended(data={"source": source}))
    head = ModelCard(text).data
    assert head.datasets == ([source] if source == kind != "embedded" else None)
    assert {(result.dataset_name, result.dataset_type) for result in head.eval_results} == {(name, kind)}
    assert f"classes of {name}\n" in text
    assert "somebody" not in text


def test_no_path_of_this_machine_is_in_a_card(ended, tmp_path, parquet):
    text = card_text(ended())
    for path in (tmp_path, parquet.parent, ROOT):
        assert str(path) not in text
    assert parquet.name in text


def test_hostile_names_are_text_and_nothing_else(ended, tmp_path):
    folder = tmp_path / 'a: "b" <i>|[x](y)'
    folder.mkdir()
    run = ended(HOSTILE, data={"source": str(folder), "train_split": "a: |\u202e---<b>", "test_split": "# {x}"})
    text = card_text(run)
    head, body = re.fullmatch(r"---\n(.*?)\n---\n(.*)", text, re.DOTALL).groups()
    tags = {"<details>", "</details>", "<summary>", "</summary>"}
    assert set(re.findall(r"<[^>\n]*>?", body)) == tags, "and no other than the card's own"
    assert not re.search("[\u202a-\u202e\u2066-\u2069\ud800-\udfff]", text)
    assert "script" not in head
    assert {result.dataset_name for result in ModelCard(text).data.eval_results} == {folder.name}
    assert {result.dataset_split for result in ModelCard(text).data.eval_results} == {"a: |---<b>", "# {x}"}
    assert [line for line in body.splitlines() if line.startswith("#")] == [
        f"# test_resnet, {len(HOSTILE)} classes of a&#58; &#34;b&#34; &#60;i&#62;&#124;&#91;x&#93;(y)",
        "## Figures", "## How to load it", "## Recipe", "## Classes"]  # fmt: skip
    names = body.partition("## Classes")[2]
    rows = [line for line in names.splitlines() if line.startswith("|")][2:]
    assert len(rows) == len(HOSTILE) and all(line.count("|") == 3 for line in rows)
    unsafe = set("<>|[]`*\\#\"'!~$@{}")
    for index, line in enumerate(rows):
        cell = line.split("|")[2]
        assert line.startswith(f"| {index} |")
        assert not unsafe & set(re.sub(r"&#\d+;", "", cell)), cell
    assert "blue_whale" in names and "قطة" in names and "two lines" in names and "&#95;it&#95;" in names


def test_many_classes_are_not_all_named(ended):
    text = card_text(ended([f"class{i}" for i in range(1001)]))
    assert "| 999 | class999 |" in text and "class1000" not in text
    assert "The others are in config.json" in text


@pytest.mark.parametrize("name", ["test_resnet", "simple_cnn"])
def test_the_cards_example_gives_the_logits_of_evaluation(ended, name, tmp_path, monkeypatch, capsys):
    run = ended([f"class{i}" for i in range(5)], model={"name": name}, data={"image_size": 32})
    code = re.search(r"```python\n(.*?)```", card_text(run), re.DOTALL)[1]
    assert ("import models" in code) == (name == "simple_cnn")
    torch.manual_seed(0)
    picture = Image.fromarray(torch.randint(0, 256, (40, 50, 3), dtype=torch.uint8).numpy())
    picture.getexif()[0x0112] = 6  # a phone held upright: to be turned by a quarter
    (tmp_path / "example.py").write_text(code)
    monkeypatch.chdir(run)  # from where local-dir:best is
    got = runpy.run_path(str(tmp_path / "example.py"), {"image": picture})
    model = timm.create_model(f"local-dir:{run / 'best'}", pretrained=True).eval()
    _, transform = augment.build(check(read_yaml(run / "config.yaml"), "x"), model.pretrained_cfg, torch.device("cpu"))
    encoded = io.BytesIO()
    picture.save(encoded, "PNG", exif=picture.getexif())
    rows = [{"image": {"bytes": encoded.getvalue(), "path": None}, "label": 0}]
    with torch.no_grad():
        logits = model(transform(decoding.Collate("image", "label", 5, (50, 40), 32)(rows)["image"]))
    torch.testing.assert_close(got["logits"], logits)
    assert capsys.readouterr().out.strip() == f"class{int(logits.argmax())}"


@pytest.mark.parametrize("name", ["config.json", "history.jsonl", "summary.json"])
@pytest.mark.parametrize("text", ["{", "[]", "[1]", '"x"', '{"a": 1}'])
def test_a_damaged_run_is_told(ended, name, text):
    run = ended()
    path = run / "best" / name if name == "config.json" else run / name
    path.write_text(text)
    with pytest.raises(UserError):
        sharing.write_card(run)


def test_a_resumed_run_has_no_card_until_it_ends_again(ended, make_config):
    run = ended(phases=TWO_PHASES)
    sharing.write_card(run)
    accelerator = Accelerator(cpu=True)
    with pytest.raises(UserError):
        runs.check_changes(accelerator, make_config(TWO_PHASES, seed=1), run, phases_begun=2)
    assert sharing.card_of(run).exists(), "refused, it is what it was"
    runs.check_changes(accelerator, make_config(TWO_PHASES), run, phases_begun=2)
    assert not sharing.card_of(run).exists()


# ---- the option -------------------------------------------------------------------------------------------------

ODD = ["", "model", "a/b/c", "/model", "a/", "-a/b", "a/b-", "a/.b", "a--b/c", "a/b..c", "a/b.git", "ä/b", "a b/c",
       "a/b\n", "https://huggingface.co/a/b", "a/" + "b" * 97, "a/b@main", "hf-hub:a/b"]  # fmt: skip


@pytest.mark.parametrize("text", ODD)
def test_an_id_that_is_none_is_refused_before_anything_begins(text):
    with pytest.raises(UserError, match="push_to_hub: ") as caught:
        parse(["--push_to_hub", text])
    assert caught.value.exit_code == 2
    with pytest.raises(UserError, match="push_to_hub: should be NAME/MODEL"):
        sharing.check(text)


@pytest.mark.parametrize("text", ["user/model", "A_b/c.d-e", "1/2", "a/" + "b" * 96])
def test_an_id_is_taken_for_one(text):
    assert hub_id(text) == text
    validate_repo_id(text)


@pytest.mark.parametrize("text", ODD)
def test_what_we_take_for_an_id_the_library_takes_too(text):
    try:
        assert hub_id(text) == text
    except ValueError:
        return
    try:
        validate_repo_id(text)
    except HFValidationError:
        pytest.fail("the library refuses it")


def test_the_option_is_for_one_run_and_free_when_it_is_resumed(make_config, capsys):
    assert parse([])[0].push_to_hub is None
    config = make_config(TWO_PHASES, push_to_hub="user/model")
    with runs.opened(Accelerator(cpu=True), config, None) as run:
        assert read_yaml(run / "config.yaml")["push_to_hub"] is None
        settled = runs.check_changes(Accelerator(cpu=True), config, run, phases_begun=2)
        runs.record(settled, run, micro_batch_size=4)
    assert settled.push_to_hub == "user/model"
    assert read_yaml(run / "config.yaml")["push_to_hub"] is None
    assert "push_to_hub" not in capsys.readouterr().out


# ---- what is told before training -------------------------------------------------------------------------------


def refusal(repository="user/model") -> str:
    with pytest.raises(UserError) as caught:
        sharing.check(repository)
    assert caught.value.exit_code == 2
    text = str(caught.value)
    assert TOKEN not in text and "\n" not in text
    return text


def test_a_token_that_may_write_is_all_that_is_asked_for(server):
    sharing.check("user/model")
    assert server.requests[-1] == ("GET", "/api/whoami-v2")
    assert {method for method, _ in server.requests} == {"GET"}


def test_no_token(server, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    text = refusal()
    assert "there is no token" in text and "hf auth login" in text and "HF_TOKEN" in text
    assert not server.requests


def test_a_token_that_the_hub_does_not_know(server, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", f"{TOKEN}x")
    assert "accepts no upload (401 Unauthorized); log in" in refusal()


def test_a_token_that_may_only_read(server):
    server.role = "read"
    assert "the token of user is read-only" in refusal()


@pytest.mark.parametrize("odd", ["\x01", " ", "ü", "\u2019"])
def test_a_token_that_can_not_be_sent_is_not_shown(server, monkeypatch, odd):
    monkeypatch.setenv("HF_TOKEN", f"{TOKEN}{odd}{TOKEN}")
    assert "characters that no token has" in refusal()
    assert not server.requests


def test_offline(server, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    text = refusal()
    assert "work offline" in text and "predict.py RUN --push_to_hub" in text


def test_a_hub_that_is_down_and_its_password(server, monkeypatch, capfd):
    take_for_the_hub(monkeypatch, closed_port().replace("://", "://me:topsecretword@"))
    text = refusal()
    assert "accepts no upload" in text and "http://127.0.0.1:" in text
    assert "topsecretword" not in text + "".join(capfd.readouterr())


# ---- the upload -------------------------------------------------------------------------------------------------


def test_a_run_is_trained_uploaded_and_loaded_by_timm(server, forked_command, parquet, tmp_path):
    env = {"HF_HOME": str(tmp_path / "home")}
    result = forked_command(
        "train.py", "--config", "recipes/demo_scratch.yaml", "--data.source", str(parquet), "--data.workers", "0",
        "--phases.train.epochs", "1", "--output_dir", str(tmp_path / "runs"), "--run_name", "run",
        "--push_to_hub", "user/model", env=env,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == f"uploaded: {server.url}/user/model"
    assert server.commits == [["README.md", "config.json", "model.safetensors"]]
    run, held = tmp_path / "runs" / "run", tmp_path / "hub" / "model"
    for name in checkpoint.BEST:
        assert (held / name).read_bytes() == (run / "best" / name).read_bytes()
    card, here = (path / "README.md" for path in (held, run / "best"))
    assert card.read_text() == here.read_text().replace("local-dir:best", "hf-hub:user/model") != here.read_text()
    summary = json.loads((run / "summary.json").read_text())
    assert ModelCard.load(card).data.eval_results[1].metric_value == summary["test_top1"]

    assert TOKEN not in result.stdout + result.stderr
    written = [path for folder in ("runs", "home", "hub") for path in (tmp_path / folder).rglob("*") if path.is_file()]
    assert len(written) > 8
    assert [path for path in written if TOKEN.encode() in path.read_bytes()] == []
    assert read_yaml(run / "config.yaml")["push_to_hub"] is None

    load = (
        "import sys, timm, torch; from safetensors.torch import save_file; torch.manual_seed(0)\n"
        "model = timm.create_model('hf-hub:user/model', pretrained=True).eval()\n"
        "images = torch.randn(4, 3, 32, 32)\n"
        "with torch.no_grad(): save_file({'images': images, 'logits': model(images)}, sys.argv[1])"
    )
    other = forked_command(
        "-c", load, str(tmp_path / "logits"), env={"HF_HOME": str(tmp_path / "other"), "HF_TOKEN": ""}
    )
    assert other.returncode == 0, other.stderr
    got = load_file(tmp_path / "logits")
    model = timm.create_model(f"local-dir:{run / 'best'}", pretrained=True).eval()
    with torch.no_grad():
        torch.testing.assert_close(got["logits"], model(got["images"]), rtol=1e-5, atol=1e-5)


def test_without_the_option_nothing_is_asked_of_the_hub(server, make_config):
    run = train.train(make_config({"only": phase()}))
    assert server.requests == []
    assert "local-dir:best" in sharing.card_of(run).read_text()


def test_what_is_refused_after_training_leaves_the_run_whole_and_is_repeated_alone(server, make_config, capfd):
    with pytest.raises(UserError) as caught:
        train.train(make_config({"only": phase()}, push_to_hub="other/model"))
    run = next(Path(make_config().output_dir).iterdir())
    assert caught.value.exit_code == 1
    assert "403 Forbidden: You may not create other/model." in str(caught.value)
    assert f"python predict.py {run} --push_to_hub other/model" in str(caught.value)
    assert (run / "summary.json").exists() and sharing.card_of(run).exists()
    assert server.commits == []
    capfd.readouterr()
    for _ in range(2):  # as often as one likes
        predict.upload(predict.parse([str(run), "--push_to_hub", "user/model"])[0])
    said = capfd.readouterr()
    assert said.out.splitlines() == [f"uploaded: {server.url}/user/model"] * 2
    assert server.commits == [["README.md", "config.json", "model.safetensors"]] * 2
    assert TOKEN not in str(caught.value) + "".join(said)


def test_an_edited_card_is_uploaded_as_it_is(server, ended, tmp_path):
    run = ended()
    sharing.write_card(run)
    text = sharing.card_of(run).read_text() + "\nMade by hand.\n"
    sharing.card_of(run).write_text(text)
    sharing.push(run, "user/model")
    assert "Made by hand." in (tmp_path / "hub" / "model" / "README.md").read_text()
    assert sharing.card_of(run).read_text() == text


def test_a_run_that_has_not_ended_is_uploaded_with_a_card_that_says_so(server, ended, tmp_path):
    run = ended()
    (run / "summary.json").unlink()
    sharing.push(run, "user/model")
    assert "The run has not ended" in (tmp_path / "hub" / "model" / "README.md").read_text()
    assert not sharing.card_of(run).exists(), "it would soon be wrong"


@pytest.mark.parametrize(
    "broken", ["/api/repos/create", "/preupload/", "/objects/batch", "^/lfs/", "/verify", "/commit/"]
)
def test_a_hub_that_fails_at_any_step_makes_no_commit_and_shows_nothing_secret(
    server, ended, monkeypatch, capfd, broken
):
    run, pauses = ended(), []
    monkeypatch.setattr("time.sleep", pauses.append)
    server.broken = broken
    with pytest.raises(UserError) as caught:
        sharing.push(run, "user/model")
    assert caught.value.exit_code == 1
    text = str(caught.value)
    assert "500 Internal Server Error" in text and f"python predict.py {run} --push_to_hub user/model" in text
    assert not server.commits
    said = text + "".join(capfd.readouterr())
    assert TOKEN not in said and server.signature not in said and "\n" not in text


def test_a_hub_that_is_gone_after_training(server, ended, monkeypatch, capfd):
    run = ended()
    take_for_the_hub(monkeypatch, server.url.replace("://", "://me:topsecretword@"))
    monkeypatch.setattr("time.sleep", lambda _: None)
    server.stop()
    with pytest.raises(UserError, match="user/model was not uploaded to http://127") as caught:
        sharing.push(run, "user/model")
    assert "topsecretword" not in str(caught.value) + "".join(capfd.readouterr())


def test_a_hub_that_says_the_token_aloud_is_not_repeated(server, ended, monkeypatch):
    def refuse(*_, **__):
        raise OSError(f"the token {TOKEN} was revoked")

    monkeypatch.setattr(sharing.HfApi, "create_repo", refuse)
    with pytest.raises(UserError) as caught:
        sharing.push(ended(), "user/model")
    assert "the token *** was revoked" in str(caught.value)


def test_the_command_ends_before_training_if_there_is_no_token(server, forked_command, parquet, tmp_path):
    result = forked_command(
        "train.py", "--config", "recipes/demo_scratch.yaml", "--data.source", str(parquet), "--push_to_hub",
        "user/model", "--output_dir", str(tmp_path / "runs"), env={"HF_HOME": str(tmp_path / "home"), "HF_TOKEN": ""},
    )  # fmt: skip
    assert result.returncode == 2
    assert re.fullmatch(r"error: --push_to_hub: there is no token.*\n", result.stderr)
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_of_several_processes_one_asks_and_one_uploads(server, command, parquet, tmp_path):
    options = ["--config", "recipes/demo_scratch.yaml", "--data.source", str(parquet), "--data.workers", "0",
               "--phases.train.epochs", "1", "--output_dir", str(tmp_path / "runs")]  # fmt: skip
    result = command("train.py", *options, "--push_to_hub", "user/model", env=TWO_PROCESSES, launcher=TORCHRUN)
    assert result.returncode == 0, result.stderr
    assert len(server.commits) == 1
    assert server.requests.count(("GET", "/api/whoami-v2")) == 1
    assert os.listdir(tmp_path / "hub") == ["model"]
