"""Split learning: two halves train as one model, whatever is between them."""

import copy
import math
import random
import threading

import pytest
import torch
from torch import nn

pytest.importorskip("grpc", reason="grpcio is not installed: pip install -e .[split]")

from gcompress import ConfigError, LinkError, RefusedError, from_spec, split  # noqa: E402
from gcompress.split.codec import DeltaMemory  # noqa: E402
from gcompress.split.wire import HEADER_BYTES, Kind  # noqa: E402
from tests.nested import same  # noqa: E402
from tests.split_tools import CLASSES, WIDTH, Proxy, Trainer, batch, model, serving, sgd  # noqa: E402

COMPRESSED = {"up": "mask:sparsity=0.9,bits=2,signed=false", "down": "quantize:bits=4"}


def train_whole(steps, sizes=lambda number: 16):
    """The uncut model's state after the steps."""
    whole = model()
    optimizer = sgd(whole.parameters())
    for number in range(steps):
        inputs, labels = batch(number, sizes(number))
        optimizer.zero_grad()
        nn.functional.cross_entropy(whole(inputs), labels).backward()
        optimizer.step()
    return whole


def joined(*parts):
    return {name: tensor for part in parts for name, tensor in part.state_dict().items()}


class TestTraining:
    def test_uncompressed_it_is_training_the_whole_model_to_the_bit(self):
        """With a last batch that is smaller."""

        def sizes(number):
            return 16 if number < 29 else 5

        with serving() as (server, port):
            trainer = Trainer(port)
            for number in range(30):
                trainer.step(number, sizes(number))
            assert trainer.client.step == 30
            assert same(joined(trainer.client.head, server.tail.model), train_whole(30, sizes).state_dict())

    def test_u_shaped_the_labels_stay_and_the_bits_are_the_same(self):
        parts = split.cut(model(), 3, 6)
        with serving(parts[1], labels=None) as (server, port):
            trainer = Trainer(port, parts)
            for number in range(20):
                trainer.step(number)
            state = joined(trainer.client.head, server.tail.model, trainer.client.end)
            whole = train_whole(20)
            assert same(state, whole.state_dict())
            trainer.client.eval(), whole.eval()
            inputs, _ = batch(99)
            with torch.no_grad():
                assert torch.equal(trainer.client(inputs), whole(inputs))

    def test_the_users_loop_may_weigh_the_loss_and_freeze_the_head(self):
        with serving() as (server, port):
            trainer = Trainer(port)
            inputs, labels = batch(0)
            (3 * trainer.client(inputs, labels)).backward()
            tripled = [parameter.grad.clone() for parameter in trainer.client.parameters()]
            for parameter in trainer.client.head.parameters():
                parameter.requires_grad_(False)
            before = copy.deepcopy(trainer.client.head.state_dict())
            trainer.client.head.eval()
            trainer.client(inputs, labels).backward()
            assert same(before, trainer.client.head.state_dict())
        whole = model()
        nn.functional.cross_entropy(whole(inputs), labels).backward()
        for one, other in zip(tripled, whole[:3].parameters(), strict=True):
            assert torch.allclose(one, 3 * other.grad, atol=1e-6)

    def test_compressed_it_learns_and_sends_exactly_the_compressors_bytes(self):
        with serving(**COMPRESSED) as (server, port):
            trainer = Trainer(port, **COMPRESSED)
            losses = [trainer.step(number) for number in range(150)]
            assert sum(losses[-10:]) < 0.5 * sum(losses[:10])
            numel = 16 * WIDTH
            up = HEADER_BYTES + 8 * 16 + from_spec(COMPRESSED["up"]).nbytes(numel)
            down = HEADER_BYTES + 32 + from_spec(COMPRESSED["down"]).nbytes(numel)
            assert trainer.client.traffic["up"] == 150 * up
            assert trainer.client.traffic["down"] == 150 * down
            assert trainer.client.compression_seconds > 0 and trainer.client.peak_memory() > 1 << 20
            assert server.frames.bytes == trainer.link.frames.bytes, "both sides count the same"

    def test_activations_larger_than_grpcs_cap_on_a_message_travel_and_tcp_carries_little_more(self):
        shape = (64, 40, 40)
        parts = [nn.Unflatten(1, shape), nn.Sequential(nn.Flatten(), nn.Linear(math.prod(shape), CLASSES))]
        with serving(parts[1], shape=shape) as (server, port):
            trainer = Trainer(port, [nn.Sequential(nn.Linear(12, math.prod(shape)), parts[0])], shape=shape)
            for number in range(2):
                trainer.step(number)
            traffic, sockets = trainer.client.traffic, trainer.link.sockets.read()
            assert traffic["up"] > 2 * 6 << 20
            if sockets is not None:
                for frames, carried in zip((traffic["up"], traffic["down"]), sockets, strict=True):
                    assert frames < carried < 1.01 * frames + 2000
                assert server.socket_bytes()[1] >= traffic["up"]

    def test_an_evaluation_changes_nothing_and_counts_top_1_and_top_5(self):
        with serving() as (server, port):
            trainer = Trainer(port)
            trainer.step(0)
            before = copy.deepcopy(joined(trainer.client.head, server.tail.model))
            inputs, labels = batch(5, 40)
            stats = trainer.client.evaluate(inputs, labels)
            assert same(before, joined(trainer.client.head, server.tail.model))
            assert trainer.client.training and trainer.client.step == 1
            trainer.client.eval(), server.tail.model.eval()
            with torch.no_grad():
                outputs = server.tail.model(trainer.client.head(inputs))
            assert stats.samples == 40 and stats.top5 == 40, "of five classes the label is among five"
            assert stats.top1 == (outputs.argmax(1) == labels).sum()
            assert stats.loss == pytest.approx(nn.functional.cross_entropy(outputs, labels).item())

    def test_halves_without_parameters_train_the_other(self):
        with serving(nn.Identity(), shape=(CLASSES,)) as (_, port):
            trainer = Trainer(port, [model()], shape=(CLASSES,))
            assert trainer.step(0) > trainer.step(0)
        with serving(model(), shape=(12,)) as (server, port):
            client = split.SplitClient(nn.Identity(), split.Link(f"127.0.0.1:{port}"), shape=(12,))
            losses = []
            for _ in range(5):
                loss = client(*batch(0))
                loss.backward()
                losses.append(loss.item())
            assert losses[-1] < losses[0]

    def test_wrong_batches_are_named(self):
        with serving(max_batch=20) as (_, port):
            client = Trainer(port, max_batch=20).client
            inputs, labels = batch(0, 21)
            with pytest.raises(ConfigError, match="at most 20 samples"):
                client(inputs, labels)
            with pytest.raises(ConfigError, match="labels: got None"):
                client(inputs[:5])
            with pytest.raises(ConfigError, match=r"labels: got \(4,\)"):
                client(inputs[:5], labels[:4])


class TestDelta:
    OPTIONS = {"up": "quantize:bits=2", "down": "quantize:bits=6", "delta_samples": 40, "max_batch": 20}

    def test_changes_are_coded_better_than_activations(self):
        """AQ-SGD: with the weights at rest, what the server knows comes closer with every visit."""
        agreement = split.Agreement(shape=(300,), **{**self.OPTIONS, "delta_first": "quantize:bits=2"})
        sender = split.codec.ActivationCodec(agreement)
        receiver = split.codec.ActivationCodec(agreement)
        activation, labels = torch.randn(16, 300), torch.arange(16)
        errors = []
        for step in range(5):
            body, samples = sender.encode(activation, labels, list(range(16)), step, training=True)
            decoded, _ = receiver.decode(body, samples, training=True)
            errors.append((decoded - activation).norm().item())
        assert all(later < 0.7 * earlier for earlier, later in zip(errors, errors[1:], strict=False)), errors

    def test_both_sides_forget_alike_in_bounded_memory(self):
        with serving(**self.OPTIONS) as (server, port):
            trainer = Trainer(port, **self.OPTIONS)
            rng = random.Random(0)
            for number in range(60):
                trainer.step(number, ids=rng.sample(range(100), 16))
            ours = trainer.client._activations.memory
            theirs = server._slots["client"].activations.memory
            assert list(ours._rows.items()) == list(theirs._rows.items()) and len(ours._rows) == 40
            assert torch.equal(ours._values, theirs._values) and ours._values.shape == (40, WIDTH)

    def test_the_least_recently_used_sample_is_forgotten(self):
        memory = DeltaMemory(3, 2)
        for sample in (1, 2, 3, 1, 4):
            memory.remember([sample], torch.full((1, 2), float(sample)))
        assert memory.known([1, 2, 3, 4]).tolist() == [True, False, True, True]
        assert torch.equal(memory.recall([4, 1]), torch.tensor([[4.0, 4.0], [1.0, 1.0]]))

    def test_what_it_cannot_do_is_refused(self):
        with pytest.raises(ConfigError, match="changes of activations have signs"):
            split.Agreement(up="mask:sparsity=0.9,signed=false", down="none", shape=(4,), delta_samples=512)
        with pytest.raises(ConfigError, match="at least max_batch=512"):
            split.Agreement(up="none", down="none", shape=(4,), delta_samples=100)
        with serving(**self.OPTIONS) as (_, port):
            trainer = Trainer(port, **self.OPTIONS)
            for ids in (None, [1] * 16, [1, 2]):
                with pytest.raises(ConfigError, match="a different integer for each of the 16 samples"):
                    trainer.step(0, ids=ids)
            for odd in ("a", 0.5, 2**63):
                with pytest.raises(ConfigError, match="ids: got .*, expected integers of 64 bits"):
                    trainer.step(0, ids=[odd, *range(15)])


class TestConnection:
    @pytest.mark.parametrize("u_shaped", [False, True])
    def test_connections_cut_at_random_bytes_lose_and_repeat_nothing(self, u_shaped):
        parts = split.cut(model(), *((3, 6) if u_shaped else (3,)))
        options = {"labels": None} if u_shaped else {}
        rng, cuts = random.Random(1), 0
        with serving(parts[1], **options) as (server, port), Proxy(port) as proxy:
            trainer = Trainer(proxy.port, parts)
            for number in range(60):
                if proxy.cut_after is None:
                    proxy.cut_after = proxy.carried + rng.randrange(1, 12000)
                    cuts += 1
                trainer.step(number)
            assert cuts > 20
            state = joined(trainer.client.head, server.tail.model, *([trainer.client.end] if u_shaped else []))
            assert same(state, train_whole(60).state_dict())

    def test_a_server_that_is_gone_is_given_up_after_the_links_patience(self):
        with serving() as (server, port):
            trainer = Trainer(port, patience=0.5)
            trainer.step(0)
            server.stop(grace=0)
            with pytest.raises(LinkError, match="given up after 0.5 s"):
                trainer.step(1)

    def test_a_client_may_finish_when_the_server_has_ended(self):
        with serving() as (server, port):
            trainer = Trainer(port, patience=0.3)
            trainer.step(0)
            server.stop(grace=0)
            trainer.client.finish()
            assert not trainer.link.open

    def test_a_server_that_is_restarted_before_anything_was_trained_is_as_good_as_the_first(self):
        with serving() as (server, port):
            trainer = Trainer(port)
            assert trainer.client.connect() == 0
            server.stop(grace=0)
            with split.SplitServer(split.cut(model(), 3)[1], shape=(WIDTH,), optimizer=sgd) as other:
                other.listen(f"127.0.0.1:{port}")
                for number in range(5):
                    trainer.step(number)
                state = joined(trainer.client.head, other.tail.model)
                assert same(state, train_whole(5).state_dict())

    def test_a_restarted_server_without_checkpoints_is_refused_with_the_reason(self):
        with serving() as (server, port):
            trainer = Trainer(port)
            trainer.step(0)
            server.stop(grace=0)
            with split.SplitServer(split.cut(model(), 3)[1], shape=(WIDTH,)) as other:
                other.listen(f"127.0.0.1:{port}")
                with pytest.raises(RefusedError, match="no common step .* checkpoint folder"):
                    trainer.step(1)

    def test_saving_needs_a_folder_on_both_sides(self, tmp_path):
        with serving() as (_, port):
            trainer = Trainer(port)
            with pytest.raises(ConfigError, match="keep"):
                trainer.client.save()
            trainer.client.keep(tmp_path, optimizer=trainer.optimizer)
            with pytest.raises(RefusedError, match="the server has no folder"):
                trainer.client.connect()


class TestManyClients:
    NAMES = ("anna", "berta", "carla")

    def run(self, rounds, train, names=NAMES, terms=(), **options):
        """Let clients of these names take part in threads; returns {name: (trainer, rounds that counted)}."""
        results, errors = {}, []
        terms = dict(terms)
        heads = {name: split.cut(model(), 3) for name in names}  # not in threads: see cut
        with serving(rounds=rounds, **options, **terms) as (server, port):

            def work(name):
                try:
                    trainer = Trainer(port, heads[name][:1], name=name, **terms)
                    results[name] = trainer, trainer.client.run_rounds(lambda number: train(trainer, name, number))
                    trainer.client.finish()
                except Exception as error:
                    errors.append((name, error))

            threads = [threading.Thread(target=work, args=(name,), daemon=True) for name in names]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(60)
            assert not errors and not any(thread.is_alive() for thread in threads), errors
            assert server.wait(1)
            return server, results

    @staticmethod
    def number_of(name, number, step):
        return 1000 * ord(name[0]) + 10 * number + step

    def test_sequential_clients_hand_the_head_on(self):
        rounds = split.Sequential(split.cut(model(), 3)[0], self.NAMES, rounds=6, deadline=30)

        def train(trainer, name, number):
            for step in range(5):
                trainer.step(self.number_of(name, number, step))

        server, results = self.run(rounds, train)
        assert {name: counted for name, (_, counted) in results.items()} == {
            "anna": [0, 3],
            "berta": [1, 4],
            "carla": [2, 5],
        }
        whole = model()
        tail_optimizer = sgd(whole[3:].parameters())
        head_optimizers = {name: sgd(whole[:3].parameters()) for name in self.NAMES}
        for number in range(6):
            name = self.NAMES[number % 3]
            for step in range(5):
                inputs, labels = batch(self.number_of(name, number, step))
                whole.zero_grad()
                nn.functional.cross_entropy(whole(inputs), labels).backward()
                head_optimizers[name].step(), tail_optimizer.step()
        assert same({**rounds.head, **server.tail.model.state_dict()}, whole.state_dict())

    def test_splitfed_averages_both_halves_whoever_is_faster(self):
        rounds = split.SplitFed(split.cut(model(), 3)[0], self.NAMES, rounds=3, deadline=30)

        def train(trainer, name, number):
            for step in range(4 if name == "anna" else 2):
                trainer.step(self.number_of(name, number, step))

        server, results = self.run(rounds, train)
        assert all(counted == [0, 1, 2] for _, counted in results.values())
        state = model().state_dict()
        optimizers, models = {}, {name: model() for name in self.NAMES}
        for number in range(3):
            for name, own in models.items():
                own.load_state_dict(state)
                optimizers.setdefault(name, sgd(own.parameters()))
                for step in range(4 if name == "anna" else 2):
                    inputs, labels = batch(self.number_of(name, number, step))
                    optimizers[name].zero_grad()
                    nn.functional.cross_entropy(own(inputs), labels).backward()
                    optimizers[name].step()
            parts = [models[name].state_dict() for name in self.NAMES]
            state = split.rounds.weighted_mean(parts, [64, 32, 32])
        assert same({**rounds.head, **server.tail.model.state_dict()}, state)

    def test_averages_are_weighted_and_counters_keep_their_largest(self):
        states = [{"w": torch.tensor([1.0]), "n": torch.tensor(3)}, {"w": torch.tensor([5.0]), "n": torch.tensor(9)}]
        mean = split.rounds.weighted_mean(states, [3, 1])
        assert mean["w"].item() == 2.0 and mean["n"].item() == 9

    @pytest.mark.parametrize("kind", [split.Sequential, split.SplitFed])
    def test_a_lost_client_costs_a_deadline_and_its_half_round_is_dropped_whole(self, kind):
        """Berta vanishes in mid-round; Anna and Carla end as if she had never been."""
        names = self.NAMES
        steps = []

        class Vanished(Exception):
            pass

        def train(trainer, name, number):
            for step in range(3):
                trainer.step(self.number_of(name, number, step))
                if name == "berta":
                    steps.append(number)
                    trainer.link.close()
                    raise Vanished

        rounds = kind(split.cut(model(), 3)[0], names, rounds=4, deadline=3.0)
        results, threads = {}, []
        heads = {name: split.cut(model(), 3) for name in names}
        with serving(rounds=rounds) as (server, port):

            def work(name):
                trainer = Trainer(port, heads[name][:1], name=name)
                try:
                    results[name] = trainer.client.run_rounds(lambda number: train(trainer, name, number))
                    trainer.client.finish()
                except Vanished:
                    results[name] = "vanished"

            threads = [threading.Thread(target=work, args=(name,), daemon=True) for name in names]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(60)
            assert server.wait(1)
        assert results["berta"] == "vanished" and len(steps) == 1
        counted = [set(done) for _, done, _ in rounds.history if done]
        assert len(counted) == 4 and not any("berta" in done for done in counted)
        assert any("berta" in missing for _, _, missing in rounds.history)
        if kind is split.SplitFed:
            assert counted == [{"anna", "carla"}] * 4
        else:
            assert counted[0] == {"anna"} and counted[1] == {"carla"}
            whole = model()
            tail, heads = sgd(whole[3:].parameters()), {}
            for number, (name,) in enumerate(counted):
                head = heads.setdefault(name, sgd(whole[:3].parameters()))
                for step in range(3):
                    inputs, labels = batch(self.number_of(name, number, step))
                    whole.zero_grad()
                    nn.functional.cross_entropy(whole(inputs), labels).backward()
                    head.step(), tail.step()
            assert same({**rounds.head, **server.tail.model.state_dict()}, whole.state_dict())

    def test_a_client_that_was_too_slow_joins_again(self):
        names = self.NAMES[:2]
        late, back = threading.Event(), threading.Event()

        def train(trainer, name, number):
            trainer.step(self.number_of(name, number, 0))
            if name == "anna" and number == 1:
                assert late.set() is None and back.wait(30)
            elif name == "berta" and number == 0:
                assert late.wait(30)  # the round closes without it
                trainer.step(1)
            elif name == "berta":
                back.set()

        rounds = split.SplitFed(split.cut(model(), 3)[0], names, rounds=3, deadline=1.0)
        _, results = self.run(rounds, train, names)
        assert results["anna"][1] == [0, 1, 2]
        assert results["berta"][1] == [1, 2] and rounds.history[0][2] == ["berta"]

    def test_strangers_and_wrong_heads_are_refused(self):
        rounds = split.SplitFed(split.cut(model(), 3)[0], ["anna"], rounds=1)
        with serving(rounds=rounds) as (_, port):
            with pytest.raises(RefusedError, match="zoe is not one of this server's clients, anna"):
                Trainer(port, name="zoe").client.connect()
            trainer = Trainer(port, [nn.Linear(12, WIDTH)], name="anna")
            with pytest.raises(Exception, match="weights: .* one side only"):
                trainer.client.run_rounds(lambda number: None)

    @pytest.mark.parametrize("kind", [split.Sequential, split.SplitFed])
    def test_rounds_and_delta_mode_go_together(self, kind):
        options = {"up": "quantize:bits=4", "down": "quantize:bits=4", "delta_samples": 40, "max_batch": 20}

        def train(trainer, name, number):
            for step in range(4):
                trainer.step(step, ids=range(16 * (step % 2), 16 * (step % 2) + 16))

        _, results = self.run(kind(split.cut(model(), 3)[0], ["anna"], rounds=3), train, ["anna"], terms=options)
        assert results["anna"][1] == [0, 1, 2]

    def test_rounds_are_saved_and_go_on(self, tmp_path):
        def train(trainer, name, number):
            trainer.step(number)

        first = split.SplitFed(split.cut(model(), 3)[0], ["anna"], rounds=2)
        server, _ = self.run(first, train, ["anna"], checkpoints=tmp_path)
        second = split.SplitFed(split.cut(model(), 3)[0], ["anna"], rounds=5)
        server, results = self.run(second, train, ["anna"], checkpoints=tmp_path)
        assert results["anna"][1] == [2, 3, 4]
        assert not same(first.head, second.head)


def test_every_kind_of_frame_has_a_direction():
    assert all((kind >= 32) == (kind in KINDS_DOWN) for kind in Kind)


KINDS_DOWN = {Kind.WELCOME, Kind.GRADIENT, Kind.OUTPUT, Kind.STATISTICS, Kind.ANSWER, Kind.WEIGHTS}
