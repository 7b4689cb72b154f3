import dataclasses
import time

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import config
from commandline import parse
from errors import UserError
from recipe import DEFAULT_RECIPE, RECIPES, check


def tree(**phase):
    return {"phases": {"only": {"modules": "all", "epochs": 1, "lr": 0.1} | phase}}


def test_without_arguments_it_is_part_3_of_the_report():
    parsed, resume = parse([])
    assert resume is None
    assert (parsed.model.name, parsed.model.pretrained, parsed.data.source) == ("resnet50", True, "uoft-cs/cifar100")
    head, finetune = parsed.phases["head"], parsed.phases["finetune"]
    assert (head.modules, head.epochs, head.optimizer, head.lr) == (("head",), 10, "adam", 1e-3)
    assert (finetune.modules, finetune.epochs, finetune.lr) == (("layer3", "layer4", "head"), 40, 1e-4)
    assert {p.weight_decay for p in (head, finetune)} == {1e-4}
    assert {(p.schedule, p.early_stopping) for p in (head, finetune)} == {("plateau", 10)}
    assert parsed.data.batch_size == 64
    assert parsed.data.folds == 5


@pytest.mark.parametrize("recipe", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_is_valid_and_names_itself(recipe):
    parsed, _ = parse(["--config", str(recipe)])
    assert parsed.recipe == recipe.stem


def test_overriding_one_value_of_one_phase_leaves_its_others_alone():
    before, _ = parse([])
    after, _ = parse(["--phases.finetune.lr", "1e-5", "--data.streaming", "false", "--data.batch_size", "128"])
    assert after.phases["finetune"] == dataclasses.replace(before.phases["finetune"], lr=1e-5)
    assert after.phases["head"] == before.phases["head"]
    assert after.data == dataclasses.replace(before.data, streaming=False, batch_size=128)


def test_a_hyphen_in_a_phases_name_is_no_underscore(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("phases: {a-b: {modules: all, epochs: 1, lr: 1}, a_b: {modules: all, epochs: 1, lr: 1}}")
    phases = parse(["--config", str(path), "--phases.a-b.lr", "0.5"])[0].phases
    assert {name: phase.lr for name, phase in phases.items()} == {"a-b": 0.5, "a_b": 1}


def test_text_stays_text():
    parsed, _ = parse(["--run_name", "2026-11-23", "--data.label", "no", "--data.test_split", "null"])
    assert (parsed.run_name, parsed.data.label, parsed.data.test_split) == ("2026-11-23", "no", None)


def test_config_yaml_is_itself_a_valid_config(tmp_path):
    first, _ = parse(["--seed", "7", "--phases.head.modules", "layer4,head"])
    path = tmp_path / "config.yaml"
    path.write_text(first.to_yaml())
    second, _ = parse(["--config", str(path)])
    assert second == first
    assert second.phases["head"].modules == ("layer4", "head")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--phases.finetun.lr", "1"], "did you mean --phases.finetune.lr?"),
        (["--data.sorce", "x"], "did you mean --data.source?"),
        (["--phases.head.optimizer", "adamm"], "phases.head.optimizer: 'adamm' is not known; did you mean adam"),
        (["--tracking", "wandbb"], "did you mean wandb?"),
        (["--phases.head.lr", "0"], "phases.head.lr: should be greater than 0"),
        (["--phases.head.epochs", "1.5"], "phases.head.epochs: should be a valid integer"),
        (["--data.fold", "5"], "fold is 5, but with 5 folds it goes from 0 to 4"),
        (
            ["--data.folds", "null"],
            "command line: data.folds null leaves no validation, which phases.head.schedule, phases.finetune.schedule, "
            "phases.head.early_stopping, phases.finetune.early_stopping need: choose cosine",
        ),
        (["--data.folds", "null", "--data.fold", "1"], "data: fold is 1, but folds is null"),
        (["--data.streaming", "perhaps"], "data.streaming: should be a valid boolean"),
        (["--run_name", "../elsewhere"], "run_name: '../elsewhere' must be a plain name"),
        (["--config", "recipes/resnet5.yaml"], "did you mean resnet50?"),
        (["--resume", "nowhere"], "nowhere is not a run folder"),
        (["--seed"], "--seed: expected one argument"),
        *((["--model.weights" if it == "weights" else f"--data.{it}", ""], f".{it}: should have at least 1 character")
          for it in ("weights", "image", "label", "train_split", "test_split")),
    ],
)  # fmt: skip
def test_mistakes_are_told_with_the_way_on(argv, message):
    with pytest.raises(UserError) as caught:
        parse(argv)
    assert message in str(caught.value)
    assert caught.value.exit_code == 2


ONE = "phases: {a: {modules: all, epochs: 1, lr: 1}}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected 'key: value' lines"),
        ("- a\n- b\n", "expected 'key: value' lines"),
        ("model: {name: resnet50\nphases:\n", "line 2: not valid YAML"),
        ("modl: {}\nphases: {a: {modules: all, epochs: 1, lr: 1}}", "there is no modl; did you mean model?"),
        ("phases: {a: {modules: all, epochs: 1, lr: 1, lrr: 2}}", "there is no phases.a.lrr; did you mean lr?"),
        ("phases: {a: {modules: all, epochs: 1}}", "phases.a.lr is missing"),
        ("phases: {}", "phases: "),
        ("model: {name: x}", "phases is missing"),
        ("phases: 3", "phases: should be a valid dictionary"),
        ("seed: 1\nseed: 2", "line 2: not valid YAML (the key 'seed' is there twice)"),
        ("seed: 1\n2: 3", "line 2: not valid YAML (the key 2 is not text: quote it)"),
        ("a: &a [1]\nb: [*a, *a]", "line 2: not valid YAML (aliases (*name) are not read"),
        ("model: !!python/object/apply:os.getcwd []", "could not determine a constructor"),
        ("seed: !!int x", "not valid YAML (ValueError"),
        (f"seed: {'[' * 5000}", "not valid YAML (RecursionError"),
        ("a:\n\tb: 1", "line 2: not valid YAML (found character '\\t'"),
        (f"{ONE}\nseed: yes", "seed: should not be true or false"),
        (f"{ONE}\nseed: .nan", "seed: should be a finite number"),
        (f"{ONE}\nseed: 0x{'f' * 9999}", "seed: should be less than 4294901760, not a number of thousands of digits"),
        (f"{ONE}\nrecipe: ../../x", "recipe: '../../x' must be a plain name"),
        (
            "phases: {a.b: {modules: all, epochs: 1, lr: 1}}",
            "phases.a.b: 'a.b' must be a plain name (letters, digits, _ -",
        ),
        (f'{ONE}\nmodel: {{name: "a\\nb"}}', "model.name: holds a character that can't be printed, not 'a\\nb'"),
    ],
)
def test_a_wrong_recipe_is_told_by_file_and_field(tmp_path, text, message):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        parse(["--config", str(path)])
    assert "recipe.yaml" in str(caught.value)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "content", [b"\xff\xfe\x00", "seed: 1".encode("utf-16"), b"\x7fELF\x00\x01", b"seed: \x1b[31m1"]
)
def test_a_file_that_is_no_text_is_told(tmp_path, content):
    (tmp_path / "recipe.yaml").write_bytes(content)
    with pytest.raises(UserError, match=r"recipe\.yaml(: not valid YAML| is not a text file in UTF-8)"):
        parse(["--config", str(tmp_path / "recipe.yaml")])


def test_numbers_and_dates_mean_what_they_look_like(tmp_path):
    """To PyYAML 1e-3 is text and 2026-11-23 a date."""
    (tmp_path / "r.yaml").write_text(
        "phases: {a: {modules: all, epochs: 1, lr: 1e-3}}\nrun_name: 2026-11-23\nclip_norm: 1E+2"
    )
    parsed, _ = parse(["--config", str(tmp_path / "r.yaml"), "--phases.a.weight_decay", "5e-4"])
    assert (parsed.phases["a"].lr, parsed.phases["a"].weight_decay, parsed.clip_norm) == (1e-3, 5e-4, 100)
    assert parsed.run_name == "2026-11-23"


@pytest.mark.parametrize(
    ("text", "seed"),
    [("010", 10), ("-0", 0), ("1_000", 1000), ("0x10", 16), ("0b11", 3), ("7", 7), ("00", 0), ("08", 8)],
)
def test_a_leading_zero_makes_no_octal_number(tmp_path, text, seed):
    """As it does in YAML 1.1, to which 010 is 8. Here it is ten; what was a number by its looks stays one."""
    assert parse(["--seed", text])[0].seed == seed
    (tmp_path / "r.yaml").write_text(f"{ONE}\nseed: {text}")
    assert parse(["--config", str(tmp_path / "r.yaml")])[0].seed == seed


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("--seed 1:30", "seed: should be a valid integer, unable to parse string as an integer, not '1:30'"),
        ("--clip_norm 1:30.5", "clip_norm: should be a valid number, unable to parse string as a number, not '1:30.5'"),
        (
            "--data.micro_batch_size 010",
            "data.micro_batch_size: should be a whole number of at least 1, or auto, not '010'",
        ),
    ],
)
def test_a_time_is_no_number(option, said):
    """As it is in YAML 1.1, to which 1:30 is 90. Where a word may stand as well, 010 is told, too."""
    with pytest.raises(UserError) as caught:
        parse(option.split())
    assert said in str(caught.value)


def test_any_number_of_phases():
    names = [f"p{i}" for i in range(5)]
    parsed = check({"phases": {name: tree()["phases"]["only"] for name in names}}, "test")
    assert list(parsed.phases) == names


@pytest.mark.parametrize(
    ("source", "kind"),
    [("embedded", "embedded"), ("uoft-cs/cifar100", "hub"), ("mnist", "hub"), ("{parquet}", "parquet"),
     ("{parquet}/train-*.parquet", "parquet"), ("{images}", "folder")],
)  # fmt: skip
def test_the_kind_of_source_is_told_from_its_form(source, kind, parquet, tmp_path):
    assert config.DataConfig(source=source.format(parquet=parquet, images=tmp_path)).kind == kind


@pytest.mark.parametrize("source", ["./nothing", "/no/such/folder", "data/*.parquet", "cifar.parquet"])
def test_a_path_that_is_not_there_is_not_taken_for_a_hub_id(source):
    with pytest.raises(UserError, match="there is no file or folder"):
        _ = config.DataConfig(source=source).kind


def test_help_explains_every_option_at_once_and_without_torch(command):
    command("train.py", "--help")  # warm the disk
    began = time.perf_counter()
    result = command("-X", "importtime", "train.py", "--help")
    seconds = time.perf_counter() - began
    assert result.returncode == 0
    assert seconds < 1.5 * 4, "only a grossly slow answer fails here: the machine may be busy"
    assert " torch" not in result.stderr
    for option in ("--data.source", "--data.batch_size", "--model.weights", "--phases.finetune.lr", "--run_name"):
        assert option in result.stdout
    saved = yaml.safe_load(parse([])[0].to_yaml())
    assert f"[{saved['phases']['finetune']['lr']}]" in result.stdout


def test_help_shows_the_chosen_recipes_own_phases_and_defaults(command):
    shown = command("train.py", "--config", "recipes/deep_cnn.yaml", "--help").stdout
    assert "--phases.train.momentum" in shown
    assert "[0.05]" in shown
    assert "--phases.finetune.lr FLOAT" not in shown


# ---- a fuzz: whatever comes, a configuration or one line --------------------------------------------------------


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9) | st.dates() | st.binary(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9) | st.integers(), inner, max_size=3),
    max_leaves=8,
)
SECTIONS = {"": config.Config, "model": config.ModelConfig, "data": config.DataConfig, "augment": config.AugmentConfig,
            "environment": config.Environment, "phases.head": config.PhaseConfig, "phases": None}  # fmt: skip
FIELDS = [
    f"{section}.{field}".strip(".") for section, cls in SECTIONS.items() if cls for field in cls.__pydantic_fields__
]
PLACES = st.sampled_from([*FIELDS, *filter(None, SECTIONS)]) | st.text(max_size=9)
OPTIONS = st.sampled_from([f"--{field}" for field in [*FIELDS, "config", "resume", "help"]])
WORDS = (
    st.text(max_size=12) | VALUES.map(str) | st.sampled_from(["null", "true", "1e-3", "[a, b]", "{", "embedded", "~x/"])
)
FUZZ = settings(
    max_examples=200, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def config_or_one_line(argv: list[str]) -> None:
    try:
        parsed, _ = parse(argv)
        assert check(yaml.safe_load(parsed.to_yaml()), "its own") == parsed
        _ = parsed.data.streams
        parsed.runs_folder()
    except UserError as error:
        assert error.exit_code == 2
        assert str(error).strip() and len(str(error).splitlines()) == 1
    except SystemExit as ended:
        assert ended.code == 0 and "--help" in argv


@FUZZ
@given(st.lists(st.tuples(PLACES, VALUES), min_size=1, max_size=3))
def test_any_tree_is_a_configuration_or_told_in_one_line(tmp_path, grafts):
    recipe = yaml.safe_load(DEFAULT_RECIPE.read_text())
    for place, value in grafts:
        *parents, name = place.split(".")
        tree = recipe
        for parent in parents:
            tree = tree.setdefault(parent, {}) if isinstance(tree.get(parent, {}), dict) else {}
        tree[name] = value
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe, allow_unicode=True), encoding="utf-8")
    config_or_one_line(["--config", str(tmp_path / "recipe.yaml")])


@FUZZ
@given(st.text() | st.text("[]{}:,-&*!|>#%@\"' \n\tab1"))
def test_any_text_is_a_recipe_or_told_in_one_line(tmp_path, text):
    (tmp_path / "recipe.yaml").write_text(text, encoding="utf-8")
    config_or_one_line(["--config", str(tmp_path / "recipe.yaml")])


@FUZZ
@given(st.lists(st.tuples(OPTIONS, WORDS) | st.tuples(WORDS), max_size=4))
def test_any_command_line_is_a_configuration_or_told_in_one_line(capsys, pairs):
    config_or_one_line([word for pair in pairs for word in pair])


def test_a_recipe_with_two_dots_in_its_name_is_not_taken_for_a_patched_run(tmp_path):
    path = tmp_path / "mine..v2.yaml"
    path.write_text((RECIPES / "deep_cnn.yaml").read_text())
    assert parse(["--config", str(path)])[0].recipe == "mine.v2"


def test_resnet50_224_is_the_best_recipe_but_for_its_size():
    best, larger = (yaml.safe_load((RECIPES / f"resnet50_{name}.yaml").read_text()) for name in ("best", "224"))
    assert larger["data"].pop("image_size") == 224 and best["data"].pop("image_size") == 64
    assert larger == best


@pytest.mark.parametrize(
    ("section", "option", "value"),
    [("data", "workers", "0"), ("model", "pretrained", "no"), ("augment", "mix", "none")],
)
def test_a_section_that_is_none_is_told_whatever_is_overridden_in_it(tmp_path, section, option, value):
    """Else another model or other data than the file names would be trained."""
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree() | {section: "resnet18"}))
    for more in ([], [f"--{section}.{option}", value]):
        with pytest.raises(UserError, match=rf"{section}: should be .*(dictionary|valid)"):
            parse(["--config", str(path), *more])
    path.write_text(yaml.safe_dump(tree() | {section: None}))
    assert parse(["--config", str(path), f"--{section}.{option}", value])[0].data.source == "uoft-cs/cifar100"


def test_a_recorded_commit_goes_with_its_source(tmp_path):
    """As when a run's config.yaml is run again on other data."""
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(tree() | {"data": {"source": "some/data", "revision": "v1"}}))
    assert parse(["--config", str(path)])[0].data.revision == "v1"
    assert parse(["--config", str(path), "--data.source", "embedded"])[0].data.revision is None
    recorded = {"data": {"source": "some/data", "streaming": True}}
    path.write_text(yaml.safe_dump(tree() | recorded))
    assert parse(["--config", str(path), "--data.source", "embedded"])[0].data.streaming is True, "the recipe's own"
    environment = {"mixed_precision": "no", "processes": 1, "device_type": "cpu", "device": "x", "versions": {}}
    path.write_text(yaml.safe_dump(tree() | recorded | {"environment": environment}))
    assert parse(["--config", str(path), "--data.source", "embedded"])[0].data.streaming is None, "settled for a run"
    assert parse(["--config", str(path)])[0].data.streaming is True
    path.write_text(yaml.safe_dump(tree() | {"data": {"source": "some/data", "revision": "v1"}}))
    again = ["--config", str(path), "--data.source", "other/data", "--data.revision", "v2"]
    assert parse(again)[0].data.revision == "v2"
