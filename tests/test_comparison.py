import json
import shlex
from pathlib import Path

import pytest
from run_folders import config, corrupted, history, split, write_predictions, write_run

import comparison
from recipe import check
from runfolder import read_run, suffix
from text import NAME_LENGTH

TWO = {"head": 2, "finetune": 3}


@pytest.fixture
def make(tmp_path):
    def make(name="run", phases=TWO, *args, **values):
        return read_run(write_run(tmp_path / name, phases, *args, **values))

    return make


def row(run) -> dict[str, str]:
    table = comparison.comparison([run])
    return dict(zip(table.head, table.rows[0], strict=True))


# ---- the comparison -------------------------------------------------------------------------------------------------


def test_a_finished_run(make):
    rows = history(TWO)
    rows[3]["val_top1"] = rows[4]["val_top1"] = 0.5  # a tie: the first one is the best
    assert row(make(rows=rows)) == {
        "run": "run", "model": "resnet50", "parameters": "23,712,932", "phases": "head 2 + finetune 3",
        "epochs run": "5", "best epoch": "4", "train loss": "2.320", "train top-1": "47.0%",
        "val loss": f"{rows[3]['val_loss']:.3f}", "val top-1": "50.0%", "test loss": "2.345", "test top-1": "43.2%",
        "test top-5": "70.0%", "robustness mean": "-", "minutes": "5.0", "images/s": "625",
    }  # fmt: skip


def test_throughput_is_all_images_over_all_seconds(make):
    """Two epochs of 1000 images, at 100 and at 300 a second, take 13.3 seconds."""
    rows = history({"train": 2})
    rows[0]["images_per_second"], rows[1]["images_per_second"] = 100.0, 300.0
    assert comparison.throughput(make(rows=rows)) == pytest.approx(2000 / (1000 / 100 + 1000 / 300))


def test_a_crashed_run_and_one_without_an_epoch(make):
    crashed = row(make("crashed", TWO, history(TWO)[:3], finished=False))
    assert (crashed["epochs run"], crashed["phases"], crashed["test top-1"]) == ("3 of 5", "head 2 + finetune 1", "-")
    empty = row(make("empty", TWO, [], finished=False))
    assert (empty["epochs run"], empty["best epoch"], empty["images/s"]) == ("0 of 5", "-", "-")
    assert empty["minutes"] == "-"


def test_a_run_without_a_test_split(make, tmp_path):
    run = make()
    (tmp_path / "run" / "summary.json").write_text(json.dumps({"test_loss": None, "test_top1": None, "parameters": 7}))
    assert (row(read_run(run.path))["test loss"], row(read_run(run.path))["parameters"]) == ("-", "7")


@pytest.mark.parametrize(
    ("found", "shown"),
    [
        ([("robustness", {}), ("cifar100c", {})], "30.0% (own corruptions)"),
        ([("cifar100c", {})], "30.0% (CIFAR-100-C)"),
        ([("robustness", {"version": 2})], "30.0% (own corruptions v2)"),
        ([("robustness", {"epochs": 1})], "30.0% (own corruptions, earlier weights)"),
        ([("robustness", {"epochs": 1}), ("cifar100c", {"epochs": 5})], "30.0% (CIFAR-100-C)"),
        ([("robustness", {"limit": 200})], "30.0% (own corruptions, only 200 rows)"),
        ([("robustness", {"limit": 200}), ("cifar100c", {})], "30.0% (CIFAR-100-C)"),
        ([("robustness", {"limit": 100}), ("robustness", {"limit": 5000})], "30.0% (own corruptions, only 5,000 rows)"),
        ([("cifar100c", {"tta": "flips"}), ("robustness", {"limit": 200})], "30.0% (CIFAR-100-C, with flips)"),
    ],
)
def test_the_robustness_mean_says_what_it_is(make, found, shown):
    run = make()
    for kind, values in found:
        name = kind + suffix(values.get("tta"), values.get("limit"), None)
        write_predictions(run.path, corrupted(kind, name, mean15=0.3, **values))
    assert row(read_run(run.path))["robustness mean"] == shown


@pytest.mark.parametrize(
    "own", [{}, {"limit": 200}, {"tta": "flips"}, {"tta": "shifts", "limit": 9, "kind": "cifar100c"}, {"seed": 3}]
)
def test_another_data_sets_robustness_does_not_stand_for_the_runs(make, own):
    """However little of its own was looked at, and whatever comes first in the alphabet."""
    run, values = make(), {"kind": "robustness", "tta": None, "limit": None, "seed": 0} | own
    name = values["kind"] + suffix(values["tta"], values["limit"], values["seed"])
    others = [corrupted("robustness", name, mean15=0.9) for name in ("holiday-robustness", "test-robustness")]
    write_predictions(run.path, *others)
    assert row(read_run(run.path))["robustness mean"] == "-"
    write_predictions(run.path, corrupted(name=name, mean15=0.3, **values), *others)
    assert comparison.robustness(read_run(run.path)).mean15 == 0.3


def test_figures_that_can_not_be_compared_are_told(make):
    runs = []
    for number, (kind, version) in enumerate((("robustness", 1), ("robustness", 2), ("cifar100c", 1))):
        run = make(f"run{number}")
        write_predictions(run.path, corrupted(kind, version=version))
        runs.append(read_run(run.path))
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert "do not compare" in " ".join(comparison.legend([runs[one], runs[other]]))
        assert "do not compare" not in " ".join(comparison.legend([runs[one], runs[one]]))


@pytest.mark.parametrize("other", [{"source": "x"}, {"subset": "b"}, {"test_split": "valid"}, {"label": "coarse"}])
def test_runs_of_different_data_are_told(make, other):
    one, same, another = make("one"), make("same"), make("another", data=other)
    assert "The runs' data differ" in " ".join(comparison.legend([one, same, another]))
    assert "data differ" not in " ".join(comparison.legend([one, same]))


# ---- over seeds and folds -------------------------------------------------------------------------------------------


def test_runs_that_differ_in_seed_or_fold_alone_are_averaged(make):
    def one(name, top1, test, **values):
        rows = history({"train": 1})
        rows[0] |= {"val_top1": top1, "val_loss": 2.0}
        run = make(name, {"train": 1}, rows, **values)
        path = run.path / "summary.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"test_top1": test}))
        return read_run(run.path)

    runs = [
        one("a-seed0", 0.50, 0.40, seed=0),
        one("a-seed2", 0.52, 0.44, seed=2),
        one("a-seed10", 0.54, 0.45, seed=10),
    ]
    runs += [one("other", 0.9, 0.9, seed=1, data={"batch_size": 128})]
    runs += [one("fp32", 0.9, 0.9, seed=1, environment={"mixed_precision": "no"})]
    running = make("a-seed3", {"train": 1}, history({"train": 1}), finished=False, seed=3)
    again = one("again", 0.50, 0.40, seed=0)
    table = comparison.over_seeds([*runs, running, again])
    assert [dict(zip(table.head, row, strict=True)) for row in table.rows] == [
        {
            "over": "seeds 0, 2, 10", "runs": "a-seed0, a-seed2, a-seed10", "val loss": "2.000 ± 0.000",
            "val top-1": "52.0% ± 2.0%", "test loss": "2.345 ± 0.000", "test top-1": "43.0% ± 2.6%",
            "robustness mean": "-",
        }
    ]  # fmt: skip
    assert comparison.over_seeds([runs[0], again, *runs[3:]]) is None
    fold = one("fold1", 0.6, 0.5, data={"fold": 1}, environment={"device": "x"})
    table = comparison.over_seeds([*runs[:2], fold])
    assert [row[:2] for row in table.rows] == [["seeds 0, 2", "a-seed0, a-seed2"], ["folds 0, 1", "a-seed0, fold1"]]


def test_robustness_is_averaged_over_the_same_images_alone(make):
    runs = [make(f"run{seed}", seed=seed) for seed in range(2)]
    for run, version in zip(runs, (2, 2), strict=True):
        write_predictions(run.path, corrupted("robustness", version=version))
    table = comparison.over_seeds([read_run(run.path) for run in runs])
    assert dict(zip(table.head, table.rows[0], strict=True))["robustness mean"].endswith(" ± 0.0%")
    write_predictions(runs[1].path, corrupted("robustness", version=1))
    table = comparison.over_seeds([read_run(run.path) for run in runs])
    assert dict(zip(table.head, table.rows[0], strict=True))["robustness mean"] == "-"


# ---- phase changes --------------------------------------------------------------------------------------------------


def test_a_phase_change_over_one_and_five_epochs(make):
    phases = {"head": 3, "finetune": 7}
    (change,) = comparison.phase_changes(make("run", phases, history(phases, jump=0.15)))
    assert (change.before, change.after, change.span) == ("head", "finetune", 5)
    assert (change.top1, change.one, change.several) == pytest.approx((0.32, 0.47, 0.51))
    assert change.words.startswith("a gain over one epoch and over 5 epochs (noise: up to 1.4 points, twice the")


def test_a_phase_with_fewer_epochs_and_a_run_with_one_phase(make):
    (change,) = comparison.phase_changes(make("a", TWO, history(TWO)[:3]))
    assert (change.several, change.span) == (None, 1)
    (change,) = comparison.phase_changes(make("b", TWO, history(TWO)))
    assert change.span == 3
    assert comparison.phase_changes(make("c", {"train": 3})) == []


def test_a_change_beside_missing_figures(make):
    rows = history(TWO)
    rows[4]["val_top1"] = float("nan")
    (change,) = comparison.phase_changes(make("a", TWO, rows))
    assert change.span == 2 and change.several == pytest.approx(0.42)
    rows[2]["val_top1"] = None
    assert comparison.phase_changes(make("b", TWO, rows)) == []


def test_noise_is_that_of_the_rows_which_are_estimated_from_the_steps(make):
    """625 steps of 64 images are 40,000, four of five parts; the fifth is validation."""
    change = comparison.phase_changes(make())[0]
    assert "about 10,000 validation rows" in change.words
    mean = (0.31 + 0.41) / 2
    assert change.noise == pytest.approx(2 * (2 * mean * (1 - mean) / 10_000) ** 0.5)


def test_judged_rows_are_better_than_estimated_ones(make):
    run = make()
    write_predictions(run.path, split("validation", ["a", "b"], rows=400, limit=400))
    assert "about 10,000" in comparison.phase_changes(read_run(run.path))[0].words
    write_predictions(run.path, split("validation", ["a", "b"], rows=9_931))
    assert "with 9,931 validation rows" in comparison.phase_changes(read_run(run.path))[0].words


@pytest.mark.parametrize(("jump", "words"), [(0.012, "within noise"), (0.016, "a gain"), (-0.016, "a loss")])
def test_a_jump_is_noise_up_to_twice_the_standard_error(make, jump, words):
    """1.3 points here."""
    rows = history({"head": 2, "finetune": 1}, jump=jump)
    assert comparison.phase_changes(make(rows=rows))[0].words.startswith(f"{words} over one epoch")


def test_without_steps_a_jump_is_measured_by_the_changes_around_it(make):
    rows = [{key: value for key, value in row.items() if key != "step"} for row in history(TWO, jump=0.009)]
    (change,) = comparison.phase_changes(make("a", TWO, rows))
    assert change.noise == pytest.approx(0.01) and change.within_noise(change.one)
    assert "the largest change between epochs near it" in change.words
    (change,) = comparison.phase_changes(make("b", {"a": 1, "b": 1}, [rows[1], rows[2]]))
    assert change.noise is None and "can't be told" in change.words


@pytest.mark.parametrize("values", [{"batch_size": 10**400}, {"folds": 1}, {"folds": "five"}, {"batch_size": None}])
def test_a_configuration_that_gives_no_rows(make, values):
    assert "near it" in comparison.phase_changes(make(data=values))[0].words


# ---- how runs were made ---------------------------------------------------------------------------------------------


def test_only_what_differs_is_shown_and_the_surroundings_last(make):
    environment = {"mixed_precision": "no"}
    runs = [make("a"), make("b", TWO, data={"fold": 1}, environment=environment, output_dir="elsewhere")]
    table = comparison.differences(runs)
    assert table.head == ["field", "a", "b"]
    assert table.rows == [["data.fold", "0", "1"], ["environment.mixed_precision", "bf16", "no"]]
    assert comparison.differences([runs[0], make("c")]).rows == []
    assert comparison.differences(runs[:1]) is None


def test_numbers_are_not_taken_for_true_and_false(make):
    runs = [make("a", data={"workers": 1}), make("b", data={"workers": True}), make("c", data={"workers": None})]
    assert comparison.differences(runs).rows == [["data.workers", "1", "true", "null"]]


def test_a_field_that_earlier_code_did_not_have_is_told_if_it_says_something(make):
    runs = [make("a"), make("b", data={"revision": None}), make("c", data={"revision": "0123456"})]
    assert "data.revision" not in [row[0] for row in comparison.differences(runs[:2]).rows]
    assert ["data.revision", "-", "null", "0123456"] in comparison.differences(runs).rows


def test_what_differs_is_told_however_long_or_alike(make):
    modules = [f"stage{i}.block" for i in range(12)]
    runs = [
        make("a", data={"source": "x" * 100 + "a"}, seed=1, model={"frozen": modules}),
        make("b", data={"source": "x" * 100 + "b"}, seed="1", model={"frozen": [*modules, "head"]}),
        make("c", data={"source": "y"}, seed=2, model={"frozen": modules}),
    ]
    rows = {field: cells for field, *cells in comparison.differences(runs).rows}
    ends = ["…" + "x" * 77 + 'a"', "…" + "x" * 77 + 'b"', '"y"']
    assert rows["data.source"] == ends and rows["seed"] == ["1", '"1"', "2"]
    one, other, _ = rows["model.frozen"]
    assert one.endswith('"stage11.block"]') and other.endswith('"stage11.block", "head"]')
    assert len(one) == len(other) == NAME_LENGTH


def test_a_number_that_python_does_not_write_out(make, tmp_path):
    runs = [make("a"), make("b")]
    with (tmp_path / "b" / "config.yaml").open("a") as file:
        file.write(f"huge: 0x{'f' * 5000}\n")
    rows = comparison.differences([runs[0], read_run(runs[1].path)]).rows
    assert rows == [["huge", "-", "a number of thousands of digits"]]


OWN = "accelerate launch --config_file accelerate_config.yaml"


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"mixed_precision": "no"}, f"{OWN} --mixed_precision no --cpu train.py"),
        ({"mixed_precision": "bf16", "device_type": "cuda"}, f"{OWN} --mixed_precision bf16 train.py"),
        (
            {"mixed_precision": "fp16", "processes": 4, "device_type": "cuda"},
            f"{OWN} --mixed_precision fp16 --multi_gpu --num_processes 4 train.py",
        ),
        (
            {"mixed_precision": "no", "processes": 2},
            "env ACCELERATE_USE_CPU=true ACCELERATE_MIXED_PRECISION=no torchrun --nproc_per_node 2 train.py",
        ),
    ],
)
def test_the_command_has_the_precision_and_the_processes(make, environment, words):
    run = make("a 'run'; rm -r x", environment=environment)
    assert comparison.command(run).startswith(f"{words} --config ")
    assert shlex.split(comparison.command(run))[-1] == str(run.path / "config.yaml")


def test_the_command_of_a_patched_run_patches(make):
    run = make(recipe="resnet50..ema.erasing", environment={"mixed_precision": "no"})
    assert f"{OWN} --mixed_precision no --cpu benchmarks/patches.py ema erasing -- --config " in comparison.command(run)


def test_the_command_is_not_for_the_folder_that_the_report_was_made_in(make, tmp_path, monkeypatch):
    make()
    monkeypatch.chdir(tmp_path)
    assert comparison.command(read_run(Path("run"))).endswith(f"--config {tmp_path}/run/config.yaml")


def test_the_made_up_configurations_are_valid_ones():
    """Otherwise the tests above prove little."""
    tree = config(TWO)
    del tree["environment"]
    assert check(tree, "test").data.folds == 5
