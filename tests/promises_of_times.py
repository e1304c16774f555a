"""What one sees of an exchange, on every engine; see promises.py."""

import json
import pathlib
import tempfile
import time

import gcompress
from gcompress import Policy
from gcompress.exchange.times import PHASES
from tests.promises import equal, make_model, policies, promise, refused, train, trained

STEPS = 4
COUNTED = "topk:sparsity=0.9"


def spans_of(path, kind="X"):
    return [event for event in json.loads(pathlib.Path(path).read_text()) if event["ph"] == kind]


@promise()
def a_step_shows_where_its_time_goes(new):
    """All that is compressed is seen; work and waiting fit into the time; the trace has the report's bytes."""
    for exchange in ("allgather", "twophase"):
        with (
            tempfile.TemporaryDirectory() as folder,
            new(make_model(), Policy(COUNTED, 1, exchange=exchange)) as trainer,
        ):
            begun = time.perf_counter()
            with trainer.exchange.trace(f"{folder}/t.json") as trace:
                train(trainer, steps=STEPS)
            passed, report = time.perf_counter() - begun, trainer.exchange.report
            assert trace.path.name == f"t.rank{trainer.rank}.json"
            found = spans_of(trace.path)
            seconds = dict(zip(PHASES, report.times.total, strict=True))
            assert 0 < sum(seconds.values()) - seconds["wire"] < passed, (seconds, passed)
            assert 0 < seconds["wire"] < passed and seconds["wait"] > 0, (seconds, passed)
            assert trainer.engine == "byteps" or min(seconds["encode"], seconds["decode"]) > 0, seconds
            assert report.times.steps == report.steps == STEPS
            wire = [event for event in found if event["cat"] == "wire"]
            handed = report.sent_bytes + report.within_node_bytes
            assert sum(event["args"]["bytes"] for event in wire) == handed
            assert len({name for event in wire for name in event["args"]["parameters"]}) == 6
            assert {event["args"]["step"] for event in wire} == set(range(STEPS))
            assert sum(event["cat"] == "step" for event in found) == STEPS
            scalars = report.scalars("")
            assert scalars["sent_bytes"] == report.sent_bytes / STEPS and scalars["wire_seconds"] > 0


@promise("horovod", "ddp", "mpi")
def measuring_errors_changes_no_bit_of_training(new):
    with new(make_model(), Policy(COUNTED)) as trainer:
        train(trainer, steps=1)
        assert trainer.exchange.report.errors == {}
    for policy in policies(new.trainer):
        expected, memory = trained(new, policy)
        with new(make_model(), policy) as trainer:
            trainer.exchange.measure_errors(1)
            got, remembered = train(trainer)
            errors, compressed = trainer.exchange.report.errors, {"0.weight", "2.weight", "3.weight"}
        assert equal(got, expected) and equal(remembered, memory), policy
        some = policy.exchange == "turns" or trainer.local_size > 1  # a rank encodes a part of the parameters
        assert errors.keys() <= compressed if some else errors.keys() == compressed, (policy, errors)
        assert all(0 < error < 1.5 for error in errors.values()), (policy, errors)


@promise("byteps")
def errors_that_cannot_be_seen_are_refused(new):
    with new(make_model(), Policy(COUNTED)) as trainer:
        with refused(gcompress.ConfigError, "BytePS"):
            trainer.exchange.measure_errors()
        train(trainer, steps=1)


@promise("horovod", "ddp", "mpi")
def outer_steps_show_where_their_time_goes(new):
    import torch

    with new.trainer.outer_engine() as (engine, rank, _), tempfile.TemporaryDirectory() as folder:
        model = make_model()
        inner = torch.optim.SGD(model.parameters(), lr=0.1)
        outer = gcompress.OuterOptimizer(inner, model, engine, COUNTED, every=2)
        outer.exchange.measure_errors(1)
        with outer.exchange.trace(f"{folder}/t.json") as trace:
            for step in range(4):
                outer.zero_grad()
                model(torch.randn(8, 40, generator=torch.Generator().manual_seed(10 * step + rank))).sum().backward()
                outer.step()
        report = outer.exchange.report
        wire = [event for event in spans_of(trace.path) if event["cat"] == "wire"]
        assert sum(event["args"]["bytes"] for event in wire) == report.sent_bytes
        assert {event["args"]["step"] for event in wire} == {0, 1}
        assert report.times.total.encode > 0 and report.times.total.wait > 0
        assert report.errors.keys() == {"0.weight", "2.weight", "3.weight"}
