import json

import pytest
import timm
import torch
from conftest import ROOT
from safetensors.torch import load_file, save_file

import checkpoint
import folding
import models
from config import ModelConfig
from errors import UserError
from recipe import read_yaml

CLASSES = [f"class {i}" for i in range(10)]


def create(name="test_resnet", size=(32, 32), classes=CLASSES, **values):
    return models.create(ModelConfig(name=name, **values), classes, size)


def parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("size", [(32, 32), (48, 48)])
@pytest.mark.parametrize("name", ["simple_cnn", "deep_cnn", "resnet50_small_stem", "test_resnet", "test_vit"])
def test_every_model_is_made_by_timm_for_its_classes_and_size(name, size):
    model, origin = create(name, size)
    assert origin == "scratch"
    assert model.eval()(torch.zeros(2, 3, *size)).shape == (2, 10)
    assert timm.is_model(name)


def test_simple_cnn_is_the_reports():
    model, _ = create("simple_cnn", classes=[str(i) for i in range(100)])
    convolutions = [module for module in model.modules() if isinstance(module, torch.nn.Conv2d)]
    linears = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    assert [(c.out_channels, c.kernel_size) for c in convolutions] == [(32, (3, 3)), (64, (3, 3))]
    assert [(fc.in_features, fc.out_features) for fc in linears] == [(64 * 8 * 8, 512), (512, 100)]
    assert [module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)] == [0.5]
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in model.modules())


def test_deep_cnn_is_the_reports():
    model, _ = create("deep_cnn", classes=[str(i) for i in range(100)])
    kinds = [type(module).__name__ for module in model.features]
    assert kinds == ["Conv2d", "BatchNorm2d", "ReLU", "MaxPool2d"] * 4 + ["AdaptiveAvgPool2d"]
    assert [c.out_channels for c in model.features if isinstance(c, torch.nn.Conv2d)] == [64, 128, 256, 512]
    linears = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    assert [fc.out_features for fc in linears] == [1024, 512, 100]
    assert {module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)} == {0.2}


@pytest.mark.parametrize("recipe", ["deep_cnn", "deep_cnn_best"])
def test_the_better_recipe_trains_the_reports_deep_cnn(recipe):
    config = read_yaml(ROOT / "recipes" / f"{recipe}.yaml")
    assert config["model"] == {"name": "deep_cnn"}
    model, _ = create(config["model"]["name"], classes=[str(i) for i in range(100)])
    assert parameters(model) == 4_226_212


def test_small_stem_has_the_plain_resnets_weights_and_wider_maps():
    plain, small = timm.create_model("resnet50", num_classes=10), create("resnet50_small_stem")[0]
    assert {k: v.shape for k, v in plain.state_dict().items()} == {k: v.shape for k, v in small.state_dict().items()}
    images = torch.zeros(1, 3, 32, 32)
    assert plain.eval().forward_features(images).shape[-2:] == (1, 1)
    assert small.eval().forward_features(images).shape[-2:] == (4, 4)


def test_scratch_takes_cifars_normalisation():
    model, _ = create("test_resnet")
    assert model.pretrained_cfg["mean"] == models.CIFAR100_MEAN
    assert model.pretrained_cfg["std"] == models.CIFAR100_STD


def test_weights_from_a_file_take_the_architectures_normalisation_and_a_new_head(tmp_path):
    source = timm.create_model("test_resnet", num_classes=7)
    save_file(source.state_dict(), tmp_path / "weights.safetensors")
    model, origin = create(weights=str(tmp_path / "weights.safetensors"))
    assert "its head has 7 classes and is replaced" in origin
    assert model.pretrained_cfg["mean"] == timm.get_pretrained_cfg("test_resnet").mean
    state = model.state_dict()
    for key, value in source.state_dict().items():
        if not key.startswith("fc."):
            assert torch.equal(state[key], value), key
    assert model.num_classes == 10


@pytest.mark.parametrize("name", ["levit_128s", "repvit_m0_9", "volo_d1_224"])
def test_a_head_of_several_parts_is_replaced_by_a_new_one(tmp_path, name):
    """Whatever layers it is made of: norms and linear ones, two heads of a distilled model, a head for each patch."""
    source = timm.create_model(name, num_classes=7)
    save_file(source.state_dict(), tmp_path / "weights.safetensors")
    model, origin = create(name, weights=str(tmp_path / "weights.safetensors"), size=(224, 224))
    assert "its head has 7 classes and is replaced" in origin
    state = model.state_dict()
    same = [key for key, value in source.state_dict().items() if torch.equal(state[key], value)]
    assert len(same) >= len(state) - 4


def test_weights_of_the_same_size_keep_their_head(tmp_path):
    source = timm.create_model("test_resnet", num_classes=10)
    save_file(source.state_dict(), tmp_path / "weights.safetensors")
    model, origin = create(weights=str(tmp_path / "weights.safetensors"), pretrained=True)
    assert "replaced" not in origin, "and weights come before pretrained: nothing was fetched"
    assert torch.equal(model.fc.weight, source.fc.weight)


@pytest.mark.parametrize("name", ["simple_cnn", "test_vit", "resnet50_small_stem"])
def test_a_best_folder_gives_the_same_logits_through_timm(tmp_path, name):
    model, _ = create(name, (48, 48))
    model.pretrained_cfg |= {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)}
    checkpoint.save_best(model, tmp_path)
    assert sorted(path.name for path in (tmp_path / "best").iterdir()) == ["config.json", "model.safetensors"]
    loaded = timm.create_model(f"local-dir:{tmp_path / 'best'}", pretrained=True)
    images = torch.randn(2, 3, 48, 48)
    with torch.no_grad():
        torch.testing.assert_close(loaded.eval()(images), model.eval()(images), rtol=0, atol=0)
    assert tuple(loaded.pretrained_cfg["mean"]) == (0.1, 0.2, 0.3)
    assert json.loads((tmp_path / "best" / "config.json").read_text())["label_names"] == CLASSES
    data_config = timm.data.resolve_model_data_config(loaded)
    assert tuple(data_config["input_size"]) == (3, 48, 48)
    assert tuple(data_config["std"]) == (0.4, 0.5, 0.6)


def test_of_a_folded_model_in_another_layout_best_has_the_weights_and_the_model_stays(tmp_path):
    model = create()[0].to(memory_format=torch.channels_last)
    models.freeze_all_but(model, ("head",))
    assert folding.fold(model, (32, 32), "bf16")
    checkpoint.save_best(model, tmp_path)
    saved, state = load_file(tmp_path / "best" / "model.safetensors"), model.state_dict()
    assert saved.keys() == state.keys() and all(torch.equal(saved[name], state[name]) for name in state)
    assert not state["conv1.0.weight"].is_contiguous()


def test_a_best_folder_as_weights_hands_its_normalisation_on(tmp_path):
    model, _ = create()
    checkpoint.save_best(model, tmp_path)
    again, origin = create(classes=CLASSES[:4], weights=str(tmp_path / "best"))
    assert again.pretrained_cfg["mean"] == models.CIFAR100_MEAN
    assert "10 classes" in origin
    assert torch.equal(again.conv1[0].weight, model.conv1[0].weight)


def broken_weights(folder, kind):
    path = folder / "weights.safetensors"
    state = {key: value.clone() for key, value in timm.create_model("test_resnet", num_classes=10).state_dict().items()}
    if kind == "text":
        path.write_text("not weights")
    elif kind == "missing key":
        del state["layer1.0.conv1.weight"]
    elif kind == "extra key":
        state["other.weight"] = torch.zeros(2)
    elif kind == "nan":
        state["layer1.0.conv1.weight"][0, 0, 0, 0] = torch.nan
    elif kind == "infinity":
        state["bn1.running_var" if "bn1.running_var" in state else "fc.bias"][0] = -torch.inf
    elif kind == "other shape":
        state["layer1.0.conv1.weight"] = torch.zeros(2, 3)
    if kind not in ("text", "no file"):
        save_file(state, path)
    return path


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("no file", "there is no file or folder"),
        ("text", "is not a safetensors file"),
        ("missing key", r"layer1.0.conv1.weight \(missing in the file"),
        ("extra key", r"other.weight \(2 in the file, missing in the model"),
        ("nan", r"has NaN or infinity in layer1\.0\.conv1\.weight"),
        ("infinity", r"has NaN or infinity in (bn1\.running_var|fc\.bias)"),
        ("other shape", r"layer1.0.conv1.weight \(2x3 in the file"),
    ],
)
def test_weights_that_do_not_fit_are_an_error_naming_the_keys(tmp_path, kind, message):
    with pytest.raises(UserError, match=message):
        create(weights=str(broken_weights(tmp_path, kind)))


def test_a_best_folder_of_another_architecture_is_an_error(tmp_path):
    checkpoint.save_best(create("simple_cnn")[0], tmp_path)
    with pytest.raises(UserError, match=r"is a simple_cnn, but model\.name is test_resnet"):
        create(weights=str(tmp_path / "best"))


def test_the_small_stem_takes_a_plain_resnets_best_folder_with_its_normalisation(tmp_path):
    """What recipes/resnet50_tiny_imagenet.yaml leaves is what recipes/resnet50_best_gpu.yaml starts from."""
    plain = create("resnet50")[0]
    plain.pretrained_cfg |= {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)}
    checkpoint.save_best(plain, tmp_path)
    small, _ = create("resnet50_small_stem", weights=str(tmp_path / "best"))
    assert small.pretrained_cfg["mean"] == (0.1, 0.2, 0.3)
    assert torch.equal(small.layer4[0].conv2.weight, plain.layer4[0].conv2.weight)


def test_a_folder_that_is_not_timms_is_an_error(tmp_path):
    checkpoint.save_best(create()[0], tmp_path)
    (tmp_path / "best" / "config.json").write_text('{"architectures": ["ResNetForImageClassification"]}')
    with pytest.raises(UserError, match=r"config\.json is not timm's"):
        create(weights=str(tmp_path / "best"))


@pytest.mark.parametrize("std", [[0.2, 0, 0.2], [0.2], "abc", [0.2, 0.2, float("nan")], None])
def test_a_normalisation_that_is_none_is_an_error(tmp_path, std):
    checkpoint.save_best(create()[0], tmp_path)
    path = tmp_path / "best" / "config.json"
    described = json.loads(path.read_text())
    described["pretrained_cfg"]["std"] = std
    path.write_text(json.dumps(described))
    with pytest.raises(UserError, match=r"config\.json is not timm's"):
        create(weights=str(tmp_path / "best"))


@pytest.mark.parametrize(("name", "size"), [("simple_cnn", (1, 1)), ("deep_cnn", (32, 4)), ("test_vit", (8, 8))])
def test_a_size_that_the_model_can_not_take_is_told(name, size):
    with pytest.raises(UserError, match=f"model.name: {name} can't .* {size[1]}x{size[0]} images") as caught:
        create(name, size)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("name", ["deep_cnn", "test_resnet", "test_vit", "test_convnext", "test_efficientnet"])
def test_trying_the_size_changes_nothing(monkeypatch, name):
    def made(seed=0):
        torch.manual_seed(seed)
        model = create(name)[0]
        return model, torch.get_rng_state()

    tried, after = made()
    monkeypatch.setattr(models, "_try_size", lambda *_: None)
    untried, expected = made()
    assert torch.equal(after, expected)
    assert all(torch.equal(value, untried.state_dict()[key]) for key, value in tried.state_dict().items())
    assert all(module.training for module in tried.modules())


def test_an_unknown_tag_names_the_nearest():
    with pytest.raises(UserError, match=r"timm has no model 'resnet50.a1_in2k'; nearest: resnet50.a1_in1k"):
        create("resnet50.a1_in2k")


def test_an_unknown_model_names_the_nearest():
    with pytest.raises(UserError, match=r"timm has no model 'resnet5'; nearest: .*resnet50"):
        create("resnet5")


@pytest.mark.parametrize(
    ("name", "head"),
    [("test_resnet", ["fc"]), ("test_vit", ["head"]), ("test_convnext", ["head.fc"]), ("simple_cnn", ["fc"]),
     ("test_efficientnet", ["classifier"]), ("deit_tiny_distilled_patch16_224", ["head", "head_dist"]),
     ("volo_d1_224", ["head", "aux_head"])],
)  # fmt: skip
def test_head_is_timms_classifier_whatever_its_name(name, head):
    model, _ = create(name)
    assert models.head_names(model) == head
    names = models.freeze_all_but(model, ("head",))
    assert {name.rpartition(".")[0] for name in names} == set(head)


def test_freezing_names_exactly_what_trains():
    model, _ = create("test_resnet")
    names = models.freeze_all_but(model, ("layer3", "layer4", "head"))
    assert names == [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert {name.split(".")[0] for name in names} == {"layer3", "layer4", "fc"}
    assert len(models.freeze_all_but(model, ("all",))) == len(list(model.parameters()))


def test_a_module_name_is_not_taken_for_its_namesakes_beginning():
    model, _ = create("test_vit")
    names = models.freeze_all_but(model, ("blocks.1",))
    assert names
    assert all(name.startswith("blocks.1.") for name in names)
    assert models.freeze_all_but(model, ("pos_embed",)) == ["pos_embed"]


@pytest.mark.parametrize("prefix", ["layer5", "laye", "layer3.9", "global_pool"])
def test_a_module_that_the_model_lacks_is_an_error_listing_those_it_has(prefix):
    model, _ = create("test_resnet")
    with pytest.raises(UserError, match=r"no '.*' to train; it has conv1, .*layer4, fc, head, all"):
        models.freeze_all_but(model, (prefix,))


def test_a_module_that_another_lacks_is_an_error_listing_those_inside_it():
    model, _ = create("test_vit")
    with pytest.raises(
        UserError, match=r"no 'blocks.9' to train; it has .*, head, all; inside blocks: blocks.0, blocks"
    ):
        models.freeze_all_but(model, ("blocks.9",))


@pytest.mark.parametrize("name", ["head", "last"])
def test_a_network_of_ones_own_need_not_know_timms_classifier(monkeypatch, name):
    def own(num_classes=10, **_):
        model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 8 * 8, 4))
        model.add_module(name, torch.nn.Linear(4, num_classes))
        model.pretrained_cfg = {}
        return model

    monkeypatch.setattr(models.timm, "create_model", lambda *_, **arguments: own(**arguments))
    model, _ = models.create(ModelConfig(name="test_resnet"), list("abc"), (8, 8))
    assert len(models.freeze_all_but(model, ("all",))) == 4
    assert models.freeze_all_but(model, (name,)) == [f"{name}.weight", f"{name}.bias"]
    if name == "last":
        with pytest.raises(UserError, match="this model has no 'head' to train; it has 1, last"):
            models.freeze_all_but(model, ("head",))


def test_reloaded_weights_are_the_saved_ones(tmp_path):
    model, _ = create()
    checkpoint.save_best(model, tmp_path)
    saved = load_file(tmp_path / "best" / "model.safetensors")
    other, _ = create()
    checkpoint.load_best(other, tmp_path)
    assert all(torch.equal(value, saved[key]) for key, value in other.state_dict().items())


@pytest.mark.parametrize("name", ["test_resnet", "deep_cnn"])
def test_synchronised_batch_norms_keep_names_and_values(name):
    model, _ = models.create(ModelConfig(name=name), list("abc"), (32, 32))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    synchronised = models.synchronised(model)
    assert any(isinstance(module, torch.nn.SyncBatchNorm) for module in synchronised.modules())
    after = synchronised.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[key]) for key, value in before.items())
