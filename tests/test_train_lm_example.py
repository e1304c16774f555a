"""examples/train_lm.py: its text, its model, its options, and runs on real ranks as a user starts them."""

import importlib.util
import json
import types

import numpy as np
import pytest
import torch

import language_data
import language_model
import language_options
import language_report
from command_line import Refusal
from tests.checkpoint_files import TIMES, checkpoint_files
from tests.launching import MPIRUN, launch_ddp, launch_horovod, launch_mpi
from tests.nested import assert_same

CONTEXT = 16
SMALL = language_model.Shape(layers=1, width=32, heads=2, context=CONTEXT)
# fmt: off
RUN = (
    "examples/train_lm.py", "--layers", 1, "--width", 32, "--heads", 2, "--context", CONTEXT, "--batch", 4,
    "--data", "README.md", "--steps", 16, "--validate-every", 4, "--validate-sequences", 8,
)
# fmt: on
# An exchange is under way at each checkpoint: what a rank knows of it must be in there.
MODES = {
    "outer": ("--every", 4, "--fragments", 2, "--delay", 1),
    "gradients": ("--sync", "gradients", "--compressor", "topk:sparsity=0.9"),
}
needs_horovod = pytest.mark.skipif(
    importlib.util.find_spec("horovod") is None, reason="Horovod is not installed: make setup"
)
needs_mpi = pytest.mark.skipif(
    importlib.util.find_spec("mpi4py") is None or MPIRUN is None, reason="MPI is not installed: make engines"
)


class TestText:
    def test_the_standard_library_is_the_same_each_time_and_without_its_tests(self):
        files = language_data.standard_library()
        names = [name for name, _ in files]
        assert names == sorted(names) and "argparse.py" in names and len(names) > 300
        assert not [name for name in names if set(name.split("/")[:-1]) & language_data.LEFT_OUT]
        text = language_data.load(None, CONTEXT)
        assert text.checksum() == language_data.load(None, CONTEXT).checksum()
        assert 0.01 < len(text.validation) / len(text.train) < 0.2 and len(text.train) > 10**6

    def test_no_file_is_in_both_parts_and_a_new_one_moves_no_other(self, tmp_path):
        for number in range(100):
            (tmp_path / f"file{number}.py").write_text(f"<{number}>")
        before = language_data.split_by_file(language_data.standard_library(tmp_path), 10**6)
        (tmp_path / "aaa.py").write_text("<new>")
        after = language_data.split_by_file(language_data.standard_library(tmp_path), 10**6)
        words = [set(bytes(part).decode().strip("<>").split("><")) for part in (*before, *after)]
        assert words[1] and not words[0] & words[1] and len(words[0] | words[1]) == 100
        assert words[0] <= words[2] and words[1] <= words[3]

    def test_no_more_than_asked_for_is_read(self, tmp_path):
        (tmp_path / "book").write_bytes(bytes(range(200)) * 10)
        assert [len(part) for part in language_data.load(tmp_path / "book", CONTEXT, 1000)] == [950, 50]
        files = language_data.standard_library()
        assert sum(map(len, language_data.split_by_file(files, 100_000))) == 100_000

    def test_a_text_that_is_too_short_is_refused_by_name(self, tmp_path):
        (tmp_path / "note").write_bytes(b"x" * 100)
        with pytest.raises(ValueError, match="note: 5 bytes for validation, expected more than --context 16"):
            language_data.load(tmp_path / "note", CONTEXT)
        with pytest.raises(OSError, match="absent"):
            language_data.load(tmp_path / "absent", CONTEXT)

    def test_a_batch_is_a_function_of_seed_rank_and_step(self):
        text = language_data.load("README.md", CONTEXT)
        batches = {
            place: language_data.training_batch(text, CONTEXT, 4, *place) for place in np.ndindex(2, 2, 2)
        }  # (seed, rank, step)
        for place, batch in batches.items():
            assert batch.shape == (4, CONTEXT + 1) and batch.dtype == torch.int64
            assert torch.equal(batch, language_data.training_batch(text, CONTEXT, 4, *place))
            assert bytes(batch[0].tolist()) in bytes(text.train)
        assert len({tuple(batch.flatten().tolist()) for batch in batches.values()}) == 8

    def test_all_ranks_together_validate_with_one_set(self):
        text = language_data.load("README.md", CONTEXT)
        whole = language_data.validation_share(text, CONTEXT, 8, 0, 1)
        shares = [language_data.validation_share(text, CONTEXT, 8, rank, 3) for rank in range(3)]
        assert sorted(torch.cat(shares).tolist()) == sorted(whole.tolist())
        assert bytes(whole[-1].tolist()) == bytes(text.validation[-CONTEXT - 1 :]), "to the end of the text"


class TestModel:
    @pytest.mark.parametrize(("size", "millions"), {"tiny": 0.7, "small": 2.9, "medium": 11, "large": 51}.items())
    def test_sizes_are_as_the_help_says(self, size, millions):
        with torch.device("meta"):
            model = language_model.ByteTransformer(language_model.SIZES[size])
        assert language_model.numel(model) / 1e6 == pytest.approx(millions, rel=0.06)

    def test_no_prediction_sees_what_follows(self):
        torch.manual_seed(0)
        model = language_model.ByteTransformer(SMALL)
        tokens = torch.randint(256, (2, CONTEXT))
        other = tokens.clone()
        other[:, 9:] = (other[:, 9:] + 1) % 256
        scores, changed = model(tokens), model(other)
        assert torch.allclose(scores[:, :9], changed[:, :9]) and not torch.allclose(scores[:, 9], changed[:, 9])

    def test_an_untrained_model_knows_nothing(self):
        torch.manual_seed(0)
        loss = language_model.loss_of(language_model.ByteTransformer(SMALL), torch.randint(256, (64, CONTEXT + 1)))
        assert loss.item() == pytest.approx(np.log(256), abs=0.1)


def parsed(monkeypatch, *options, lacks=()):
    engine = types.SimpleNamespace(name="Engine", lacks=lacks, rank=0, size=2, own_compression={"fp16": "its own"}.get)
    monkeypatch.setattr("sys.argv", ["train_lm.py", *map(str, options)])
    return language_options.parse_arguments(engine, "")


REFUSED = {
    "--steps 0": "--steps: expected a number from 1 up, got '0'",
    "--every 15 --sync gradients": "--every: --sync gradients has no such thing",
    "--width 30": "--width 30: expected a multiple of --heads 4",
    "--every 4 --fragments 5": "--fragments 5: expected at most --every 4",
    "--every 4 --fragments 2 --delay 3": "--delay 3: expected at most 2",
    "--outer-momentum 1": "--outer-momentum 1: expected less than 1",
    "--outer-learning-rate 0": "--outer-learning-rate 0: expected more than 0",
    "--compressor topk:sparsity=2": "sparsity",
    "--resume": "--resume needs --checkpoint",
    "--compare log": "--compare needs --plot",
    "--servers 2": "--servers: Engine has no such thing",
    "--staleness 2": "unrecognized arguments: --staleness",
}


@pytest.mark.parametrize("options", REFUSED)
def test_what_cannot_be_done_is_refused_in_one_sentence(monkeypatch, options):
    with pytest.raises(ValueError) as refused:
        parsed(monkeypatch, *options.split(), lacks=("servers",))
    assert REFUSED[options] in str(refused.value)


def test_outer_steps_are_refused_where_an_engine_has_none(monkeypatch):
    assert parsed(monkeypatch, "--sync", "gradients", lacks=("outer",)).sync == "gradients"
    with pytest.raises(Refusal, match="--sync outer: Engine has no such thing"):
        parsed(monkeypatch, lacks=("outer",))


def test_validations_come_right_after_exchanges(monkeypatch):
    for options, period in (
        (("--steps", 300), 30),
        (("--steps", 310), 45),
        (("--validate-every", 20), 30),
        (("--validate-every", 20, "--sync", "gradients"), 20),
        (("--steps", 5, "--every", 1), 1),
    ):
        assert parsed(monkeypatch, *options).validate_every == period, options


def test_each_way_has_its_compressor_in_its_one_form(monkeypatch):
    for options, compressor in (
        ((), "chain:(topk:sparsity=0.984375,chunk=4096),(sign); mean=senders"),
        (("--compressor", "none"), "none"),
        (("--compressor", "fp16"), "fp16:bucket=1024"),  # outer steps know nothing of an engine's own
        (("--sync", "gradients"), "mask:sparsity=0.99,bits=2"),
        (("--sync", "gradients", "--compressor", "fp16"), "fp16"),
    ):
        assert parsed(monkeypatch, *options).compressor == compressor, options


def test_a_size_is_changed_by_the_options_of_its_parts(monkeypatch):
    arguments = parsed(monkeypatch, "--size", "small", "--layers", 2)
    assert (arguments.layers, arguments.width, arguments.heads, arguments.context) == (2, 192, 6, 128)


def test_a_log_of_something_else_is_refused(tmp_path):
    (tmp_path / "log").write_text(json.dumps({"step": 1, "sent_bytes": 1, "test_accuracy": 1, "compressor": "none"}))
    with pytest.raises(ValueError, match="not a log written by train_lm.py"):
        language_report.read_log(tmp_path / "log")


def finished(launched):
    code, output = launched
    assert code == 0, output
    return output


@pytest.fixture(scope="module", params=MODES)
def whole_run(request, tmp_path_factory):
    """An uninterrupted run of each mode: its name, the folder of everything it leaves behind, and its output."""
    mode, folder = request.param, tmp_path_factory.mktemp(request.param)
    other = {"title": "another run", "step": 16, "seconds": 1.0, "wire_bytes": 10**6, "validation_loss": 5.0}
    (folder / "other").write_text(json.dumps(other))
    files = ("--checkpoint", folder, "--log-file", folder / "log", "--plot", folder / "plot.png")
    return mode, folder, finished(launch_horovod(2, *RUN, *MODES[mode], *files, "--compare", folder / "other"))


@pytest.mark.ranks
@pytest.mark.horovod
@needs_horovod
class TestRanks:
    def test_a_run_learns_and_says_what_it_sent(self, whole_run):
        mode, folder, output = whole_run
        records = [json.loads(line) for line in (folder / "log").read_text().splitlines()]
        assert [record["step"] for record in records] == [4, 8, 12, 16, 16] and records[-1]["final"]
        final = records[-1]
        assert final["validation_loss"] < records[0]["validation_loss"] < np.log(256)
        dense = 4 * final["numel"] * final["step"]  # on two ranks an all-reduce sends a tensor once
        assert 0 < final["wire_bytes"] < dense / (5 if mode == "gradients" else 10)
        assert final["rounds"] == (16 if mode == "gradients" else 9), "both parts 4 times, and what was left of one"
        assert final["tokens_per_second"] > 0 and final["train_loss"] < np.log(256)
        fewer = dense / final["wire_bytes"]
        assert f"{fewer:.1f} times fewer than a float32 all-reduce in each step" in output
        assert output.count(f"validation loss  {final['validation_loss']:.4f}") == 1, "from one rank"
        assert (folder / "plot.png").read_bytes().startswith(b"\x89PNG")

    def test_after_the_last_exchange_all_ranks_have_the_same_weights(self, whole_run):
        files = checkpoint_files(whole_run[1])
        assert sorted(files) == ["rank-0.pt", "rank-1.pt", "run.pt"]
        assert_same(files["rank-0.pt"]["model"], files["rank-1.pt"]["model"])

    def test_resumed_training_is_the_uninterrupted_one_to_the_bit(self, whole_run, tmp_path):
        mode, folder, _ = whole_run
        options = (*RUN, *MODES[mode], "--checkpoint", tmp_path)
        finished(launch_horovod(2, *options, "--max-steps", 10))
        files = checkpoint_files(tmp_path)
        assert files["run.pt"]["step"] == 8
        if mode == "outer":
            assert files["run.pt"]["curve"][-1]["rounds"] == 3, "of 4 that had begun: one is under way"
        finished(launch_horovod(2, *options, "--resume"))
        assert_same(checkpoint_files(folder), checkpoint_files(tmp_path), but=TIMES)

    @pytest.mark.parametrize("whole_run", ["outer"], indirect=True)  # what is compared does not depend on the mode
    def test_another_run_is_not_resumed(self, whole_run):
        mode, folder, _ = whole_run
        options = ("--checkpoint", folder, "--resume", "--seed", 2)
        code, output = launch_horovod(2, *RUN, *MODES[mode], *options)
        said = [line for line in output.splitlines() if "train_lm.py: error: " in line]
        assert code != 0 and len(said) == 1 and "exit with status code 2" in output, output
        assert said[0].endswith("was written with seed 1, this run has seed 2")


LAUNCHED = {"DDP": (launch_ddp, 2), "MPI": (launch_mpi, 3)}


@pytest.mark.ranks
@pytest.mark.parametrize("engine", ["DDP", pytest.param("MPI", marks=[pytest.mark.mpi, needs_mpi])])
def test_outer_steps_on_other_engines(engine, tmp_path):
    launch, ranks = LAUNCHED[engine]
    output = finished(launch(ranks, *RUN, "--every", 4, "--log-file", tmp_path / "log"))
    final = json.loads((tmp_path / "log").read_text().splitlines()[-1])
    assert final["engine"] == engine and final["rounds"] == 4 and final["step"] == 16
    assert f"handed to {engine}" in output
