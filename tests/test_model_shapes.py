"""The shapes of models by name are those of the models."""

import json

import pytest
import torch

from gcompress import ConfigError
from gcompress.forecast.model_shapes import BUILT_IN, shapes_listed, shapes_named, shapes_of

SMALL = "torch.nn:Identity"


@pytest.mark.parametrize("name", [name for name in BUILT_IN if not name.startswith("gpt2")])
def test_built_in_shapes_are_torchvisions(name):
    models = pytest.importorskip("torchvision.models", reason="torchvision is not installed")
    with torch.device("meta"):
        model = models.get_model(name, weights=None)
    assert list(shapes_named(name).items()) == list(shapes_of(model).items())


@pytest.mark.parametrize("name, width, layers", [("gpt2", 768, 12), ("gpt2_medium", 1024, 24)])
def test_built_in_shapes_are_those_of_transformers(name, width, layers):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    with torch.device("meta"):
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=width, n_layer=layers, n_head=16))
    assert list(shapes_named(name).items()) == list(shapes_of(model).items())


def test_another_model_of_torchvision_is_asked_there():
    models = pytest.importorskip("torchvision.models", reason="torchvision is not installed")
    assert shapes_named("squeezenet1_1") == shapes_of(models.squeezenet1_1(weights=None))


def test_a_users_function_and_saved_states(tmp_path, monkeypatch):
    (tmp_path / "users_model_of_a_test.py").write_text(
        "import torch\nclass Net(torch.nn.Linear):\n    def __init__(self): super().__init__(3, 5)\n"
        "def make():\n    net = torch.nn.Sequential(Net(), torch.nn.BatchNorm1d(5))\n"
        "    net[0].bias.requires_grad_(False)\n    return net\n"
    )
    monkeypatch.chdir(tmp_path)
    assert shapes_named("users_model_of_a_test:make") == {"0.weight": (5, 3), "1.weight": (5,), "1.bias": (5,)}
    assert shapes_named("users_model_of_a_test:Net") == {"weight": (5, 3), "bias": (5,)}
    model = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.BatchNorm1d(5))
    expected = {"0.weight": (5, 3), "0.bias": (5,), "1.weight": (5,), "1.bias": (5,)}
    torch.save(model.state_dict(), "plain.pt")
    torch.save({"model": model.state_dict(), "epoch": 3}, "checkpoint.pth")
    assert shapes_named("plain.pt") == shapes_named("checkpoint.pth") == expected
    safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    safetensors.save_file(model.state_dict(), "state.safetensors")
    assert shapes_named("state.safetensors").items() == expected.items()


@pytest.mark.parametrize(
    "name, words",
    [
        ("resnet5000", "'resnet5000'"),
        ("no_such_module_here:make", "no_such_module_here"),
        ("torch.nn:Nothing", "Nothing"),
        ("json:dumps", "needs no arguments"),
        ("builtins:dict", "returned dict"),
        (SMALL, "no trained parameters"),
        ("missing.pt", "a file that exists"),
    ],
)
def test_what_is_no_model_is_refused_by_name(name, words):
    with pytest.raises(ConfigError, match=words):
        shapes_named(name)


def test_a_file_that_holds_something_else_is_refused(tmp_path):
    for name, write in {
        "text.pt": lambda path: path.write_text("no state"),
        "list.pt": lambda path: torch.save([1, 2], path),
        "text.safetensors": lambda path: path.write_text("no state"),
    }.items():
        write(tmp_path / name)
        with pytest.raises(ConfigError, match=name.partition(".")[0]):
            shapes_named(str(tmp_path / name))


def test_lists_of_shapes():
    assert list(shapes_listed("512x3*2, 7").values()) == [(512, 3), (512, 3), (7,)]
    assert shapes_listed(json.dumps({"a": [2, 3], "b": [4]})) == {"a": (2, 3), "b": (4,)}
    for text in ("", "3x", "0x4", "3x4*0", "a", '{"a": "x"}', "{}", '{"a": [0]}', "{"):
        with pytest.raises(ConfigError, match="shapes: got"):
            shapes_listed(text)
