"""Whatever is wrong with what a user gives: one line that names it and the way on, the right exit code, nothing left.

The cases run where they are, through the same calls as `train.py`; a few of them run again as a user types them.
"""

import json
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import timm
import torch
from datasets import ClassLabel, Dataset, Features, Image, Value
from images import encode, noise, png_header
from safetensors.torch import save_file

import hub
import train
from commandline import parse
from errors import reported

RECIPE = """\
model: {name: test_resnet}
data: {source: "%s", batch_size: 8, workers: 0}
augment: {policy: none}
phases: {head: {modules: head, epochs: 1, lr: 1e-3}}
tracking: none
"""
NAMES = Features(image=Image(), label=ClassLabel(names=["a", "b"]))
THREE = Features(image=Image(), label=ClassLabel(names=["a", "b", "c"]))
OTHER = Features(image=Image(), label=ClassLabel(names=["b", "a", "c"]))
NUMBERS = Features(image=Image(), label=Value("int64"))
TEXTS = Features(image=Image(), label=Value("string"))
DEPTH = Features(NAMES | {"depth": Image()})
NUMBER = Features(NAMES | {"n": Value("int64")})


@dataclass
class Case:
    """Something wrong: `make` puts its files into a folder, which `{dir}` in the options and in `parts` stands for."""

    name: str
    options: str  # added to those of a run that is all right; `{good}` is that run's data
    code: int
    parts: tuple[str, ...]  # of the message
    make: Callable[[Path], object] = lambda folder: None


def option(text: str, *parts: str, code: int = 2) -> Case:
    return Case(text, text, code, parts)


def recipe(name: str, content: str | bytes, *parts: str) -> Case:
    content = content.encode() if isinstance(content, str) else content
    return Case(
        f"recipe: {name}", "--config {dir}/odd.yaml", 2, ("odd.yaml", *parts),
        lambda folder: (folder / "odd.yaml").write_bytes(content),
    )  # fmt: skip


def source(name: str, code: int, make, *parts: str, options: str = "") -> Case:
    return Case(
        f"data: {name}", "--data.source {dir}/data " + options, code, parts, lambda folder: make(data_in(folder))
    )


def data_in(folder: Path) -> Path:
    (folder / "data").mkdir()
    return folder / "data"


PNGS = [encode(image) for image in noise(30)]
DOTS = [encode(image) for image in noise(30, (1, 1))]


def rows(features=NAMES, images=PNGS, labels=(0, 1) * 15, columns=None, **broken) -> Dataset:
    """Thirty rows; `label_7=None` and `image_7=b"..."` replace a label and an image's bytes."""
    table = {"image": list(images), "label": list(labels)} | (columns or {})
    for place, value in broken.items():
        column, row = place.split("_")
        table[column][int(row)] = {"bytes": value, "path": None} if isinstance(value, bytes) else value
    return Dataset.from_dict(table, features=features)


RIGHT = rows()


def parquet(train: Dataset | bytes = RIGHT, test: Dataset | bytes = RIGHT):
    """Write train.parquet and test.parquet: these rows or bytes."""

    def make(folder: Path):
        for split, content in (("train", train), ("test", test)):
            path = folder / f"{split}.parquet"
            path.write_bytes(content) if isinstance(content, bytes) else content.to_parquet(path)

    return make


def truncated(folder: Path):
    parquet()(folder)
    path = folder / "test.parquet"
    path.write_bytes(path.read_bytes()[:-100])


def splits_in_folders(folder: Path):
    for split in ("train", "test"):
        (folder / split).mkdir()
        RIGHT.to_parquet(folder / split / "0.parquet")


def a_photo_of_a_phone(folder: Path):
    folder_of_images()(folder)
    (folder / "cat" / "IMG_7.HEIC").write_bytes(b"x")


def a_photo_with_a_sidecar(folder: Path):
    folder_of_images()(folder)
    (folder / "cat" / "._3.png.json").write_text("{}")  # hidden files are nobody's rows
    (folder / "cat" / "3.png.json").write_text("{}")


def overwritten(folder: Path):
    """Four kilobytes of the images' pages are gone; the file's end, which is read first, is whole."""
    parquet()(folder)
    path = folder / "test.parquet"
    content = path.read_bytes()
    path.write_bytes(content[:1000] + b"\xff" * 4000 + content[5000:])


def elsewhere(folder: Path):
    """Rows that name files instead of holding bytes; the files are gone."""
    features = Features(image={"bytes": Value("binary"), "path": Value("string")}, label=Value("int64"))
    gone = [{"bytes": None, "path": str(folder / f"{i}.png")} for i in range(30)]
    parquet(rows(features, gone), rows(features, gone))(folder)


def folder_of_images(**broken: bytes):
    """cat/00.png to dog/09.png, some of them replaced: `cat_03=b""`."""

    def make(folder: Path):
        for name in ("cat", "dog"):
            (folder / name).mkdir()
            for i, image in enumerate(noise(10, seed=ord(name[0]))):
                image.save(folder / name / f"{i:02d}.png")
        for place, content in broken.items():
            folder.joinpath(*place.split("_")).with_suffix(".png").write_bytes(content)

    return make


def one_class_folder(folder: Path):
    folder_of_images()(folder)
    for path in (folder / "dog").iterdir():
        path.unlink()


def weights(name: str, code: int, make, *parts: str, file: str = "w.safetensors") -> Case:
    return Case(f"weights: {name}", f"--model.weights {{dir}}/{file}", code, parts, lambda folder: make(folder / file))


def state(model: str = "test_resnet", **changed: torch.Tensor | None):
    """Write a model's weights, some of them changed: `fc__bias=...`, None for none."""

    def make(path: Path):
        tensors = timm.create_model(model, num_classes=2).state_dict()
        tensors |= {key.replace("__", "."): value for key, value in changed.items()}
        save_file({key: value.contiguous() for key, value in tensors.items() if value is not None}, path)

    return make


def best_of(architecture: str):
    def make(folder: Path):
        folder.mkdir()
        state()(folder / "model.safetensors")
        cfg = {"architecture": architecture, "pretrained_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3}}
        (folder / "config.json").write_text(json.dumps(cfg))

    return make


def run_folder(folder: Path):
    (folder / "taken").mkdir()
    (folder / "taken" / "config.yaml").write_text(RECIPE % "embedded")


ONE = "phases: {head: {modules: head, epochs: 1, lr: 1e-3}}"
CASES = [
    # ---- options: unknown, of a wrong type, out of range
    option("--data.sorce x", "there is no option --data.sorce", "did you mean --data.source?"),
    option("--phases.tail.lr 1", "there is no option --phases.tail.lr"),
    option("--seed", "--seed: expected one argument"),
    option("--seed -1", "seed: should be greater than or equal to 0, not -1"),
    option("--data.batch_size many", "data.batch_size: should be a valid integer", "'many'"),
    option("--data.batch_size 2.5", "data.batch_size: should be a valid integer", "2.5"),
    option("--data.batch_size 0", "data.batch_size: should be greater than or equal to 1, not 0"),
    option("--data.batch_size [8]", "data.batch_size: should be a valid integer, not [8]"),
    option("--data.micro_batch_size 16", "data.micro_batch_size: 16", "more than data.batch_size 8"),
    option("--data.micro_batch_size 3", "3 does not divide the 8 images", "nearest: 2 or 4"),
    option("--data.folds 1", "data.folds: should be greater than or equal to 2, not 1"),
    option("--data.fold 5", "fold is 5, but with 5 folds it goes from 0 to 4"),
    option("--data.image_size 4", "data.image_size: should be greater than or equal to 8, not 4"),
    option("--data.workers -1", "data.workers: should be greater than or equal to 0, not -1"),
    option("--data.streaming perhaps", "data.streaming: should be a valid boolean", "'perhaps'"),
    option("--data.on_corrupt skipp", "data.on_corrupt: 'skipp' is not known; did you mean skip?"),
    option("--clip_norm 0", "clip_norm: should be greater than 0, not 0"),
    option("--augment.mix cutmix --data.micro_batch_size 1", "augment.mix cutmix: in a batch or micro-batch of 1"),
    option("--augment.policy repot", "augment.policy: 'repot' is not known; did you mean report?"),
    option("--augment.mix cutmxi", "augment.mix: 'cutmxi' is not known; did you mean cutmix?"),
    option("--augment.distort half", "augment.distort: should be a valid boolean", "'half'"),
    option("--tracking wandbb", "tracking: 'wandbb' is not known; did you mean wandb?"),
    option("--phases.head.optimizer adamm", "phases.head.optimizer: 'adamm' is not known; did you mean adam"),
    option("--phases.head.schedule cosin", "phases.head.schedule: 'cosin' is not known; did you mean cosine?"),
    option("--phases.head.lr fast", "phases.head.lr: should be a valid number", "'fast'"),
    option("--phases.head.lr .nan", "phases.head.lr: should be a finite number"),
    option("--phases.head.lr -1", "phases.head.lr: should be greater than 0, not -1"),
    option("--phases.head.epochs yes", "phases.head.epochs: should not be true or false"),
    option("--phases.head.momentum 1", "phases.head.momentum: should be less than 1, not 1"),
    option("--phases.head.modules layer9", "no 'layer9' to train; it has conv1,", "fc, head, all"),
    option("--phases.head.modules null", "phases.head.modules: should be a valid tuple, not None"),
    option("--model.name resnet5", "timm has no model 'resnet5'; nearest: ", "resnet50"),
    option("--model.name local-dir:{dir}", "timm has no model 'local-dir:"),
    option(f"--run_name {'x' * 300}", "run_name: should have at most 100 characters"),
    option(f"--run_name {chr(0x4E00) * 100}", "can't be made: File name too long", code=1),
    option("--data.workers 2000", "data.workers: should be less than or equal to 256, not 2000"),
    option("--run_name ../elsewhere", "run_name: '../elsewhere' must be a plain name"),
    # ---- run folders
    option("--output_dir {dir}/" + "x" * 300, "output_dir: {dir}/xxx", "File name too long"),
    option("--output_dir ~nobody-of-that-name/runs", "output_dir: ~nobody-of-that-name/runs can't be used"),
    option("--output_dir {dir}/recipe.yaml", "output_dir: {dir}/recipe.yaml is not a folder"),
    option("--output_dir {dir}/recipe.yaml/runs", "output_dir: {dir}/recipe.yaml is not a folder"),
    Case("output: a name that is taken", "--output_dir {dir} --run_name taken", 1,
         ("{dir}/taken exists: go on with --resume {dir}/taken, or choose another --run_name",), run_folder),
    # ---- recipes
    option("--config {dir}/resnet5.yaml", "--config: there is no file {dir}/resnet5.yaml; did you mean resnet50?"),
    option("--config {dir}", "--config: {dir} can't be read"),
    recipe("empty", "", "expected 'key: value' lines, found nothing"),
    recipe("a list", "- a\n- b\n", "expected 'key: value' lines, found list"),
    recipe("malformed", "model: {name: a\nphases:\n", "odd.yaml, line 2: not valid YAML"),
    recipe("in UTF-16", ONE.encode("utf-16"), "is not a text file in UTF-8"),
    recipe("a tab", f"{ONE}\n\tseed: 1", "line 2: not valid YAML"),
    recipe("nested without end", "a: " + "[" * 9000, "not valid YAML"),
    recipe("an unknown key", f"{ONE}\nmodl: {{}}", "there is no modl; did you mean model?"),
    recipe("an unknown key of a phase", "phases: {a: {modules: all, epochs: 1, lr: 1, lrr: 2}}",
           "there is no phases.a.lrr; did you mean lr?"),
    recipe("a key twice", f"{ONE}\nseed: 1\nseed: 2", "line 3: not valid YAML (the key 'seed' is there twice)"),
    recipe("a key that is a number", f"{ONE}\n1: 2", "line 2: not valid YAML (the key 1 is not text: quote it)"),
    recipe("aliases", "a: &a [x, x]\nb: [*a, *a]", "line 2: not valid YAML (aliases (*name) are not read"),
    recipe("a Python object", "seed: !!python/object/apply:os.getpid []", "line 1: not valid YAML", "constructor"),
    recipe("without phases", "seed: 1", "phases is missing"),
    recipe("with no phase", "phases: {}", "phases: "),
    recipe("a phase without lr", "phases: {a: {modules: all, epochs: 1}}", "phases.a.lr is missing"),
    recipe("a phase called <b>", "phases: {<b>: {modules: all, epochs: 1, lr: 1}}", "'<b>' must be a plain name"),
    recipe("a section that is none", f"{ONE}\ndata: 3", "data: should be a dictionary, not 3"),
    recipe("a name that leads elsewhere", f"{ONE}\nrecipe: ../../x", "recipe: '../../x' must be a plain name"),
    recipe("an infinite number", f"{ONE}\nclip_norm: .inf", "clip_norm: should be a finite number, not inf"),
    # ---- resuming
    option("--resume {dir}/nowhere", "--resume: {dir}/nowhere is not a run folder"),
    Case("resume: with other options", "--resume {dir}/taken --seed 1", 2, ("seed was 0 and can't",), run_folder),
    # ---- sources
    option("--data.source {dir}/nothing", "data.source: there is no file or folder {dir}/nothing"),
    option("--data.source ~nobody-of-that-name/x", "data.source: ~nobody-of-that-name/x can't be read"),
    option("--data.source nobody/nothing", "can't be reached", "the dataset nobody/nothing", "--data.source", code=1),
    option("--data.test_split tset", "data.test_split: {good} has no split 'tset'; it has test, train", "or null"),
    option("--data.test_split train", "data.test_split: 'train' is trained on", "or null"),
    option("--data.train_split tarin", "data.train_split: {good} has no split 'tarin'; it has test, train"),
    source("an empty folder", 1, lambda folder: None, "data.source: {dir}/data can't be loaded: it holds no images"),
    source("a folder with no images", 1, lambda folder: (folder / "notes.md").write_text("x"), "it holds no images"),
    source("a zero-byte parquet", 1, parquet(b""), "{dir}/data/train.parquet is not an intact parquet file"),
    source("a truncated parquet", 1, truncated, "{dir}/data/test.parquet is not an intact parquet file"),
    source("a damaged parquet", 1, overwritten, "data.source: {dir}/data/test.parquet can't be read"),
    source("a text named parquet", 1, parquet(test=b"hi"), "{dir}/data/test.parquet is not an intact parquet file"),
    source("zero rows", 1, parquet(test=rows().select([])), "the split 'test' has no rows ({dir}/data/test.parquet)"),
    source("one row", 1, parquet(rows(THREE, labels=(0, 1, 2) * 10).select([0, 1]), rows(THREE).select([0, 1])),
           "no validation rows (of 2, fold 0 of 5 validates)"),
    source("fewer rows than a batch", 1, parquet(rows().select(range(8))), "training rows are fewer", "batch_size 8"),
    source("a file that is none of these", 2, lambda folder: (folder / "x.zip").touch(),
           "{dir}/data/x.zip is neither a folder nor .parquet files", options="--data.source {dir}/data/x.zip"),
    source("splits in folders of their own", 1, splits_in_folders,
           "{dir}/data/test and {dir}/data/train have files of one split, '0'",
           "name one of these folders, or rename the files"),
    source("a file that is named after an image", 1, a_photo_with_a_sidecar,
           "{dir}/data/cat/3.png.json is no image", "move it", options="--data.test_split null"),
    source("an image of an unknown format", 1, a_photo_of_a_phone, "{dir}/data/cat/IMG_7.HEIC",
           ".HEIC files are not read here; convert it"),
    # ---- columns
    source("no image column", 2, parquet(*[Dataset.from_dict({"x": [1, 2]})] * 2),
           "{dir}/data has no image column: name it with data.image (columns: x)"),
    source("several image columns", 2, parquet(*[rows(DEPTH, columns={"depth": PNGS})] * 2),
           "2 image columns (image, depth): name it with data.image"),
    option("--model.name mobilenetv5_300m_enc --data.image_size 64",
           "model.name: mobilenetv5_300m_enc is no classifier: it has no output for each of 2 classes"),
    option("--data.image picture", "data.image: there is no column 'picture'; {good} has image, label"),
    option("--data.image label", "data.image: column 'label' of {good} holds classes, not images"),
    source("an image column of numbers", 2, parquet(*[rows(NUMBER, columns={"n": [1] * 30})] * 2),
           "has no images and classes in its columns n, label", options="--data.image n"),
    source("no label column", 2, parquet(*[rows(NUMBERS)] * 2),
           "no class-label column: name it with data.label"),
    option("--data.label kind", "data.label: there is no column 'kind'; {good} has image, label"),
    option("--data.label image", "data.label: column 'image' of {good} holds images, not classes"),
    source("labels that are text", 2, parquet(*[rows(TEXTS, labels=["a", "b"] * 15)] * 2),
           "data.label: column 'label' of {dir}/data holds string, not classes", options="--data.label label"),
    source("whole numbers as labels of a stream", 2, parquet(*[rows(NUMBERS)] * 2),
           "counted in a stream", "--data.streaming false", options="--data.label label --data.streaming true"),
    # ---- labels
    source("a missing label", 1, parquet(rows(label_7=None)),
           "'label' of {dir}/data holds None in row 7 of split 'train'"),
    source("a missing label, in test", 1, parquet(test=rows(label_9=None)), "holds None in row 9 of split 'test'",
           "--data.test_split null"),
    source("a negative label", 1, parquet(rows(label_7=-1)), "holds -1 in row 7 of split 'train'", "none of the 2"),
    source("a negative whole number", 1, parquet(rows(NUMBERS, label_7=-1), rows(NUMBERS)),
           "holds -1 in row 7 of split 'train'", options="--data.label label"),
    source("a negative label in a stream", 1, parquet(rows(label_7=-1, label_8=-1)), "holds -1 in split 'train'",
           options="--data.streaming true"),
    source("a test split without labels, in a stream", 1, parquet(test=rows(labels=[-1] * 30)),
           "holds -1 in the first row of split 'test'", "--data.test_split null", options="--data.streaming true"),
    source("a whole number in test that train lacks", 1, parquet(rows(NUMBERS), rows(NUMBERS, label_3=5)),
           "holds 5 in row 3 of split 'test'", "--data.test_split null", options="--data.label label"),
    source("a number far beyond", 1, parquet(rows(NUMBERS, label_7=10**9), rows(NUMBERS)),
           "holds 1000000000, more than it has rows", options="--data.label label"),
    source("one class only", 1, parquet(rows(labels=[1] * 30)), "all rows of split 'train' are of 1 class (b); two"),
    source("a folder with one class", 1, one_class_folder, "two are needed", options="--data.test_split null"),
    source("a class in test that train lacks", 1, parquet(rows(THREE), rows(THREE, label_3=2)),
           "data.test_split: 'test' has rows of c, of which 'train' has none", "--data.test_split null"),
    source("classes in another order in test", 1, parquet(rows(THREE), rows(OTHER)),
           "the classes of column 'label' in {dir}/data/test.parquet are not those of the other files"),
    # ---- images
    source("a corrupt image", 1, parquet(rows(image_7=PNGS[7]["bytes"][:200], image_8=b"GIF89a")), "the image in row ",
           "of split 'train' can't be decoded: ", "--data.on_corrupt skip", options="--data.batch_size 2"),
    source("a corrupt image, through a worker", 1, parquet(rows(image_7=PNGS[7]["bytes"][:200])), "the image in row 7 ",
           "of split 'train' can't be decoded: ", options="--data.workers 1 --data.batch_size 2"),
    source("a corrupt first image", 1, parquet(rows(image_0=b"?")), "the image in row 0 of split 'train' ",
           "can't be decoded: it is in no format that is read here; repair or remove it, or --data.on_corrupt skip"),
    source("a corrupt image in a stream", 1, parquet(rows(image_0=b"?")), "an image of 1 bytes (BLAKE2b ",
           "--data.streaming false names its row", options="--data.streaming true --data.batch_size 2"),
    source("a corrupt file", 1, folder_of_images(cat_00=b""),
           "the image in row 0 of split 'train' ({dir}/data/cat/00.png) can't be decoded: it is empty",
           options="--data.test_split null"),
    source("no image in a row", 1, parquet(rows(image_0=None)), "the image in row 0 of split 'train' can't be decoded"),
    source("only corrupt images", 1, parquet(rows(images=[{"bytes": b"%d" % i, "path": None} for i in range(30)])),
           "the split 'train' has no image that can be decoded", options="--data.on_corrupt skip"),
    source("images whose files are gone", 1, elsewhere, "{dir}/data/0.png can't be read: ", "No such file",
           options="--data.image image --data.label label"),
    source("an image of 20000x20000", 1, parquet(rows(image_0=png_header(20_000, 20_000))),
           "the image in row 0 of split 'train' can't be decoded", "decompression bomb"),
    source("images of 1x1", 2, parquet(*[rows(images=DOTS)] * 2), "model.name: simple_cnn can't take 1x1 images",
           "--data.image_size", options="--model.name simple_cnn"),
    source("an image of 1x1 among others", 1, parquet(rows(image_0=DOTS[0]["bytes"])), "images differ in size (",
           "set a size to resize them all to, for example --data.image_size"),
    # ---- weights
    option("--model.weights {dir}/w.safetensors", "model.weights: there is no file or folder {dir}/w.safetensors"),
    option("--model.pretrained true", "can't be reached, and timm's pretrained test_resnet", "--model.weights", code=1),
    weights("text", 1, lambda path: path.write_text("x" * 99),
            "model.weights: {dir}/w.safetensors is not a safetensors file"),
    weights("a pickle", 1, lambda path: path.write_bytes(pickle.dumps({"a": 1})),
            "{dir}/w.pt is not a safetensors file", "a pickle can run code", file="w.pt"),
    weights("of another architecture", 1, state("test_vit"), "does not fit test_resnet: ", "missing in the file"),
    weights("of another shape", 1, state(conv1__0__weight=torch.zeros(3, 3)), "conv1.0.weight (3x3 in the file, "),
    weights("with NaN", 1, state(fc__bias=torch.tensor([0, torch.nan])), "has NaN or infinity in fc.bias"),
    weights("with infinity", 1, state(fc__bias=torch.tensor([0, -torch.inf])), "has NaN or infinity in fc.bias"),
    weights("a folder without any", 1, lambda path: path.mkdir(), "holds no model.safetensors and config.json",
            file="best"),
    weights("a folder of another architecture", 2, best_of("resnet18"), "is a resnet18, but model.name is test_resnet",
            file="best"),
    # ---- what shows only while it trains
    option("--phases.head.lr 1e30 --phases.head.modules all", "the loss is not finite in phase head, epoch 1", code=1),
]  # fmt: skip


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("good")
    parquet()(folder)
    return folder


@pytest.fixture
def argv(case, tmp_path, good, monkeypatch) -> list[str]:
    """The command line of a case, with its files made, on a machine without a hub."""
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")  # hub.check sets it; undone afterwards
    (tmp_path / "recipe.yaml").write_text(RECIPE % good)
    case.make(tmp_path)
    options = case.options.replace("{dir}", str(tmp_path)).replace("{good}", str(good)).split()
    fixed = [] if "--resume" in options else ["--config", f"{tmp_path}/recipe.yaml", "--output_dir", f"{tmp_path}/runs"]
    return [*fixed, *options]


def assert_told(case: Case, stderr: str, tmp_path: Path, good: Path, launcher: bool = False) -> None:
    lines = stderr.splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    assert len(errors) == 1, stderr
    assert launcher or lines == errors, stderr
    for part in case.parts:
        assert part.replace("{dir}", str(tmp_path)).replace("{good}", str(good)) in errors[0]
    assert not (tmp_path / "runs").exists() or not list((tmp_path / "runs").iterdir()), "something half-written is left"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_bad_input_is_told_in_one_line_and_leaves_nothing(case, argv, tmp_path, good, capfd):
    with pytest.raises(SystemExit) as ended, reported():
        config, resume = parse(argv)
        hub.check(config)
        train.train(config, resume)
    assert ended.value.code == case.code
    assert_told(case, capfd.readouterr().err, tmp_path, good)


BY_NAME = {case.name: case for case in CASES}
AS_TYPED = (
    "recipe: a key twice",
    "data: a corrupt image, through a worker",
)
AS_FORKS = (
    "data: a truncated parquet",
    "weights: a pickle",
)


@pytest.mark.parametrize("case", [BY_NAME[name] for name in AS_TYPED + AS_FORKS], ids=AS_TYPED + AS_FORKS)
def test_the_same_as_a_user_types_it(case, argv, tmp_path, good, command, forked_command):
    result = (forked_command if case.name in AS_FORKS else command)("train.py", *argv)
    assert result.returncode == case.code
    assert_told(case, result.stderr, tmp_path, good)


@pytest.mark.parametrize("case", [BY_NAME["data: one class only"]], ids=["launch"])
def test_the_same_through_accelerate_launch(case, argv, tmp_path, good, command):
    """The launcher adds lines of its own about a child that failed."""
    result = command("-m", "accelerate.commands.launch", "--config_file", "accelerate_config.yaml", "train.py", *argv)
    assert result.returncode == 1
    assert_told(case, result.stderr, tmp_path, good, launcher=True)
    assert 'train.py", line' not in result.stderr, "no traceback of ours"


def test_corrupt_images_that_are_skipped_are_counted(tmp_path, capfd):
    """Two of thirty: each is in training or in validation, and both are in test."""
    odd = rows(image_7=b"?", image_8=None)
    parquet(odd, odd)(data_in(tmp_path))
    (tmp_path / "recipe.yaml").write_text(RECIPE % (tmp_path / "data"))
    argv = f"--config {tmp_path}/recipe.yaml --output_dir {tmp_path}/runs --data.on_corrupt skip --data.batch_size 2"
    run = train.train(*parse(argv.split()))
    row = json.loads((run / "history.jsonl").read_text())
    assert row.get("train_corrupt", 0) + row.get("val_corrupt", 0) == 2
    assert json.loads((run / "summary.json").read_text())["test_corrupt"] == 2
    assert "phase head, epoch 1: " in capfd.readouterr().err
