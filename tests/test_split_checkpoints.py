"""Checkpoints of split learning that are damaged, do not fit, or cannot be written."""

import errno
import os
import random
import resource

import pytest
import torch

pytest.importorskip("grpc", reason="grpcio is not installed: pip install -e .[split]")

from gcompress import ConfigError, split  # noqa: E402
from tests.nested import same  # noqa: E402
from tests.split_damage import damaged, trials  # noqa: E402
from tests.split_tools import WIDTH, Trainer, model, serving  # noqa: E402

RUN, OTHER_RUN = "a" * 32, "b" * 32


def state(step):
    return {"head": {"weight": torch.full((30,), float(step))}, "step": step, "names": ["x", "y"]}


def damage(path):
    """Flip a bit among the numbers: torch alone would load it."""
    data = bytearray(path.read_bytes())
    data[data.index(torch.full((4,), float(int(path.stem[5:]))).numpy().tobytes())] ^= 1
    path.write_bytes(data)


class TestDamage:
    def test_no_damaged_file_is_loaded(self, tmp_path):
        checkpoints = split.Checkpoints(tmp_path)
        checkpoints.save(RUN, 7, state(7))
        (path,) = tmp_path.glob("*/step-*.pt")
        whole, rng = path.read_bytes(), random.Random(0)
        assert torch.load(path, weights_only=True)["step"] == 7, "torch reads what is written"
        for _ in range(trials(400, 20_000)):
            path.write_bytes(damaged(rng, whole))
            with pytest.raises(ConfigError, match=r"step-000000007\.pt: "):
                checkpoints.load(RUN, 7)
            assert checkpoints.steps(RUN) == []

    def test_an_older_one_takes_the_place_of_a_damaged_one(self, tmp_path, caplog):
        checkpoints = split.Checkpoints(tmp_path)
        for step in (3, 6):
            checkpoints.save(RUN, step, state(step))
        damage(tmp_path / RUN / "step-000000006.pt")
        assert split.Checkpoints(tmp_path).steps(RUN) == [3]
        assert "step-000000006.pt is damaged" in caplog.text
        checkpoints.save(RUN, 9, state(9))
        checkpoints.prune(RUN)
        assert checkpoints.steps(RUN) == [3, 9], "two that are whole are kept"

    @pytest.mark.parametrize("half", ["client", "server"])
    def test_both_halves_go_back_to_the_last_step_that_is_whole_at_both(self, tmp_path, half):
        def train(first, last, trainer):
            for number in range(first, last):
                trainer.step(number)
                if trainer.client.step % 2 == 0:
                    trainer.client.save()

        def start(port):
            trainer = Trainer(port)
            trainer.client.keep(tmp_path / "client", optimizer=trainer.optimizer)
            return trainer, trainer.client.connect()

        with serving(checkpoints=tmp_path / "server") as (server, port):
            trainer, _ = start(port)
            train(0, 6, trainer)
            expected = {**trainer.client.head.state_dict(), **server.tail.model.state_dict()}
        (newest,) = (tmp_path / half).glob("*/step-000000006.pt")
        newest.write_bytes(newest.read_bytes()[:-100])
        with serving(checkpoints=tmp_path / "server") as (server, port):
            trainer, step = start(port)
            assert step == 4
            train(4, 6, trainer)
            found = {**trainer.client.head.state_dict(), **server.tail.model.state_dict()}
        assert same(found, expected)

    def test_a_run_of_which_nothing_is_whole_is_not_taken_for_a_new_one(self, tmp_path):
        checkpoints = split.Checkpoints(tmp_path)
        checkpoints.save(OTHER_RUN, 2, state(2))
        checkpoints.save(RUN, 2, state(2))
        damage(tmp_path / RUN / "step-000000002.pt")
        client = split.SplitClient(model()[:3], split.Link("127.0.0.1:1"), shape=(WIDTH,))
        with pytest.raises(ConfigError, match=f"no file in .*{RUN} is whole"):
            client.keep(tmp_path)
        client.keep(tmp_path, resume=False)

    def test_rounds_go_on_from_the_last_that_is_whole_and_never_from_none(self, tmp_path):
        tail, rounds = split.cut(model(), 3)[1], split.SplitFed(split.cut(model(), 3)[0], ["anna"], rounds=9)
        checkpoints, saved = split.Checkpoints(tmp_path), {"head": rounds.head}
        with serving(tail) as (server, _):
            saved["tail"] = server.tail.state_dict()
        for number in (3, 4):
            checkpoints.save("0" * 32, number, saved)
        paths = sorted(tmp_path.glob("*/step-*.pt"))
        paths[1].write_bytes(paths[1].read_bytes()[:-1])
        with serving(tail, rounds=rounds, checkpoints=tmp_path):
            assert rounds.number == 3
        paths[0].write_bytes(b"")
        with pytest.raises(ConfigError, match="no file in .* is whole"), serving(rounds=rounds, checkpoints=tmp_path):
            pass


class TestOrder:
    def test_the_run_saved_last_goes_on_even_if_the_clock_was_set_back(self, tmp_path):
        checkpoints = split.Checkpoints(tmp_path)
        checkpoints.save(RUN, 0, state(0))
        checkpoints.save(OTHER_RUN, 0, state(0))
        for path in (tmp_path / OTHER_RUN, tmp_path / OTHER_RUN / "step-000000000.pt"):
            os.utime(path, (1000, 1000))
        assert checkpoints.latest_run() == OTHER_RUN == split.Checkpoints(tmp_path).latest_run()
        checkpoints.save(RUN, 1, state(1))
        assert checkpoints.latest_run() == RUN

    def test_without_a_folder_of_that_name_the_youngest_goes_on(self, tmp_path):
        checkpoints = split.Checkpoints(tmp_path)
        assert checkpoints.latest_run() is None
        checkpoints.save(RUN, 0, state(0))
        for name in (OTHER_RUN, "../x", ""):
            (tmp_path / "latest").write_text(name)
            assert checkpoints.latest_run() == RUN


class TestWriting:
    def check_nothing_happened(self, folder, checkpoints):
        assert checkpoints.steps(RUN) == [3]
        assert [path.name for path in (folder / RUN).iterdir()] == ["step-000000003.pt"]

    def test_a_full_disk_leaves_what_was_there(self, tmp_path, monkeypatch):
        checkpoints = split.Checkpoints(tmp_path)
        checkpoints.save(RUN, 3, state(3))

        def full(descriptor):
            raise OSError(errno.ENOSPC, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            with pytest.raises(OSError, match="No space left"):
                checkpoints.save(RUN, 4, state(4))
        self.check_nothing_happened(tmp_path, checkpoints)

    def test_a_limit_of_the_files_size_does_too(self, tmp_path):
        checkpoints = split.Checkpoints(tmp_path)
        checkpoints.save(RUN, 3, state(3))
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
            with pytest.raises(OSError, match="File too large"):
                checkpoints.save(RUN, 4, {"weight": torch.zeros(20_000)})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        self.check_nothing_happened(tmp_path, checkpoints)
