"""examples/split_learning.py as a user starts it, the models it knows, and cutting other people's models."""

import copy
import importlib.util
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
import warnings

import pytest
import torch

pytest.importorskip("grpc", reason="grpcio is not installed: pip install -e .[split]")
torchvision = pytest.importorskip("torchvision", reason="torchvision is not installed: pip install -e .[examples]")

from gcompress import ConfigError, split  # noqa: E402
from tests.launching import REPOSITORY, quick_python  # noqa: E402
from tests.nested import assert_same  # noqa: E402

starts_processes = pytest.mark.ranks

EXAMPLE = REPOSITORY / "examples" / "split_learning.py"
TIMEOUT_SECONDS = 240
_spec = importlib.util.spec_from_file_location("split_models", REPOSITORY / "examples" / "split_models.py")
split_models = importlib.util.module_from_spec(_spec)
sys.modules["split_models"] = split_models
_spec.loader.exec_module(split_models)
FASHION = [REPOSITORY / "data/fashion-mnist", pathlib.Path("/usr/share/datasets/fashion-mnist")]
needs_fashion = pytest.mark.skipif(
    not any(place.is_dir() for place in FASHION), reason="Fashion-MNIST is not on this machine: make data"
)


class TestCut:
    FAMILIES = {
        "resnet18": (64, "layer2", "layer3.0"),
        "vgg11_bn": (64, "features.17"),
        "vit_b_32": (224, "encoder.layers.encoder_layer_3"),
        "densenet121": (64, "features.denseblock2"),
        "mobilenet_v3_small": (64, "features.5"),
        "efficientnet_b0": (64, "features.4"),
        "squeezenet1_1": (64, "features.6"),
        "shufflenet_v2_x1_0": (64, "stage3"),
    }

    @pytest.mark.parametrize("name", FAMILIES)
    def test_the_parts_of_a_torchvision_model_are_the_model(self, name):
        """In both modes, with its skips, dropout and names; a copy of a part has weights of its own."""
        size, *places = self.FAMILIES[name]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = torchvision.models.get_model(name, weights=None)
        parts = split.cut(model, *places)
        assert len(parts) == len(places) + 1
        assert sorted(key for part in parts for key in part.state_dict()) == sorted(model.state_dict())
        images = torch.randn(2, 3, size, size)
        for mode in (True, False):
            outputs = []
            for modules in ([model], parts):
                torch.manual_seed(0)
                value = images
                for module in modules:
                    value = module.train(mode)(value)
                outputs.append(value)
            assert torch.equal(*outputs), mode
        twin = copy.deepcopy(parts[-1])
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.zero_()
        assert any(bool(parameter.any()) for parameter in parts[-1].parameters())

    def test_a_place_that_more_than_one_tensor_crosses_is_refused(self):
        model = torchvision.models.resnet18(weights=None)
        for place, words in (
            ("layer1.0.conv1", "besides its output maxpool crosses"),
            ("fc", "not the end of the model"),
            ("layer9", "such as layer"),
            (3, "got 3, expected the name"),
        ):
            with pytest.raises(ConfigError, match=words):
                split.cut(model, place)
        with pytest.raises(ConfigError, match="the order in which the model runs them"):
            split.cut(model, "layer2", "layer1")
        with pytest.raises(ConfigError, match="expected 1 to 2 of the 3 modules"):
            split.cut(torch.nn.Sequential(*[torch.nn.ReLU() for _ in range(3)]), 3)


SHAPES = {
    ("vgg19_cifar10", "shallow"): (64, 16, 16),
    ("vgg19_cifar10", "medium"): (256, 4, 4),
    ("vgg19_cifar10", "deep"): (512, 2, 2),
    ("res18_cifar100", "shallow"): (64, 32, 32),
    ("res18_cifar100", "medium"): (128, 16, 16),
    ("res18_cifar100", "deep"): (256, 8, 8),
    ("res34_imagenet", "shallow"): (64, 56, 56),
    ("res34_imagenet", "medium"): (128, 28, 28),
    ("res34_imagenet", "deep"): (256, 14, 14),
    ("cnn_fashion", "shallow"): (16, 14, 14),
    ("cnn_fashion", "medium"): (32, 7, 7),
    ("cnn_fashion", "deep"): (64, 7, 7),
    ("res18_fashion", "shallow"): (16, 14, 14),
    ("res18_fashion", "medium"): (32, 7, 7),
    ("res18_fashion", "deep"): (64, 4, 4),
}


@pytest.mark.parametrize("name", {name: None for name, _ in SHAPES})
def test_every_model_is_cut_where_it_should_be_and_trains_a_step(name):
    """With the activations' shapes of the reference, and what the paper compresses is not negative."""
    arch = split_models.ARCHS[name]
    model, images = arch.build(), torch.randn(2, *arch.image_shape)
    for depth in ("shallow", "deep", "medium"):
        head, tail = split.cut(model, arch.cuts[depth])
        shape = split.activation_shape(head, arch.image_shape)
        assert shape == SHAPES[name, depth] and head(images).min() == 0
    options = {"shape": shape, "up": "mask:sparsity=0.99,bits=2,signed=false", "down": "quantize:bits=4"}
    with split.SplitServer(tail, optimizer=arch.optimizer, scheduler=arch.scheduler, **options) as server:
        client = split.SplitClient(head, split.Link(f"127.0.0.1:{server.listen()}"), **options)
        optimizer = arch.optimizer(client.parameters())
        client(images, torch.tensor([1, 2])).backward()
        optimizer.step()
        client.end_epoch()
        assert client.step == 1 and client.traffic["up"] < 4 * 2 * torch.Size(shape).numel() / 10 + 200


def test_schedules_are_those_of_the_reference():
    rates = {}
    for name, epochs in (("vgg19_cifar10", 200), ("res18_cifar100", 200), ("res34_imagenet", 90)):
        arch = split_models.ARCHS[name]
        optimizer = arch.optimizer([torch.nn.Parameter(torch.zeros(1))])
        scheduler, rates[name] = arch.scheduler(optimizer), []
        assert arch.epochs == epochs and optimizer.param_groups[0]["momentum"] == 0.9
        for _ in range(epochs):
            rates[name].append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
    assert [round(rates["res18_cifar100"][e], 6) for e in (0, 59, 60, 120, 160)] == [0.1, 0.1, 0.02, 0.004, 0.0008]
    assert [round(rates["res34_imagenet"][e], 6) for e in (0, 29, 30, 60)] == [0.1, 0.1, 0.01, 0.001]
    assert rates["vgg19_cifar10"][100] == pytest.approx(0.05)


def start(*options, program=(EXAMPLE,)):
    command = [str(part) for part in (*quick_python(), *program, "--threads", 1, *options)]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=REPOSITORY, env=environment, start_new_session=True, **streams)


def finish(process, code=0):
    """The output of a started example; nothing of it is left behind."""
    try:
        output, _ = process.communicate(timeout=TIMEOUT_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        pytest.fail(f"hangs:\n{output[-4000:]}")
    assert process.returncode == code, output[-4000:]
    return output


def run(*options, code=0, **program):
    return finish(start(*options, **program), code)


SMALL = ("--limit-train", 640, "--limit-test", 200, "--epochs", 2)


def last_states(folder):
    paths = [sorted(folder.glob(f"{half}/*/step-*.pt"))[-1] for half in ("client", "server")]
    assert paths[0].name == paths[1].name, "both halves saved under one number"
    return [torch.load(path, weights_only=True) for path in paths]


@starts_processes
@needs_fashion
def test_the_demo_trains_reports_and_resumes_to_the_bit(tmp_path):
    whole = run(
        "--demo", *SMALL, "--checkpoint", tmp_path / "whole", "--save-every", 5, "--log-file", tmp_path / "a.jsonl"
    )
    assert "test accuracy      top-1" in whole and "socket, with TLS and HTTP/2" in whole
    records = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [10, 20]
    last = records[-1]
    assert last["test_top1"] > 0.2 and last["test_top5"] > last["test_top1"]
    assert last["peak_memory"] > 1 << 20 and 0 < last["compression_seconds"] < last["seconds"]
    assert last["up"] < last["socket_up"] < 1.1 * last["up"] and last["down"] < last["socket_down"] < 1.1 * last["down"]
    server = [json.loads(line) for line in (tmp_path / "a.server.jsonl").read_text().splitlines()]
    assert [record["step"] for record in server] == [10, 20]
    assert server[0]["train_top1"] == records[0]["train_top1"], "both sides saw the same"

    options = ("--demo", *SMALL, "--checkpoint", tmp_path / "cut", "--save-every", 5)
    killed = start(*options, "--log-file", tmp_path / "b.jsonl")
    due = time.monotonic() + TIMEOUT_SECONDS
    while time.monotonic() < due and len(list(tmp_path.glob("cut/server/*/step-000000005.pt"))) == 0:
        assert killed.poll() is None, killed.communicate()[0]
        time.sleep(0.01)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.communicate()
    plot = ("--plot", tmp_path / "p.png", "--compare", tmp_path / "a.jsonl")
    output = run(*options, "--resume", "--log-file", tmp_path / "b.jsonl", *plot)
    assert "from step 0," not in output and "+0.00 points of top-1 after 20 steps" in output
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    for expected, found in zip(last_states(tmp_path / "whole"), last_states(tmp_path / "cut"), strict=True):
        for state in (expected, found):
            state.get("objects", {}).pop("history", None)  # has times in it
        assert_same(expected, found)


@starts_processes
@needs_fashion
def test_two_roles_with_certificates_by_the_command_line_and_a_client_that_differs(tmp_path):
    """As on two machines; the second client has another compressor and is told so by both sides."""
    gcompress = [sys.executable, "-m", "gcompress.cli", "split"]
    made = subprocess.run([*gcompress, "certificates", "--out", tmp_path / "pki"], capture_output=True, text=True)
    assert "ca.pem, client.key, client.pem, server.key, server.pem" in made.stdout, made.stderr
    import socket

    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    common = ("--server_port", port, "--certificates", tmp_path / "pki", "--cutlayer", "deep", "--batch_size", 64)
    server = start("--role", "server", *common, *SMALL, "--log-file", tmp_path / "server.jsonl")
    try:
        client = ("--role", "client", *common, *SMALL, "--log-file", tmp_path / "client.jsonl", "--patience", 60)
        refused = run(*client, "--compressor", "qu", "--bit", 3, code=2)
        assert "up: the server has mask:sparsity=0.99,bits=2,signed=false, the client quantize:bits=3" in refused
        assert "Traceback" not in refused
        run(*client, "--compressor", "ms", "--ratio", 0.99, "--bit", 2, program=("-m", "gcompress.cli", "split"))
        assert "finished after step 20" in finish(server)
    finally:
        if server.poll() is None:
            os.killpg(server.pid, signal.SIGKILL)
            server.communicate()


@starts_processes
@pytest.mark.parametrize("arch", ["res34_imagenet"])
def test_an_image_folder_by_path(tmp_path, arch):
    from PIL import Image

    size = split_models.ARCHS[arch].image_shape[1]
    for part, count in (("train", 4), ("val", 3)):
        for kind in ("cats", "dogs"):
            (tmp_path / part / kind).mkdir(parents=True)
            for number in range(count):
                colour = (number * 60, 200 if kind == "cats" else 20, 90)
                Image.new("RGB", (size + 20, size + 9), colour).save(tmp_path / part / kind / f"{number}.png")
    options = (
        "--arch",
        arch,
        "--path",
        tmp_path,
        "--batch_size",
        4,
        "--epochs",
        1,
        "--log-file",
        tmp_path / "log.jsonl",
    )
    output = run("--demo", "--cutlayer", "deep", *options)
    assert "step      2" in output
    assert json.loads((tmp_path / "log.jsonl").read_text())["test_top5"] >= 0


@starts_processes
def test_a_wrong_path_is_one_sentence(tmp_path):
    output = run("--role", "client", "--arch", "res34_imagenet", "--path", tmp_path, code=2)
    assert output.splitlines() == [f"split_learning.py: client: error: --path {tmp_path}: has no folder train/"]
