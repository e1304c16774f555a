"""examples/train.py, started as a user starts it: real ranks of every engine on a small part of Fashion-MNIST."""

import gzip
import importlib.util
import json
import os
import pathlib
import re
import struct
import subprocess
import sys

import numpy as np
import pytest

from tests.checkpoint_files import TIMES, checkpoint_files
from tests.launching import MPIRUN, REPOSITORY, quick_python
from tests.nested import assert_same

EXAMPLES = REPOSITORY / "examples"
TIMEOUT_SECONDS = 300


def load_module(name):
    """Import a file of examples/ without putting that folder on the path of all tests."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    # dataclasses look their module up by name.
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


image_data = load_module("image_data")
training_report = load_module("training_report")

HOROVODRUN = pathlib.Path(sys.executable).with_name("horovodrun")


def reason_to_skip():
    if importlib.util.find_spec("horovod") is None or not HOROVODRUN.exists():
        return "Horovod is not installed: make setup"
    for module in ("torchvision", "tqdm", "matplotlib"):
        if importlib.util.find_spec(module) is None:
            return f"{module} is not installed: pip install -e .[examples]"
    if fashion_mnist() is None:
        return "Fashion-MNIST is not on this machine: make data"
    return None


def fashion_mnist():
    places = (REPOSITORY / "data/fashion-mnist", pathlib.Path("/usr/share/datasets/fashion-mnist"))
    return next((place for place in places if image_data.has_fashion_mnist(place)), None)


SKIP = reason_to_skip()
needs_horovod = [pytest.mark.horovod, pytest.mark.skipif(SKIP is not None, reason=SKIP or "")]


def train(*options, ranks=2):
    """Run the example on `ranks` ranks: 2 epochs of 16 steps, 1000 test images."""
    # fmt: off
    command = [
        *quick_python(), HOROVODRUN, "-np", ranks, *quick_python(), EXAMPLES / "train.py", "--data", fashion_mnist(),
        "--epochs", 2, "--limit-train", 1024, "--batch-size", 32, "--limit-test", 1000, *options,
    ]
    # fmt: on
    command = [str(part) for part in command]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipes = {"capture_output": True, "text": True}
    return subprocess.run(command, cwd=REPOSITORY, timeout=TIMEOUT_SECONDS, env=environment, **pipes)


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """One uninterrupted run with the default compressor by two phases, and everything it leaves behind."""
    folder = tmp_path_factory.mktemp("whole")
    result = train(
        *("--exchange", "twophase"),
        *("--checkpoint", folder / "checkpoint"),
        *("--log-file", folder / "log.jsonl"),
        *("--plot", folder / "plot.png"),
        *("--trace", folder / "traces" / "trace.json"),
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return folder, result


class TestRanks:
    pytestmark = [*needs_horovod, pytest.mark.ranks]

    def test_compressed_training_reports_what_it_sent(self, whole_run):
        folder, result = whole_run
        assert "handed to Horovod" in result.stdout
        assert result.stdout.count("twophase (mask:sparsity=0.99,bits=2): 3 tensors") == 1, "the plan, once"
        assert "[1]<stdout>" not in result.stdout, "only rank 0 prints"
        records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        assert [record.get("final", False) for record in records] == [False, False, True]
        final = records[-1]
        assert final["step"] == final["gradient_steps"] == 32
        assert 0 < final["wire_bytes"] < final["fp32_wire_bytes"] / 10
        assert final["fp16_bytes"] * 2 == final["fp32_bytes"]
        assert final["test_accuracy"] > 0.3, "ten classes: it has learnt something"
        assert (folder / "plot.png").read_bytes().startswith(b"\x89PNG")

    def test_a_trace_of_each_rank_and_a_table_show_where_time_goes(self, whole_run):
        folder, result = whole_run
        for rank in range(2):
            events = json.loads((folder / "traces" / f"trace.rank{rank}.json").read_text())
            steps = {event["args"]["step"] for event in events if event["ph"] == "X"}
            assert steps == set(range(20)), "as many as a trace has if nobody says another number"
        assert re.search(r"ms per step +encode +recode +wire +wait +decode +bytes", result.stdout)

    def test_resumed_training_is_the_uninterrupted_one_to_the_bit(self, whole_run, tmp_path):
        folder, _ = whole_run
        interrupted = train("--exchange", "twophase", "--checkpoint", tmp_path, "--max-steps", 20)
        assert interrupted.returncode == 0, interrupted.stderr
        assert checkpoint_files(tmp_path)["model.pt"]["step"] == 16
        resumed = train("--exchange", "twophase", "--checkpoint", tmp_path, "--resume")
        assert resumed.returncode == 0, resumed.stdout + resumed.stderr
        expected, found = checkpoint_files(folder / "checkpoint"), checkpoint_files(tmp_path)
        assert sorted(expected) == ["model.pt", "rank-0.pt", "rank-1.pt"]
        assert_same(expected, found, but=TIMES)

    def test_another_configuration_is_not_resumed(self, whole_run):
        folder, _ = whole_run
        options = ("--checkpoint", folder / "checkpoint", "--resume", "--compressor", "fp16")
        result = train(*options)
        assert_refused(result, "compressor mask:sparsity=0.99,bits=2, this run has compressor fp16")

    def test_a_bad_spec_is_one_sentence_from_rank_0(self):
        result = train("--compressor", "mask:sparsity=2")
        assert_refused(result, "sparsity")


LAUNCHERS = {  # all but MPI's in Python
    "Horovod": [HOROVODRUN, "-np", 2],
    "DDP": ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--no-python"],
    "MPI": [MPIRUN, "-np", 3],
    "BytePS": ["-m", "gcompress.plugins.byteps.launch", "-np", 2, "--servers", 1],
}
NEEDS = {"Horovod": "horovod", "DDP": "torch", "MPI": "mpi4py", "BytePS": "byteps"}
each_engine = pytest.mark.parametrize(
    "engine",
    [
        pytest.param("Horovod", marks=needs_horovod),
        "DDP",
        pytest.param("MPI", marks=pytest.mark.mpi),
        pytest.param("BytePS", marks=pytest.mark.byteps),
    ],
)


def train_on(engine, *options):
    """Run the example on two workers of an engine, which it finds out itself."""
    if fashion_mnist() is None:
        pytest.skip("Fashion-MNIST is not on this machine: make data")
    if importlib.util.find_spec(NEEDS[engine]) is None or LAUNCHERS[engine][0] is None:
        pytest.skip(f"{NEEDS[engine]} is not installed: make engines")
    launcher = LAUNCHERS[engine] if engine == "MPI" else [*quick_python(), *LAUNCHERS[engine]]
    # fmt: off
    command = [
        *launcher, *quick_python(), EXAMPLES / "train.py", "--data", fashion_mnist(), "--epochs", 1,
        "--limit-train", 512, "--batch-size", 32, "--limit-test", 100, "--compressor", "topk:sparsity=0.95", *options,
    ]
    # fmt: on
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        list(map(str, command)),
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
        env=environment,
    )


@pytest.mark.ranks
@each_engine
def test_mixed_precision_ends_with_the_same_weights(tmp_path, engine):
    """Whatever steps overflow, are skipped and repeated, to the bit."""
    logs = {}
    for name, options in (("plain", []), ("amp", ["--amp", "fp16", "--overflow-at", 1, 2, 5])):
        logs[name] = tmp_path / f"{name}.jsonl"
        result = train_on(engine, "--log-file", logs[name], *options)
        assert result.returncode == 0, result.stdout + result.stderr
        assert f"handed to {engine}" in result.stdout
    plain, scaled = (json.loads(log.read_text().splitlines()[-1]) for log in logs.values())
    assert plain["engine"] == engine and 0 < plain["wire_bytes"] < plain["fp32_wire_bytes"] / 5
    assert plain["step"] == scaled["step"] == 8 and plain["weights"] == scaled["weights"]
    assert scaled["sent_bytes"] > plain["sent_bytes"], "no step was repeated"


@pytest.mark.ranks
@each_engine
def test_an_option_that_an_engine_has_not_is_refused_in_one_sentence(engine):
    option = {"MPI": ["--exchange", "twophase"], "BytePS": ["--checkpoint", "x"]}.get(engine, ["--servers", "2"])
    result = train_on(engine, *option)
    said = [line for line in (result.stdout + result.stderr).splitlines() if "train.py: error: " in line]
    assert result.returncode != 0 and len(said) == 1, result.stdout + result.stderr
    assert said[0].endswith(f"train.py: error: {option[0]}: {engine} has no such thing")
    assert "Traceback" not in result.stderr or engine in ("Horovod", "DDP"), "whose launchers write one of their own"


def assert_refused(result, words):
    """The ranks ended with code 2; rank 0 said why in one line, and no rank showed a traceback."""
    assert result.returncode != 0
    # horovodrun writes a traceback of its own; the ranks' lines begin with their number. As soon as one rank
    # has ended it terminates the others, and a slow one's shell says so.
    said = [line for line in result.stderr.splitlines() if line.startswith("[") and ">:" in line]
    said = [line for line in said if not line.endswith(">:Terminated")]
    assert len(said) == 1 and said[0].startswith("[0]<stderr>:train.py: error: "), result.stderr
    assert words in said[0]
    # The launcher may end the second rank before that one's own exit is through.
    assert "exit with status code 2" in result.stdout


def idx(array, kind=0x08, magic=b"\0\0"):
    """The bytes of an IDX file."""
    shape = struct.pack(f">{array.ndim}I", *array.shape)
    return magic + bytes([kind, array.ndim]) + shape + array.astype(np.uint8).tobytes()


IMAGES = np.arange(2 * 28 * 28).reshape(2, 28, 28) % 251


def test_idx_files_are_read_plain_and_compressed(tmp_path):
    (tmp_path / "plain").write_bytes(idx(IMAGES))
    (tmp_path / "packed.gz").write_bytes(gzip.compress(idx(IMAGES)))
    for name in ("plain", "packed.gz"):
        assert np.array_equal(image_data.read_idx(tmp_path / name), IMAGES)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "not an IDX file"),
        (b"\x89PNG and more", "not an IDX file"),
        (idx(IMAGES, kind=0x0D), "type 0x08"),
        (idx(IMAGES)[:6], "ends within its header"),
        (idx(IMAGES)[:-1], "needs 1584 bytes, the file has 1583"),
        (idx(IMAGES) + b"x", "needs 1584 bytes, the file has 1585"),
    ],
)
def test_damaged_idx_files_are_refused(tmp_path, content, words):
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(image_data.DataError, match=words) as error:
        image_data.read_idx(path)
    assert str(path) in str(error.value)


def test_truncated_gzip_is_refused(tmp_path):
    path = tmp_path / "file.gz"
    path.write_bytes(gzip.compress(idx(IMAGES))[:-9])
    with pytest.raises(image_data.DataError, match="not a complete gzip file"):
        image_data.read_idx(path)


@pytest.mark.parametrize(
    ("images", "labels", "words"),
    [
        (IMAGES[:, :, 1:], [1, 2], r"expected images of shape \(n, 28, 28\), found \(2, 28, 27\)"),
        (IMAGES, [1, 2, 3], r"expected labels of shape \(2,\), found \(3,\)"),
        (IMAGES, [1, 10], "expected labels from 0 to 9, found 10"),
    ],
)
def test_fashion_mnist_of_another_shape_is_refused(tmp_path, images, labels, words):
    (tmp_path / "train-images-idx3-ubyte").write_bytes(idx(images))
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx(np.array(labels)))
    with pytest.raises(image_data.DataError, match=words):
        image_data.read_fashion_mnist(tmp_path, "train")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(image_data.DataError, match="neither train-images-idx3-ubyte nor"):
        image_data.read_fashion_mnist(tmp_path, "train")


def test_a_log_of_something_else_is_refused(tmp_path):
    path = tmp_path / "log.jsonl"
    for content in ("", "not json", "[1]", '{"step": 1}'):
        path.write_text(content)
        with pytest.raises(ValueError, match="not a log written by train.py"):
            training_report.read_log(path)
