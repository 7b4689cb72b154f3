"""Nothing that is loaded runs, nothing that is named leads out of the run folder, and no key is written down."""

import json
import pickle
import re
from pathlib import Path

import pytest
import torch
import yaml
from conftest import ROOT, phase
from datasets import ClassLabel, Dataset, Features, Image
from images import encode, noise

import models
import predict
import train
from commandline import parse
from config import ModelConfig
from errors import UserError

NAMES = ["../../x", "<script>alert(1)</script>", "=cmd()", "+1", "@x", "a|b", "/etc/x", "\x1b[31mred"]


class Payload:
    """Unpickling it writes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


# ---- loading runs nothing ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt", "pytorch_model.bin", "best"])
@pytest.mark.parametrize(
    "dump", [lambda it, path: path.write_bytes(pickle.dumps(it)), torch.save], ids=["pickle", "torch"]
)
def test_a_pickle_as_weights_is_refused_and_does_not_run(tmp_path, name, dump):
    ran, weights = tmp_path / "ran", tmp_path / name
    if name == "best":
        weights.mkdir()
        cfg = {"architecture": "test_resnet", "pretrained_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3}}
        (weights / "config.json").write_text(json.dumps(cfg))
        for file in ("model.safetensors", "pytorch_model.bin", "model.pt"):
            dump({"fc.weight": Payload(ran)}, weights / file)
    else:
        dump({"fc.weight": Payload(ran)}, weights)
    with pytest.raises(UserError, match="is not a safetensors file"):
        models.create(ModelConfig(name="test_resnet", weights=str(weights)), ["a", "b"], (32, 32))
    assert not ran.exists()


def test_the_payload_would_have_run(tmp_path):
    """Otherwise the test above proves nothing."""
    pickle.loads(pickle.dumps(Payload(tmp_path / "ran")))
    assert (tmp_path / "ran").exists()


TAGS = ["object/apply:os.mkdir", "object/new:os.mkdir", "name:os.system", "module:os"]


@pytest.mark.parametrize("tag", TAGS)
def test_yaml_is_loaded_safely(tmp_path, tag):
    path = tmp_path / "recipe.yaml"
    path.write_text(f"seed: !!python/{tag} [{tmp_path}/ran]\n")
    for argv in (["--config", str(path)], ["--data.batch_size", f"!!python/{tag} [{tmp_path}/ran]"]):
        with pytest.raises(UserError) as caught:
            parse(argv)
        assert caught.value.exit_code == 2
    assert not (tmp_path / "ran").exists()


def test_the_yaml_would_have_run(tmp_path):
    """Otherwise the test above proves nothing."""
    yaml.unsafe_load(f"seed: !!python/{TAGS[0]} [{tmp_path}/ran]\n")
    assert (tmp_path / "ran").exists()


def test_nothing_in_the_project_trusts_remote_code_or_unpickles():
    """Words that would do so appear in no file but the tests."""
    words = re.compile(
        r"trust_remote_code|import (c?pickle|dill)|from (c?pickle|dill) import (?!UnpicklingError$)|weights_only=False|"
        r"torch\.load\(|yaml\.(unsafe|full)|unsafe_load|UnsafeLoader|FullLoader|(?<![.\w])(eval|exec)\("
    )
    assert words.search("from pickle import loads") and not words.search("model.eval()")
    for path in (*ROOT.glob("*.py"), *ROOT.glob("benchmarks/*.py")):
        found = [line for line in path.read_text(encoding="utf-8").splitlines() if words.search(line)]
        assert not found, f"{path.name}: {found}"


# ---- names lead nowhere -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["../x", "/tmp/x", "a/b", "..", ".", ".hidden", "", "a\x00b", "a\nb", "~", "-x"])
def test_recipe_and_run_names_stay_below_the_output_folder(tmp_path, name):
    with pytest.raises(UserError, match="run_name: "):
        parse(["--run_name", name])
    (tmp_path / "recipe.yaml").write_text(
        f"recipe: {json.dumps(name)}\nphases: {{a: {{modules: all, epochs: 1, lr: 1}}}}"
    )
    with pytest.raises(UserError, match="recipe: "):
        parse(["--config", str(tmp_path / "recipe.yaml")])


def test_a_recipe_with_an_odd_file_name_is_called_by_a_plain_one(tmp_path):
    for name, called in (("..x.yaml", "x"), ("a b<i>.yaml", "a-b-i-"), ("---.yaml", "run")):
        (tmp_path / name).write_text("phases: {a: {modules: all, epochs: 1, lr: 1}}")
        assert parse(["--config", str(tmp_path / name)])[0].recipe == called


def tree(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if path.is_file()}


def test_label_names_are_only_text(make_config, tmp_path, capsys):
    """A whole run, its weights as timm loads them, and what is told of its predictions."""
    folder = tmp_path / "data"
    folder.mkdir()
    features = Features(image=Image(), label=ClassLabel(names=NAMES))
    images = [encode(image) for image in noise(64)]
    rows = Dataset.from_dict({"image": images, "label": [i % len(NAMES) for i in range(64)]}, features=features)
    for split in ("train", "test"):
        rows.to_parquet(folder / f"{split}.parquet")
    before = tree(tmp_path)
    run = train.train(make_config({"only": phase()}, data={"source": str(folder)}))
    assert all(path.is_relative_to(run) for path in tree(tmp_path) - before)
    assert json.loads((run / "best" / "config.json").read_text())["label_names"] == NAMES
    predict.predict(*predict.parse([str(run), "--data.source", str(folder)]))
    assert all(path.is_relative_to(run) for path in tree(tmp_path) - before)
    shown = capsys.readouterr().out
    assert "31mred" in shown and "\x1b" not in shown


# ---- keys -------------------------------------------------------------------------------------------------------


def test_keys_are_in_no_file_and_no_line_of_a_run(forked_command, parquet, tmp_path, monkeypatch):
    """W&B writes its own folder below the run; it is searched too."""
    markers = {"WANDB_API_KEY": "f00d" * 10, "HF_TOKEN": "hf_markermarkermarker", "HF_ENDPOINT": "topsecretword"}
    env = markers | {"HF_ENDPOINT": "http://user:topsecretword@127.0.0.1:9", "WANDB_MODE": "offline"}
    monkeypatch.delenv("WANDB_SILENT")

    def run(*options: str) -> str:
        result = forked_command(
            "train.py", "--config", "recipes/demo_scratch.yaml", "--data.source", str(parquet), "--data.workers", "0",
            "--model.name", "test_resnet", "--output_dir", str(tmp_path / "runs"), "--run_name", "run", *options,
            env=env,
        )  # fmt: skip
        assert result.returncode == (1 if options[-2:] == ("--model.pretrained", "true") else 0), result.stderr
        return result.stdout + result.stderr

    epochs = next(iter(parse(["--config", f"{ROOT}/recipes/demo_scratch.yaml"])[0].phases))
    said = run("--tracking", "wandb", f"--phases.{epochs}.epochs", "1")
    assert list((tmp_path / "runs" / "run" / "wandb").iterdir())
    said += run("--run_name", "other", "--model.pretrained", "true")  # tells that the hub does not answer, and which
    assert "http://127.0.0.1:9" in said
    for name, marker in markers.items():
        assert marker not in said, name
        for path in tree(tmp_path / "runs"):
            assert marker.encode() not in path.read_bytes(), f"{name} is in {path}"
