"""What may cross the cut, what labels may be, and what counts as a step."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

pytest.importorskip("grpc", reason="grpcio is not installed: pip install -e .[split]")

from gcompress import ConfigError, RefusedError, split  # noqa: E402
from tests.nested import same  # noqa: E402
from tests.split_tools import CLASSES, INPUTS, WIDTH, Trainer, batch, model, serving, sgd  # noqa: E402

VOCABULARY, LENGTH = 11, 6


class Reader(nn.Module):
    """Tokens through an LSTM; `using` says what of its output goes on."""

    def __init__(self, using="outputs"):
        super().__init__()
        torch.manual_seed(1)
        self.embedding, self.lstm = nn.Embedding(VOCABULARY, 8), nn.LSTM(8, 10, batch_first=True)
        self.linear, self.using = nn.Linear(10, VOCABULARY), using

    def forward(self, tokens):
        outputs, (hidden, cell) = self.lstm(self.embedding(tokens))
        if self.using == "hidden":
            return self.linear(hidden[-1])
        if self.using == "both":
            return self.linear(outputs + cell[-1].unsqueeze(1))
        return self.linear(outputs)


def tokens(number, size=5):
    generator = torch.Generator().manual_seed(number)
    return torch.randint(0, VOCABULARY, (size, LENGTH), generator=generator)


def of_every_token(outputs, labels):
    return nn.functional.cross_entropy(outputs.flatten(0, 1), labels.flatten())


def train_alike(whole, port, parts, batches, loss, **options):
    """Train the cut model and a copy of the whole one; the losses of both are the same to the bit."""
    trainer = Trainer(port, parts, **options)
    optimizer = sgd(whole.parameters())
    for inputs, labels in batches:
        trainer.optimizer.zero_grad(), optimizer.zero_grad()
        ours = trainer.client(inputs, labels)
        ours.backward()
        theirs = loss(whole(inputs), labels)
        theirs.backward()
        trainer.optimizer.step(), optimizer.step()
        assert ours.item() == theirs.item()
    return trainer


class TestWhatCrosses:
    @pytest.mark.parametrize(("using", "crosses"), [("outputs", (LENGTH, 10)), ("hidden", (10,))])
    def test_one_tensor_of_an_lstms_output_crosses_as_any_other(self, using, crosses):
        whole = Reader(using)
        head, tail = split.cut(whole, "lstm")
        inputs = tokens(0)
        assert torch.equal(tail(head(inputs)), whole(inputs))
        assert split.activation_shape(head, (LENGTH,)) == crosses

    def test_a_language_model_trains_as_it_does_whole(self):
        whole, parts = Reader(), split.cut(Reader(), "lstm")
        options = {"shape": (LENGTH, 10), "label_shape": (LENGTH,)}
        with serving(parts[1], loss=of_every_token, **options) as (server, port):
            batches = [(tokens(number), tokens(number + 50)) for number in range(4)]
            trainer = train_alike(whole, port, parts[:1], batches, of_every_token, **options)
            assert same({**trainer.client.head.state_dict(), **server.tail.model.state_dict()}, whole.state_dict())

    def test_several_tensors_are_refused_at_the_cut(self):
        with pytest.raises(
            ConfigError, match="output of LSTM is a tuple or dict, of which getitem.*, getitem.* would cross"
        ):
            split.cut(Reader("both"), "lstm")

    def test_a_tensor_of_which_an_item_is_taken_too_crosses_whole(self):
        class Twice(nn.Module):
            def __init__(self):
                super().__init__()
                self.one, self.two = nn.Linear(3, 4), nn.Linear(4, 2)

            def forward(self, inputs):
                value = self.one(inputs)
                return self.two(value) + value[0].sum()

        whole = Twice()
        head, tail = split.cut(whole, "one")
        inputs = torch.randn(5, 3)
        assert head(inputs).shape == (5, 4) and torch.equal(tail(head(inputs)), whole(inputs))

    @pytest.mark.parametrize(
        ("output", "words"),
        [
            (lambda x: (x, x), "tuple of 2"),
            (lambda x: {"a": x}, "dict of 1"),
            (lambda x: x.long(), "torch.int64 of shape"),
            (lambda x: x.sum(), r"of shape \(\)"),
            (lambda x: None, "NoneType"),
        ],
    )
    def test_what_is_no_batch_of_numbers_is_named_before_it_is_sent(self, output, words):
        class Head(nn.Linear):
            def forward(self, inputs):
                return output(super().forward(inputs))

        head = Head(INPUTS, WIDTH)
        with pytest.raises(ConfigError, match=words):
            split.activation_shape(head, (INPUTS,))
        with serving() as (server, port):
            client = Trainer(port, [head]).client
            for ask in (client, client.evaluate):
                with pytest.raises(ConfigError, match=words):
                    ask(*batch(0))
            assert not server.frames.bytes

    def test_a_tail_whose_outputs_cannot_be_sent_is_refused(self):
        class Two(nn.Linear):
            def forward(self, value):
                return super().forward(value), value

        with pytest.raises(ConfigError, match="model_tail: its output is tuple"):
            split.SplitServer(Two(WIDTH, 3), shape=(WIDTH,), labels=None)

    @pytest.mark.parametrize("dtype", [None, torch.int64, torch.int32])
    def test_heads_of_integers_have_a_shape(self, dtype):
        embedding = nn.Embedding(VOCABULARY, 4)
        assert split.activation_shape(embedding, (LENGTH,), dtype) == (LENGTH, 4)
        assert split.activation_shape(nn.Sequential(embedding, nn.Flatten()), (LENGTH,), dtype) == (4 * LENGTH,)

    def test_a_shape_that_does_not_fit_is_said_in_torchs_words(self):
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            split.activation_shape(nn.Linear(3, 4), (5,))

    def test_an_empty_batch_is_refused_here(self):
        with serving() as (server, port):
            client = Trainer(port).client
            inputs, labels = batch(0)
            for ask in (client, client.evaluate, client.eval()):
                with pytest.raises(ConfigError, match="empty batch"):
                    ask(inputs[:0], labels[:0])
            assert not server.frames.bytes


class TestLabels:
    @pytest.mark.parametrize(
        ("loss", "ignored", "kind"),
        [
            (None, -100, "int64"),
            (nn.CrossEntropyLoss(ignore_index=255), 255, "uint8"),
            (nn.CrossEntropyLoss(ignore_index=-1, label_smoothing=0.1), -1, "int16"),
        ],
    )
    def test_samples_to_be_ignored_are(self, loss, ignored, kind):
        def batches():
            for number in range(3):
                inputs, labels = batch(number)
                labels[number::4] = ignored
                yield inputs, labels

        local = loss or nn.functional.cross_entropy
        whole, parts = model(), split.cut(model(), 3)
        with serving(parts[1], loss=loss, labels=kind) as (_, port):
            trainer = train_alike(whole, port, parts[:1], batches(), local, labels=kind)
            with pytest.raises(RefusedError, match="labels: got 0 to 6, expected classes 0 to 4"):
                trainer.client(torch.zeros(2, INPUTS), torch.tensor([0, 6]))
            assert trainer.client.step == 3

    def test_a_loss_of_ones_own_judges_its_labels_itself(self):
        def loss(outputs, labels):
            return nn.functional.poisson_nll_loss(outputs[:, 0], labels.float())

        whole, parts = model(), split.cut(model(), 3)
        batches = [(batch(number)[0], torch.arange(16) * 7 - 3) for number in range(3)]
        with serving(parts[1], loss=loss) as (_, port):
            train_alike(whole, port, parts[:1], batches, loss)

    def test_pixels_have_classes(self):
        """(N, C, H, W) and labels (N, H, W) with an ignored border."""
        labels = torch.randint(0, 3, (4, 2, 2))
        labels[:, 0, 0] = -100
        parts = [nn.Conv2d(1, 3, 1), nn.Conv2d(3, 3, 1)]
        whole = nn.Sequential(*copy.deepcopy(parts))
        options = {"shape": (3, 2, 2), "label_shape": (2, 2)}
        with serving(parts[1], **options) as (_, port):
            train_alike(
                whole, port, parts[:1], [(torch.randn(4, 1, 2, 2), labels)], nn.functional.cross_entropy, **options
            )


class TestOneStepForABatch:
    def parts(self, u_shaped):
        return split.cut(model(), *((3, 6) if u_shaped else (3,)))

    @pytest.mark.parametrize("u_shaped", [False, True])
    def test_without_gradients_nothing_is_trained(self, u_shaped):
        parts = self.parts(u_shaped)
        with serving(parts[1], labels=None if u_shaped else "int64") as (server, port):
            trainer = Trainer(port, parts)
            trainer.step(0)
            before = copy.deepcopy(server.tail.state_dict())
            inputs, labels = batch(1)
            for context in (torch.no_grad(), torch.inference_mode()):
                with context:
                    result = trainer.client(inputs, labels)
            assert trainer.client.training and not result.requires_grad
            assert trainer.client.step == server._slots["client"].step == 1
            assert same(before["model"], server.tail.model.state_dict())
            trainer.step(1)
            assert trainer.client.step == 2

    @pytest.mark.parametrize("delta", [False, True])
    @pytest.mark.parametrize("u_shaped", [False, True])
    def test_checkpointed_a_batch_is_one_step_with_the_same_gradients(self, u_shaped, delta):
        gradients = []
        for checkpointed in (False, True):
            parts = self.parts(u_shaped)
            options = {"up": "quantize:bits=6", "delta_samples": 600} if delta else {}
            with serving(parts[1], labels=None if u_shaped else "int64", **options) as (server, port):
                client = Trainer(port, parts, **options).client
                ids = list(range(16))
                for number in range(2):
                    inputs, labels = batch(number)
                    arguments = inputs, labels, ids
                    if checkpointed:
                        result = checkpoint(client, *arguments, use_reentrant=False)
                    else:
                        result = client(*arguments)
                    loss = nn.functional.cross_entropy(result, labels) if u_shaped else result
                    loss.backward()
                assert client.step == server._slots["client"].step == 2
                gradients.append([parameter.grad for parameter in client.parameters()])
                gradients[-1] += [parameter for parameter in server.tail.model.parameters()]
        assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))

    def test_several_checkpointed_batches_and_two_backward_passes(self):
        with serving() as (server, port):
            client = Trainer(port).client
            losses = [checkpoint(client, *batch(number), use_reentrant=False) for number in range(3)]
            sum(losses).backward(retain_graph=True)
            once = [parameter.grad.clone() for parameter in client.parameters()]
            sum(losses).backward()
            assert all(torch.allclose(p.grad, 2 * g) for p, g in zip(client.parameters(), once, strict=True))
            assert client.step == server._slots["client"].step == 3

    def test_a_checkpoint_that_cannot_work_is_refused_before_any_step(self):
        with serving() as (server, port):
            client = Trainer(port).client
            inputs, labels = batch(0)
            with pytest.raises(ConfigError, match="use_reentrant=False"):
                checkpoint(client, inputs.requires_grad_(), labels, use_reentrant=True).backward()
            assert client.step == server._slots["client"].step == 0

    def test_a_gradient_goes_to_the_batch_that_it_is_of(self):
        """U-shaped, the server has the forward pass of the last batch only."""
        parts = self.parts(u_shaped=True)
        with serving(parts[1], labels=None) as (server, port):
            client = Trainer(port, parts).client
            first, second = client(batch(0)[0]), client(batch(1)[0])
            with pytest.raises(ConfigError, match="backward: got a batch that is not the last"):
                first.sum().backward()
            second.sum().backward(retain_graph=True)
            with pytest.raises(ConfigError, match="backward: got a batch that is not the last"):
                second.sum().backward()
            assert client.step == server._slots["client"].step == 1

    def test_an_evaluation_leaves_every_layers_mode(self):
        with serving() as (_, port):
            client = Trainer(port).client
            frozen = client.head.get_submodule("1").eval()
            client.evaluate(*batch(0))
            assert client.training and not frozen.training
            split.activation_shape(client.head, (INPUTS,))
            assert client.head.training and not frozen.training


def test_a_user_input_is_left_as_it_is():
    """A head without parameters: the server alone learns."""
    with serving(model(), shape=(INPUTS,)) as (_, port):
        client = split.SplitClient(nn.Identity(), split.Link(f"127.0.0.1:{port}"), shape=(INPUTS,))
        inputs, labels = batch(0)
        client(inputs, labels).backward()
        assert not inputs.requires_grad and CLASSES > labels.max()
