"""Connections that are cut and errors that nobody meant, in rounds of several clients: no member loses its turn."""

import contextlib
import errno
import random
import threading
import time

import pytest

pytest.importorskip("grpc", reason="grpcio is not installed: pip install -e .[split]")


from gcompress import split
from gcompress.split import wire  # noqa: E402
from gcompress.split.wire import Frame, Kind  # noqa: E402
from tests.nested import same  # noqa: E402
from tests.split_damage import trials  # noqa: E402
from tests.split_tools import Proxy, Rogue, Trainer, Trap, model, serving, sgd, told  # noqa: E402


def join(session, sequence=1):
    return wire.encode(Frame(Kind.CONTROL, session, 0, sequence, body=wire.write_message({"do": "join"})))


class TestRounds:
    def start(self, port, name):
        return Trainer(port, split.cut(model(), 3)[:1], name=name)

    def test_a_turn_is_not_lost_with_the_connection_that_waits_for_it(self):
        """At the level of frames: Berta asks, is cut off, and asks again, while Anna works."""
        rng = random.Random(0)
        for _ in range(trials(8, 40)):
            rounds = split.Sequential(split.cut(model(), 3)[0], ["anna", "berta"], rounds=2, deadline=20)
            with serving(rounds=rounds) as (server, port):
                anna = self.start(port, "anna")
                anna.client._join()
                with Rogue(port, server.agreement) as berta:
                    session = berta.hello(client="berta").session
                    berta.send(join(session))
                    threading.Event().wait(rng.uniform(0, 0.05))
                for _ in range(rng.randrange(3)):
                    with Rogue(port, server.agreement) as berta:
                        berta.hello(client="berta", session=session.hex())
                        berta.send(join(session))
                        threading.Event().wait(rng.uniform(0, 0.05))
                with Rogue(port, server.agreement) as berta:
                    assert berta.hello(client="berta", session=session.hex()).session == session
                    berta.send(join(session))
                    anna.client._hand_in(0)
                    started, sequence = time.monotonic(), 1
                    while (answer := berta.receive()).kind == Kind.ANSWER:
                        sequence += 1
                        berta.send(join(session, sequence))
                    assert answer.kind == Kind.WEIGHTS and answer.step == 1
                    assert time.monotonic() - started < 6
                    answer = berta.ask(Kind.HAND_IN, 0, sequence + 1, body=answer.body)
                    assert answer.kind == Kind.ANSWER
            assert rounds.history == [(0, ["anna"], []), (1, ["berta"], [])]

    @pytest.mark.parametrize("kind", [split.Sequential, split.SplitFed])
    def test_connections_cut_again_and_again_cost_no_member_its_round(self, kind):
        steps = 40  # long enough that those who wait for their turn are cut off several times
        names, counted, errors, over = ("anna", "berta", "carla"), {}, [], threading.Event()
        rounds = kind(split.cut(model(), 3)[0], names, rounds=trials(3, 12), deadline=30)
        heads = {name: split.cut(model(), 3)[:1] for name in names}
        with serving(rounds=rounds) as (server, port), contextlib.ExitStack() as stack:
            proxies = {name: stack.enter_context(Proxy(port)) for name in names}

            def work(name):
                try:
                    trainer = Trainer(proxies[name].port, heads[name], name=name)
                    train = lambda number: [trainer.step(step) for step in range(steps)]  # noqa: E731
                    counted[name] = trainer.client.run_rounds(train)
                    trainer.client.finish()
                except Exception as error:
                    errors.append((name, error))

            threads = [threading.Thread(target=work, args=(name,), daemon=True) for name in names]
            for thread in threads:
                thread.start()
            while any(thread.is_alive() for thread in threads):
                over.wait(0.15)
                for proxy in proxies.values():
                    proxy.cut()
        assert not errors and sum(map(len, counted.values())) == rounds.rounds * (1 if kind is split.Sequential else 3)
        assert not any(missing for _, _, missing in rounds.history)

    @pytest.mark.parametrize("where", ["save", "join"])
    @pytest.mark.parametrize("kind", [split.Sequential, split.SplitFed])
    def test_a_round_that_cannot_be_ended_or_begun_is_not_and_may_be_tried_again(self, tmp_path, kind, where):
        finals = []
        for fails in (False, True):
            rounds = kind(split.cut(model(), 3)[0], ["anna"], rounds=2, deadline=30)
            folder = tmp_path / f"{fails}"
            with serving(rounds=rounds, checkpoints=folder) as (server, port):
                trainer = self.start(port, "anna")
                train = lambda number: trainer.step(number)  # noqa: B023, E731
                if fails:
                    owner, name = (server._checkpoints, "save") if where == "save" else (rounds, "_enter")
                    trap = Trap(getattr(owner, name) if where == "join" else lambda *arguments: None)
                    trap.error = OSError(errno.ENOSPC, "No space left on device")
                    whole = getattr(owner, name)
                    setattr(owner, name, trap)
                    with told("No space left on device"):
                        trainer.client.run_rounds(train)
                    assert trap.calls == 1 and rounds.number == 0 and rounds.history == []
                    setattr(owner, name, whole)
                    trainer.optimizer = sgd(trainer.client.parameters())
                    if kind is split.SplitFed:  # momentum stays with its client
                        server._slots["anna"].tail.optimizer.state.clear()
                started = time.monotonic()
                assert trainer.client.run_rounds(train) == [0, 1]
                assert time.monotonic() - started < 5
            finals.append({**rounds.head, **rounds.tail.model.state_dict()})
            assert split.Checkpoints(folder).steps("0" * 32) == [1, 2]
        assert same(*finals)
