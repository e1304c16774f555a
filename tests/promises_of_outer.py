"""What outer steps promise, on every engine that has them; see promises.py."""

import copy
import io
import zlib

import torch

import gcompress
from tests.promises import batch, equal, make_model, promise, refused

OPTIONS = {"every": 3}, {"every": 4, "momentum": 0.5, "fragments": 2, "delay": 1}


def compressions(engine):
    found = [None, "topk:sparsity=0.9", "polar:rate=0.25,floor=0", "quantize:bits=4; error_feedback=ef21"]
    if engine == "mpi":
        return found
    return [*found, "topk:sparsity=0.9; exchange=twophase", "lowrank:rank=2", "polar:rate=1; exchange=turns"]


class OuterSteps:
    """One rank that trains with outer steps; a context."""

    def __init__(self, new, compression, **options):
        self._context = new.trainer.outer_engine()
        self._arguments = compression, options

    def __enter__(self):
        compression, options = self._arguments
        self.engine, self.rank, self.size = self._context.__enter__()
        layers = [torch.nn.BatchNorm1d(40), *make_model()]
        self.model = torch.nn.Sequential(*layers)
        with torch.no_grad():
            self.model[1].weight.add_(self.rank)  # which rank 0's values replace
        self.inner = torch.optim.AdamW(self.model.parameters(), lr=0.003)
        self.outer = gcompress.OuterOptimizer(self.inner, self.model, self.engine, compression, **options)
        return self

    def __exit__(self, *error):
        self._context.__exit__(*error)

    def steps(self, start, stop):
        for number in range(start, stop):
            self.outer.zero_grad()
            self.model(batch(number, self.rank)).square().mean().backward()
            self.outer.step()
        return self

    def tensors(self):
        return {name: each.detach().clone() for name, each in self.model.state_dict().items()}


def same_on_all(engine, tensors):
    """Whether all ranks have the same bits in {name: tensor}."""
    digest = zlib.crc32(b"".join(each.contiguous().view(-1).view(torch.uint8).numpy() for each in tensors.values()))
    return len(set(getattr(engine, "all_workers", engine).gather_texts(str(digest)))) == 1


@promise("horovod", "ddp", "mpi")
def after_outer_steps_all_ranks_have_the_same_bits(new):
    for compression in compressions(new.trainer.engine):
        for options in OPTIONS:
            with OuterSteps(new, compression, **options) as trained:
                trained.steps(0, 10)
                trained.outer.finish()
                report = trained.outer.exchange.report
                assert report.steps == trained.outer.rounds > 2 and report.sent_bytes > 0
                assert compression is None or report.ratio > 2, (compression, report)
                assert same_on_all(trained.engine, trained.tensors()), (compression, options)


@promise("horovod", "ddp", "mpi")
def outer_steps_are_resumed_to_the_bit(new):
    for compression in compressions(new.trainer.engine):
        for options in OPTIONS:
            with OuterSteps(new, compression, **options) as trained:
                expected = trained.steps(0, 12).tensors()
            with OuterSteps(new, compression, **options) as trained:
                trained.steps(0, 7)
                file = io.BytesIO()
                torch.save((trained.model.state_dict(), trained.outer.state_dict()), file)
            file.seek(0)
            model, outer = torch.load(file, weights_only=True)
            with OuterSteps(new, compression, **options) as trained:
                trained.model.load_state_dict(model)
                trained.outer.load_state_dict(outer)
                found = trained.steps(7, 12).tensors()
            assert equal(found, expected), (compression, options)


@promise("horovod", "ddp", "mpi")
def outer_steps_configured_otherwise_are_refused_on_every_rank(new):
    with new.trainer.outer_engine() as (engine, rank, _):
        model = make_model()
        inner = torch.optim.SGD(model.parameters(), lr=0.1)
        with refused(gcompress.ConfigMismatchError, "every"):
            gcompress.OuterOptimizer(inner, model, engine, "topk", every=5 + rank)


@promise("horovod", "ddp", "mpi")
def a_rank_that_diverges_ends_the_round_on_all(new):
    with OuterSteps(new, "topk:sparsity=0.9", every=2) as trained:
        trained.steps(0, 3)
        anchors = copy.deepcopy(trained.outer.anchors)
        if trained.rank == trained.size - 1:
            with torch.no_grad():
                trained.model[1].weight[0, 0] = float("inf")
        with refused(gcompress.ExchangeError, "not finite"):
            trained.steps(3, 4)
        assert equal(trained.outer.anchors, anchors)
        assert torch.equal(trained.model[1].weight, anchors["1.weight"])


@promise("horovod", "ddp", "mpi")
def demo_keeps_the_ranks_weights_the_same(new):
    """And learns, with an overflow of one rank's loss on the way."""
    with new.trainer.outer_engine() as (engine, rank, size):
        model = make_model()
        demo = gcompress.DeMo(model, engine, lr=0.002)
        scaler, losses = torch.amp.GradScaler("cpu", init_scale=2.0**10), []
        for step in range(12):
            demo.zero_grad()
            loss = model(batch(step, rank)).square().mean()
            scaler.scale(loss).backward()
            if step == 5 and rank == size - 1:
                model[0].weight.grad[0, 0] = float("inf")
            before = [p.detach().clone() for p in model.parameters()]
            scaler.step(demo)
            scaler.update()
            unchanged = all(map(torch.equal, before, model.parameters()))
            assert unchanged == (step == 5), step
            losses.append(float(loss.detach()))
        assert losses[-1] < losses[0]
        assert same_on_all(engine, {name: p.detach() for name, p in model.named_parameters()})
