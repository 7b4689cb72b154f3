"""The hub's path end to end, against a server on loopback; and what happens when there is no hub."""

import json
import re
import shutil
import socket
import ssl
import threading
import time
import urllib.error
from itertools import chain, cycle, islice, repeat
from types import SimpleNamespace

import datasets
import pytest
import timm
import torch
import yaml
from hub_server import COMMIT, FAULTS, HubServer
from huggingface_hub import constants, get_session
from huggingface_hub.utils import httpx
from images import encode, noise
from safetensors.torch import load_file, save_file

import hub
import sources
from commandline import parse
from config import DataConfig
from errors import UserError
from recipe import RECIPES

README = """---
configs:
- config_name: cifar100
  data_files:
  - split: train
    path: cifar100/train-*
  - split: test
    path: cifar100/test-*
  default: true
---
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A hub with a data set repository laid out as uoft-cs/cifar100 and timm's repository of `test_resnet`."""
    root = tmp_path_factory.mktemp("hub")
    dataset, model = root / "dataset", root / "model"
    (dataset / "cifar100").mkdir(parents=True), model.mkdir()
    (dataset / "README.md").write_text(README)
    splits = sources.embedded_splits(400, streams=False)
    for split in ("train", "test"):
        splits[split].to_parquet(dataset / "cifar100" / f"{split}-00000-of-00001.parquet")
    torch.manual_seed(3)
    source = timm.create_model("test_resnet", num_classes=1000)
    save_file(source.state_dict(), model / "model.safetensors")
    cfg = {"architecture": "test_resnet", "num_classes": 1000, "pretrained_cfg": dict(source.pretrained_cfg)}
    (model / "config.json").write_text(json.dumps(cfg))
    with HubServer(
        {"datasets/uoft-cs/cifar100": dataset, f"models/{source.pretrained_cfg['hf_hub_id']}": model}
    ) as hub:
        yield hub


OPTIONS = ("--model.name", "test_resnet", "--phases.head.epochs", "1", "--phases.finetune.epochs", "1",
           "--data.workers", "1", "--tracking", "none")  # fmt: skip


@pytest.fixture
def command(forked_command):
    return forked_command


def train(command, server_url, home, output, *more):
    env = {"HF_ENDPOINT": server_url, "HF_HOME": str(home)}
    return command("train.py", *OPTIONS, "--output_dir", str(output), "--run_name", "run", *more, env=env)


# The command with less patience: no test waits two minutes for a hub that is down, or half a second 24 times.
HASTY = "import hub, runpy; hub.{} = {}; runpy.run_path('train.py', run_name='__main__')"


def train_hastily(command, server_url, home, output, *more, constant="LOST_AFTER", seconds=3):
    code = HASTY.format(constant, seconds)
    return train(lambda _, *args, env: command("-c", code, *args, env=env), server_url, home, output, *more)


def test_part_3_runs_from_the_hub_streamed(server, command, tmp_path):
    name = "test_resnet.r160_in1k"  # with the weights' tag, as the hub names them
    before, options = len(server.requests), ("--model.name", name, "--data.revision", "v1")
    result = train(command, server.url, tmp_path / "home", tmp_path / "runs", *options)
    assert result.returncode == 0, result.stderr
    assert f"timm's pretrained {name} from timm/{name}" in result.stdout
    assert "streamed" in result.stdout
    # The commit that v1 is at present is recorded, and all data are of it, whatever v1 becomes.
    recorded = yaml.safe_load((tmp_path / "runs" / "run" / "config.yaml").read_text())["data"]["revision"]
    asked = [path for _, path in server.requests[before:] if "/datasets/uoft-cs/cifar100" in path]
    assert recorded == COMMIT
    named = [path for path in asked if COMMIT not in path]
    assert named and all("/v1" in path for path in named) and not any(".parquet" in path for path in named), named
    summary = json.loads((tmp_path / "runs" / "run" / "summary.json").read_text())
    assert 0 <= summary["test_top1"] <= 1
    # The frozen stem still is what the hub served, and the normalisation is that of these weights.
    served = load_file(next(iter(server.repositories.values())).parent / "model" / "model.safetensors")
    best = load_file(tmp_path / "runs" / "run" / "best" / "model.safetensors")
    assert torch.equal(best["conv1.0.weight"], served["conv1.0.weight"])
    saved = json.loads((tmp_path / "runs" / "run" / "best" / "config.json").read_text())
    assert tuple(saved["pretrained_cfg"]["mean"]) == timm.get_pretrained_cfg("test_resnet").mean


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A hub with a data set of 10 MB in two files, beside which the ends of files, read first, are small."""
    folder = tmp_path_factory.mktemp("large")
    rows = datasets.Dataset.from_dict(
        {"img": [encode(image) for image in noise(800, (64, 64))], "label": [i % 10 for i in range(800)]},
        features=datasets.Features(img=datasets.Image(), label=datasets.ClassLabel(num_classes=10)),
    )
    (folder / "cifar100").mkdir()
    (folder / "README.md").write_text(README)
    for shard in range(2):
        rows.shard(2, shard).to_parquet(folder / "cifar100" / f"train-{shard:05d}-of-00002.parquet", batch_size=50)
    rows.select(range(50)).to_parquet(folder / "cifar100" / "test-00000-of-00001.parquet")
    with HubServer({"datasets/uoft-cs/cifar100": folder}) as hub:
        yield hub


@pytest.mark.slow
@pytest.mark.parametrize("keep_mb, times", [(2048, 1), (5, 10)])
def test_a_run_downloads_each_byte_once_if_it_may_keep_them(large, command, tmp_path, keep_mb, times):
    """Otherwise each of its five epochs reads it for training, and once more for validation."""
    large.sent.clear()
    scratch = ("--model.pretrained", "false", "--phases.head.epochs", "2", "--phases.finetune.epochs", "3")
    more = ("--data.shuffle_buffer", "100", "--data.keep_mb", str(keep_mb), "--data.test_split", "null")
    result = train(command, large.url, tmp_path / "home", tmp_path / "runs", *scratch, *more)
    assert result.returncode == 0, result.stderr
    folder = large.repositories["datasets/uoft-cs/cifar100"] / "cifar100"
    size = sum(path.stat().st_size for path in folder.glob("train-*"))
    sent = sum(count for name, count in large.sent.items() if "train-" in name)
    assert times <= sent / size < 1.05 * times
    assert ("are kept in memory" if times == 1 else "larger than data.keep_mb 5") in result.stdout


@pytest.mark.slow
def test_it_runs_downloaded_first_and_then_from_the_cache_without_a_hub(server, command, tmp_path):
    home = tmp_path / "home"
    online = train(command, server.url, home, tmp_path / "online", "--data.streaming", "false")
    assert online.returncode == 0, online.stderr
    assert "training and" in online.stdout, "memory-mapped rows can be counted"
    offline = train(command, closed_port(), home, tmp_path / "offline")
    assert offline.returncode == 0, offline.stderr
    assert "can't be reached: using only what is in this machine's cache" in offline.stderr
    assert "streamed" in offline.stdout
    rows = [
        json.loads((tmp_path / f / "run" / "history.jsonl").read_text().splitlines()[0]) for f in ("online", "offline")
    ]
    assert rows[0]["step"] == rows[1]["step"]
    recorded = (tmp_path / "offline" / "run" / "config.yaml").read_text()
    assert yaml.safe_load(recorded)["data"]["revision"] == COMMIT, "as the cache knows it"


def closed_port() -> str:
    """A loopback address where nothing listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


@pytest.mark.parametrize(
    ("more", "wanted"),
    [((), "the dataset uoft-cs/cifar100"), (("--data.source", "embedded"), "timm's pretrained test_resnet")],
)
def test_without_hub_or_cache_one_clear_error_comes_soon(command, tmp_path, more, wanted):
    began = time.monotonic()
    result = train(command, closed_port(), tmp_path / "home", tmp_path / "runs", *more)
    seconds = time.monotonic() - began
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    error = result.stderr.splitlines()[-1]
    assert error.startswith("error: the hub (http://127.0.0.1:")
    for part in (wanted, "--data.source", "--model.weights", "recipes/demo_pretrain.yaml"):
        assert part in error
    assert seconds < 30, "15 seconds on a machine that does nothing else; this bound is for a busy one"
    assert not (tmp_path / "runs").exists(), "and nothing is left behind"


def test_weights_that_are_not_in_a_cache_of_others_are_missed_before_any_data_are_read(command, tmp_path):
    (tmp_path / "home" / "hub" / "models--timm--another").mkdir(parents=True)
    (tmp_path / "empty").mkdir()  # an error of its own, if it were looked into
    options = ("--data.source", str(tmp_path / "empty"))
    result = train(command, closed_port(), tmp_path / "home", tmp_path / "runs", *options)
    assert result.returncode == 1
    assert "timm's pretrained test_resnet is not in this machine's cache" in result.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("where", "caches"),
    [
        ({"XDG_CACHE_HOME": "{}"}, "huggingface/{}"),
        ({"HF_HOME": "{}/home"}, "home/{}"),
        ({"XDG_CACHE_HOME": "{}/other", "HF_HOME": "~/home"}, "home/{}"),
        ({"HUGGINGFACE_HUB_CACHE": "{}/hub", "HF_DATASETS_CACHE": "{}/datasets"}, "{}"),
        ({"HF_HUB_CACHE": "~/hub", "HUGGINGFACE_HUB_CACHE": "{}/old", "HF_DATASETS_CACHE": "{}/datasets"}, "{}"),
    ],
)
def test_caches_are_looked_for_where_the_libraries_have_them(where, caches, tmp_path, monkeypatch):
    for name in ("HF_HOME", "XDG_CACHE_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_DATASETS_CACHE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in (where | {"HOME": "{}", "HF_ENDPOINT": closed_port(), "HF_HUB_OFFLINE": "0"}).items():
        monkeypatch.setenv(name, str(value).format(tmp_path))
    config, _ = parse(["--data.source", "x/y", "--model.name", "resnet18"])
    with pytest.raises(UserError, match="the dataset x/y is not in this machine's cache"):
        hub.check(config)
    (tmp_path / caches.format("datasets") / "x___y").mkdir(parents=True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    with pytest.raises(UserError, match="timm's pretrained resnet18 is not in this machine's cache"):
        hub.check(config)
    (tmp_path / caches.format("hub") / "models--timm--resnet18").mkdir(parents=True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    hub.check(config)
    assert hub.offline()


@pytest.mark.parametrize(
    ("words", "weights", "rows"),
    [
        ({}, False, False),
        ({"HF_HUB_OFFLINE": "1"}, True, True),
        ({"TRANSFORMERS_OFFLINE": "yes"}, True, True),
        ({"HF_HUB_OFFLINE": "0", "TRANSFORMERS_OFFLINE": "1"}, False, False),
        ({"HF_DATASETS_OFFLINE": "1"}, False, True),
        ({"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "0"}, True, False),
    ],
)
def test_the_libraries_own_words_for_offline_are_read_as_they_read_them(command, words, weights, rows, monkeypatch):
    for name, value in words.items():
        monkeypatch.setenv(name, value)
    assert (hub.offline(), hub.data_offline()) == (weights, rows)
    libraries = "from datasets import config; print(config.constants.HF_HUB_OFFLINE, config.HF_HUB_OFFLINE)"
    assert command("-c", libraries).stdout == f"{weights} {rows}\n"


def test_a_hub_that_accepts_but_never_answers_is_given_up_soon(monkeypatch):
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setattr(hub, "PATIENCE", 0.5)
        monkeypatch.setenv("HF_HUB_OFFLINE", "0")  # hub.check sets it; undone afterwards
        monkeypatch.setenv("RANK", "1")
        with pytest.raises(UserError, match="can't be reached, and the dataset uoft-cs/cifar100 is not in"):
            hub.check(parse([])[0])
        assert hub.offline()


@pytest.mark.parametrize(
    "reason, there",
    [(ssl.SSLCertVerificationError(1, "unknown CA"), True), (ssl.SSLEOFError(8, "cut"), False), ("refused", False)],
)
def test_a_certificate_that_only_we_do_not_know_is_an_answer(monkeypatch, reason, there):
    """The libraries look for authorities in more places."""

    def urlopen(*_, **__):
        raise urllib.error.URLError(reason)

    monkeypatch.setattr(hub.urllib.request, "urlopen", urlopen)
    assert hub._answers() == there


def test_the_hub_is_not_asked_when_nothing_is_wanted_from_it(monkeypatch, server):
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    before = len(server.requests)
    hub.check(parse(["--config", str(RECIPES / "demo_pretrain.yaml")])[0])
    assert len(server.requests) == before
    hub.check(parse([])[0])
    assert server.requests[before:] == [("HEAD", "/")]
    assert not hub.offline()


def test_a_resumed_run_has_its_weights_and_needs_no_hub(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_ENDPOINT", closed_port())
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")  # hub.check sets it; undone afterwards
    config = parse(["--data.source", "embedded", "--model.name", "test_resnet"])[0]
    assert config.model.pretrained
    with pytest.raises(UserError, match="timm's pretrained test_resnet is not in this machine's cache"):
        hub.check(config, tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    (tmp_path / "checkpoints" / "00001-000000009").mkdir(parents=True)
    hub.check(config, tmp_path)
    assert not hub.offline()


def test_another_commit_than_the_wanted_one_is_not_read_from_the_cache(monkeypatch):
    """Without the hub, `datasets` takes the newest that is there."""
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda *_, **__: SimpleNamespace(hash="b" * 40))
    with pytest.raises(
        UserError, match=r"at a{40} is wanted, .* the newest in this machine's cache is b{40}.*--data.revision null"
    ):
        sources.open_splits(DataConfig(revision="a" * 40))


def test_without_the_hub_nobody_knows_a_branchs_commit(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match="nobody knows which commit v1 is"):
        sources.commit(DataConfig(revision="v1"))
    assert sources.commit(DataConfig(source="embedded")) is None


@pytest.mark.parametrize(
    "subset, said",
    [
        (
            (),
            "it has several subsets. Please pick one among the available configs: ['cifar100', 'part']: --data.subset",
        ),
        pytest.param(("--data.subset", "part"), "has no split 'train'", marks=pytest.mark.slow),
        pytest.param(("--data.subset", "other"), "other", marks=pytest.mark.slow),
    ],
)
def test_of_a_dataset_with_subsets_one_must_be_chosen(server, command, tmp_path, subset, said):
    """The second one has a test split alone, by which it is known."""
    folder = shutil.copytree(server.repositories["datasets/uoft-cs/cifar100"], tmp_path / "dataset")
    part = "- config_name: part\n  data_files:\n  - split: test\n    path: cifar100/test-*\n---\n"
    (folder / "README.md").write_text(README.removesuffix("  default: true\n---\n") + part)
    with HubServer({"datasets/several/subsets": folder, **server.repositories}) as hub_server:
        options = ("--data.source", "several/subsets", *subset)
        result = train(command, hub_server.url, tmp_path / "home", tmp_path / "runs", *options)
    assert result.returncode and "Traceback" not in result.stderr
    assert said in result.stderr.splitlines()[-1]


@pytest.mark.slow
def test_a_subset_that_is_not_in_the_cache_is_named_with_those_that_are(server, command, tmp_path):
    folder = shutil.copytree(server.repositories["datasets/uoft-cs/cifar100"], tmp_path / "dataset")
    part = "- config_name: part\n  data_files:\n  - split: train\n    path: cifar100/train-*\n"
    part += "  - split: test\n    path: cifar100/test-*\n---\n"
    (folder / "README.md").write_text(README.removesuffix("  default: true\n---\n") + part)
    options = ("--data.source", "several/subsets", "--data.streaming", "false", "--model.pretrained", "false")
    with HubServer({"datasets/several/subsets": folder}) as hub_server:
        for subset in ("cifar100", "part"):
            more = ("--run_name", subset, "--data.subset", subset)
            assert train(command, hub_server.url, tmp_path / "home", tmp_path, *options, *more).returncode == 0
    for more in (("--data.subset", "other"), ()):
        result = train(command, closed_port(), tmp_path / "home", tmp_path, *options, "--run_name", "offline", *more)
        assert result.returncode == 1
        told = result.stderr.splitlines()[-1]
        assert told.startswith("error: data.subset: ")
        names = told.rpartition(" in the cache: ")[2]
        assert sorted(re.findall(r"\w+", names)) == ["cifar100", "part"]


def test_a_dataset_that_the_hub_lacks_is_named(server, command, tmp_path):
    result = train(command, server.url, tmp_path / "home", tmp_path / "runs", "--data.source", "nobody/nothing")
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    assert "error: data.source: nobody/nothing can't be loaded" in result.stderr


# ---- a hub that fails in the middle of a run ---------------------------------------------------------------------

FILE = f"datasets/uoft-cs/cifar100/resolve/{COMMIT}/cifar100/train-00000-of-00001.parquet"


@pytest.fixture
def failing(server):
    """Start a hub with the same repositories that fails as told: `failing(faults)`."""
    started = []

    def start(faults=()) -> HubServer:
        started.append(HubServer(server.repositories, faults))
        return started[-1]

    yield start
    for each in started:
        each.stop()


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_never_taken_for_data(failing, fault, monkeypatch, capfd):
    pauses = []
    monkeypatch.setattr(hub.time, "sleep", pauses.append)
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 1)
    hub_server = failing([fault, fault])
    answer = get_session().get(f"{hub_server.url}/{FILE}", headers={"Range": "bytes=100-4099"})
    path = next(iter(hub_server.repositories.values())) / "cifar100" / "train-00000-of-00001.parquet"
    assert answer.content == path.read_bytes()[100:4100]
    assert hub_server.served == [fault, fault]
    assert pauses == ([1, 1] if fault == "429" else [0.5, 1])
    assert "asking again" in capfd.readouterr().err


def test_the_wait_that_a_rate_limit_announces_is_granted(failing, monkeypatch):
    pauses = []
    monkeypatch.setattr(hub.time, "sleep", pauses.append)
    hub_server = failing(["429", "429"])
    hub_server.limit = {"RateLimit": '"resolvers";r=0;t=200'}
    assert get_session().get(f"{hub_server.url}/{FILE}", headers={"Range": "bytes=0-3"}).content == b"PAR1"
    assert pauses == [200, 200]


@pytest.mark.parametrize(("told", "waited"), [("7", 7), ("9999", hub.LONGEST_WAIT)])
def test_a_wait_that_is_told_is_kept_to_within_reason(failing, monkeypatch, told, waited):
    pauses = []
    monkeypatch.setattr(hub.time, "sleep", pauses.append)
    hub_server = failing(["429"])
    hub_server.limit = {"Retry-After": told}
    assert get_session().get(f"{hub_server.url}/{FILE}", headers={"Range": "bytes=0-3"}).content == b"PAR1"
    assert pauses == [waited]


def test_a_hub_that_keeps_failing_is_given_up(failing, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(hub.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(hub.time, "sleep", lambda seconds: clock.__setitem__(0, clock[0] + seconds))
    hub_server = failing(repeat("503"))
    with pytest.raises(UserError, match=r"stopped answering \(503 .*--resume"):
        get_session().get(f"{hub_server.url}/{FILE}", headers={"Range": "bytes=0-3"})
    assert hub.LOST_AFTER < clock[0] <= hub.LOST_AFTER + 8
    assert len(hub_server.requests) > 15


@pytest.mark.parametrize(("method", "path"), [("HEAD", FILE), ("GET", "api/whoami-v2")])
def test_what_a_stream_can_do_without_is_asked_for_once(monkeypatch, method, path):
    monkeypatch.setattr(hub.time, "sleep", lambda _: pytest.fail("it is asked for again"))
    with pytest.raises(httpx.ConnectError):
        get_session().request(method, f"{closed_port()}/{path}")


def test_what_the_hub_refuses_is_not_asked_again(failing):
    hub_server = failing()
    assert get_session().get(f"{hub_server.url}/{FILE}.missing", headers={"Range": "bytes=0-3"}).status_code == 404
    assert len(hub_server.requests) == 1


def figures(run) -> list[dict]:
    """The history without what the clock says."""
    rows = [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in ("seconds", "seconds_left", "images_per_second")} for row in rows]


def test_a_run_whose_hub_fails_at_every_turn_ends_with_the_same_weights(failing, command, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_DOWNLOAD_TIMEOUT", "1")
    options = ("--phases.finetune.epochs", "3", "--data.keep_mb", "0")  # each epoch asks again
    calm = train(command, failing().url, tmp_path / "home", tmp_path / "calm", *options)
    assert calm.returncode == 0, calm.stderr
    # Every question of the stream fails first and is then answered, until there have been 24 faults.
    hub_server = failing(chain.from_iterable(zip(islice(cycle(FAULTS), 24), repeat(None))))
    hub_server.limit = {"Retry-After": "0"}  # how long is waited, the tests above look at
    stormy = train_hastily(
        command, hub_server.url, tmp_path / "other_home", tmp_path / "stormy", *options, constant="FIRST_PAUSE",
        seconds=0.02,
    )  # fmt: skip
    assert stormy.returncode == 0, stormy.stderr
    assert len(hub_server.served) >= 20 and set(hub_server.served) == set(FAULTS)
    weights = [(tmp_path / name / "run" / "best" / "model.safetensors").read_bytes() for name in ("calm", "stormy")]
    assert weights[0] == weights[1]
    assert figures(tmp_path / "calm" / "run") == figures(tmp_path / "stormy" / "run")


def check_lost(result):
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    error = result.stderr.strip().splitlines()[-1]
    assert error.startswith("error: the hub (http://127.0.0.1:") and "stopped answering" in error
    assert "--resume" in error


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_hub_that_stays_down_ends_the_run_soon_with_its_checkpoint(failing, command, tmp_path, workers):
    hub_server, run = failing(), tmp_path / "runs" / "run"

    def stop_after_the_first_epoch():
        while not any(run.glob("checkpoints/00001-*")):
            time.sleep(0.02)
        hub_server.stop()

    threading.Thread(target=stop_after_the_first_epoch, daemon=True).start()
    options = ("--data.workers", workers, "--phases.finetune.epochs", "3", "--data.keep_mb", "0")
    began = time.monotonic()
    check_lost(train_hastily(command, hub_server.url, tmp_path / "home", tmp_path / "runs", *options))
    assert time.monotonic() - began < 60
    assert list((run / "checkpoints").iterdir())
    # The way on that the error names.
    result = command("train.py", "--resume", str(run), env={"HF_ENDPOINT": failing().url, "HF_HOME": str(tmp_path)})
    assert result.returncode == 0, result.stderr
    assert [row["epoch"] for row in figures(run)] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    "faults",
    [
        pytest.param(repeat("503"), id="listing", marks=pytest.mark.slow),
        pytest.param(chain(repeat(None, 5), repeat("stall")), id="rows", marks=pytest.mark.slow),
    ],
)
def test_a_hub_that_dies_before_the_first_row_is_given_up(failing, command, tmp_path, monkeypatch, faults):
    monkeypatch.setenv("HF_HUB_DOWNLOAD_TIMEOUT", "1")
    check_lost(train_hastily(command, failing(faults).url, tmp_path / "home", tmp_path / "runs"))


def test_a_password_in_the_endpoint_is_not_shown(monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "https://me:secret@mirror.example/hub/")
    assert hub.endpoint() == "https://mirror.example/hub"
    assert "secret" not in str(hub.lost("timed out"))
