import json

import pytest
from conftest import phase

import train


@pytest.fixture
def run(make_config):
    return train.train(make_config({"only": phase()}, data={"image_size": 40}))


def test_its_figures_are_the_trainings(run, command):
    for split in ("test", "validation"):
        result = command("predict.py", str(run), "--split", split)
        assert result.returncode == 0, result.stderr
    summary = json.loads((run / "summary.json").read_text())
    tested, validated = (json.loads((run / "predictions" / f"{s}.json").read_text()) for s in ("test", "validation"))
    for key in ("loss", "top1", "top5"):
        assert tested[key] == pytest.approx(summary[f"test_{key}"], rel=1e-5)
    assert validated["top1"] == summary["best_val_top1"]


def test_a_folder_without_trained_weights_is_told(tmp_path, command):
    result = command("predict.py", str(tmp_path))
    assert result.returncode == 2
    assert result.stderr == f"error: {tmp_path} is not a run with trained weights: it has no config.yaml\n"
