"""What one sees of an exchange: the clock's account, traces, and scalars; test_encoding_errors.py has the errors."""

import copy
import importlib.util
import json
import os

import pytest
import torch

from gcompress import ConfigError, ExchangeError, Policy, TopK
from gcompress.exchange.exchange import GradientExchange
from gcompress.exchange.report import Report
from gcompress.exchange.schedule import Schedule
from gcompress.exchange.times import PHASES, Seconds, Times
from gcompress.exchange.trace import Trace
from tests.local_ranks import World, run_ranks
from tests.test_exchange import SHAPES, gradients

DAY = 86400.0
EVERY_WAY = [
    Policy("topk:sparsity=0.9", exchange="allgather"),
    Policy("quantize:bits=2,rounding=stochastic", exchange="twophase", error_feedback=True, bucket_bytes=50_000),
    Policy("topk:sparsity=0.9", exchange="turns", feedback_decay=0.5),
    Policy("randomk:sparsity=0.75", exchange="summed", error_feedback=True),
    Policy("lowrank:rank=2", exchange="summed"),
    Policy("threshold:threshold=0.5"),
    Policy("topk:sparsity=0.9", mean="senders"),
    Policy("topk:sparsity=0.99", momentum=0.9, clip=10.0, exchange="twophase"),
    Policy("quantize:bits=3", error_feedback="ef21", exchange="twophase"),
]
ONE_BY_ONE = pytest.mark.parametrize(
    "policy", EVERY_WAY, ids=lambda policy: f"{policy.compressor.name}-{policy.exchange}"
)


class Clock:
    """Shows what was put on it."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


class Late:
    """An engine's operation that ends at a moment; every look at it takes a second, as does waiting for it."""

    def __init__(self, clock, end):
        self.clock, self.end = clock, end

    def ready(self):
        self.clock.now += 1
        return self.clock.now >= self.end

    def wait(self):
        self.clock.now += 1
        return None


class LateEngine:
    """Its `allgather` takes as many seconds as the payload has bytes."""

    def __init__(self, clock, in_order=False):
        self.clock, self.in_order = clock, in_order

    def allgather(self, name, lane, payload):
        return Late(self.clock, self.clock.now + payload.numel())


def steps(clock, *segments):
    """An exchange: seconds of work, then bytes to send, and so on, and seconds of work."""
    for work, nbytes in zip(segments[::2], segments[1::2], strict=False):
        clock.now += work
        yield "allgather", torch.empty(nbytes, dtype=torch.uint8)
    clock.now += segments[-1]
    return None


@pytest.fixture
def schedule():
    """(Schedule, its Times, its Clock), at second 1000."""
    times = Times()
    times.clock = Clock()
    return Schedule(times), times, times.clock


def test_every_second_of_an_exchange_is_work_or_waiting(schedule):
    schedule, times, clock = schedule
    engine, begun = LateEngine(clock), clock.now
    task = schedule.start(engine, "a", steps(clock, 7, 40, 11, 30, 5), ["x", "y"])
    assert times.groups["a"].seconds == Seconds(encode=7)
    schedule.wait(engine, task)
    times.end_step()
    # Of two operations the last second is that of their `wait`; the first look at the second one is no waiting yet.
    assert times.total == times.last_step == Seconds(encode=7, recode=11, wire=72, wait=71, decode=5)
    assert times.groups["a"].seconds == times.total
    assert sum(times.total) - times.total.wire == clock.now - begun - 1
    assert (times.groups["a"].parameters, times.groups["a"].sent_bytes, times.steps) == (("x", "y"), 70, 1)


def test_what_is_on_the_wire_at_once_counts_once(schedule):
    schedule, times, clock = schedule
    engine = LateEngine(clock)
    tasks = [schedule.start(engine, name, steps(clock, 1, 50, 0)) for name in "abc"]
    sent = clock.now - 2  # the first one's moment
    clock.now += 100  # the rank computes
    for task in tasks:
        schedule.wait(engine, task)
    times.end_step()
    each = [group.seconds.wire for group in times.groups.values()]
    assert all(100 < wire < 120 for wire in each), each
    assert 100 < times.total.wire < 120 < 300 < sum(each)
    assert times.total.wire == clock.now - sent
    assert times.total.wait < 10, "they had ended before"


def test_an_operation_held_back_for_the_order_is_not_on_the_wire(schedule):
    """Its end was seen; what follows it must wait until another exchange has gone on."""
    schedule, times, clock = schedule
    engine = LateEngine(clock, in_order=True)
    slow = schedule.start(engine, "slow", steps(clock, 1, 500, 0, 1, 0))
    quick = schedule.start(engine, "quick", steps(clock, 1, 10, 0, 1, 0))
    schedule.wait(engine, slow)
    schedule.wait(engine, quick)
    assert times.groups["slow"].seconds.wire > 500
    assert times.groups["quick"].seconds.wire < 30
    assert times.groups["slow"].seconds.wait > 400 > 30 > times.groups["quick"].seconds.wait


def test_a_step_counts_for_itself_and_first_steps_can_be_left_out(schedule):
    schedule, times, clock = schedule
    engine = LateEngine(clock)
    for work in (100, 1, 2):
        schedule.wait(engine, schedule.start(engine, "a", steps(clock, work, 1, 0)))
        times.end_step()
        if work == 100:
            times.clear()
    assert (times.last_step.encode, times.total.encode, times.steps) == (2, 3, 2)
    assert times.groups["a"].seconds.encode == 3


def test_an_engine_that_fails_leaves_no_time_behind(schedule):
    schedule, times, clock = schedule
    engine = LateEngine(clock)
    schedule.start(engine, "a", steps(clock, 1, 10, 0))
    schedule.clear()
    clock.now += DAY
    schedule.wait(engine, schedule.start(engine, "a", steps(clock, 1, 10, 0)))
    times.end_step()
    assert times.total.encode == 1 and times.total.wire < 20 and times.total.wait < 20


def test_waiting_that_ends_with_an_error_is_over(schedule):
    schedule, times, clock = schedule
    engine = LateEngine(clock)
    task = schedule.start(engine, "a", steps(clock, 1, 500, 0))

    def lost():
        clock.now += 7
        raise ExchangeError("the other rank is lost")

    task._operation.ready = lost
    with pytest.raises(ExchangeError, match="is lost"):
        schedule.wait(engine, task)
    clock.now += DAY
    times.wait_ends()
    assert times.groups["a"].seconds.wait == 7


class SlowTopK(TopK):
    """Takes an hour of a clock to encode and a minute to decode."""

    kernels = None  # one after the other, by what is below
    clock = None

    def compress(self, tensor, *, seed=0):
        self.clock.now += 3600
        return super().compress(tensor, seed=seed)

    def decode_sum(self, payloads, out, factor=1.0, **how):
        self.clock.now += 60
        super().decode_sum(payloads, out, factor, **how)


def test_a_slow_encoder_and_decoder_are_seen_as_such(monkeypatch):
    """The wire's seconds are those of a real clock in which nothing sleeps: next to none."""

    def run(rank, exchange):
        exchange.prepare({"w": (5000,)})
        exchange.report.times.clock = clock = Clock()
        monkeypatch.setattr(SlowTopK, "clock", clock)
        exchange.start("w", torch.randn(5000))()
        exchange.end_step()
        return exchange.report.times.last_step

    policy = Policy(SlowTopK(sparsity=0.9), exchange="allgather", error_feedback=False)
    (seconds,) = run_ranks(World(1), policy, run)
    assert seconds == Seconds(encode=3600, decode=60)


def trained(rank, exchange, count=3, measured=0, between=None):
    """[{name: mean} of each step], and this rank's state."""
    exchange.prepare(SHAPES)
    results = []
    if measured:
        exchange.measure_errors(measured)
    for step in range(count):
        own = gradients(step, rank)
        names = [name for name in own if exchange.compressor_for(name, own[name].numel())]
        absent = {"c"} if step == 1 and rank == 0 else set()
        if absent:
            own["c"].zero_()
        if between:
            between(exchange, own, absent)
        finish = {name: exchange.start(name, own[name], absent=name in absent) for name in names}
        results.append({name: each().clone() for name, each in finish.items()})
        exchange.end_step()
    return results, exchange.state_dict()


def spans(events, kind="X"):
    return [event for event in events if event["ph"] == kind]


def check_rows(events):
    """Spans of one row do not overlap, and every span lies within those of the steps."""
    rows = {}
    for event in spans(events):
        assert event["dur"] >= 0
        rows.setdefault((event["pid"], event["tid"]), []).append((event["ts"], event["ts"] + event["dur"]))
    for row in rows.values():
        row.sort()
        assert all(before[1] <= after[0] for before, after in zip(row, row[1:], strict=False))
    (pid, *_), steps_row = {pid for pid, _ in rows}, min(rows)
    first, last = rows[steps_row][0][0], rows[steps_row][-1][1]
    assert all(first <= start and stop <= last for row in rows.values() for start, stop in row)
    named = {event["tid"] for event in events if event["name"] == "thread_name"}
    assert named == {tid for _, tid in rows}, "every row has a name"
    return pid


@ONE_BY_ONE
def test_a_trace_is_what_the_report_says(policy, tmp_path):
    def run(rank, exchange):
        with exchange.trace(tmp_path / "t.json", steps=50) as trace:
            trained(rank, exchange, count=4)  # of which low-rank sends one size and the other in turns
        return trace.path, exchange.report

    for rank, (path, report) in enumerate(run_ranks(World(3, delays=9), policy, run)):
        events = json.loads(path.read_text())
        assert path == tmp_path / f"t.rank{rank}.json"
        assert check_rows(events) == rank
        wire = [event for event in spans(events) if event["cat"] == "wire"]
        assert sum(event["args"]["bytes"] for event in wire) == report.sent_bytes
        assert sum(group.sent_bytes for group in report.times.groups.values()) == report.sent_bytes
        assert {event["args"]["step"] for event in wire} == {0, 1, 2, 3}
        assert [event["name"] for event in spans(events) if event["cat"] == "step"] == [f"step {n}" for n in range(4)]
        counted = [event["args"]["bytes"] for event in sorted(spans(events, "C"), key=lambda event: event["ts"])]
        assert counted[-1] == 0 < max(counted) and min(counted) >= 0
        for number, phase in enumerate(PHASES):
            seconds = 1e-6 * sum(event["dur"] for event in spans(events) if event["cat"] == phase)
            of_groups = sum(group.seconds[number] for group in report.times.groups.values())
            assert seconds == pytest.approx(of_groups, abs=1e-6 * len(events)), phase
        own = {name for event in wire for name in event["args"]["parameters"]}
        assert own == {name for group in report.times.groups.values() for name in group.parameters}
        total = report.times.total
        assert (
            total.encode > 0 and total.decode > 0 and 0 < total.wire <= sum(total[:2]) + total.wait + total.decode + 9
        )


def test_a_trace_ends_by_itself_and_can_be_begun_anew(tmp_path):
    path = tmp_path / "one.json"

    def run(rank, exchange):
        trace = exchange.trace(path, steps=2)
        trained(rank, exchange, count=1)
        json.loads(path.read_text() + "]")  # a process that is killed leaves what viewers take
        with pytest.raises(ConfigError, match="one.json to be closed before"):
            exchange.trace(tmp_path / "two.json")
        assert not (tmp_path / "two.json").exists()
        trained(rank, exchange, count=3)
        text = path.read_text()
        assert {event["args"]["step"] for event in spans(json.loads(text))} == {0, 1}
        trace.close()
        assert path.read_text() == text
        with exchange.trace(str(path), steps=1):
            pass
        assert not spans(json.loads(path.read_text()))

    run_ranks(World(1), EVERY_WAY[0], run)


def test_a_trace_begun_amid_a_step_has_nothing_that_began_before(tmp_path):
    def run(rank, exchange):
        exchange.prepare({"w": (5000,), "v": (5000,)}, alone=["w", "v"])
        finish = [exchange.start("w", torch.randn(5000))]
        with exchange.trace(tmp_path / "late.json"):
            finish.append(exchange.start("v", torch.randn(5000)))
            for each in finish:
                each()
            exchange.end_step()
        return json.loads((tmp_path / "late.json").read_text())

    (events,) = run_ranks(World(1, delays=0), EVERY_WAY[0], run)
    check_rows(events)
    wire = [event for event in spans(events) if event["cat"] == "wire"]
    assert {name for event in wire for name in event["args"]["parameters"]} == {"v"}


@pytest.mark.parametrize("path", ["", "no/such/folder/t.json", ".", 7, None, "a\0b"])
def test_a_path_that_cannot_be_written_is_refused_at_once(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exchange = GradientExchange(None)
    with pytest.raises(ConfigError, match="path: got"):
        exchange.trace(path)
    for steps_wanted in (0, 1.5, True):
        with pytest.raises(ConfigError, match="steps: got"):
            exchange.trace("t.json", steps=steps_wanted)
    exchange.trace("t.json").close()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
def test_a_full_disk_ends_the_trace_and_not_the_training(caplog):
    report = Report()
    trace = Trace("/dev/full", report)
    report.end_step()
    assert "cannot be written" in caplog.text and report.times.trace is None
    report.end_step()
    trace.close()
    assert report.steps == 2


def test_scalars_are_those_of_the_last_step():
    def run(rank, exchange):
        exchange.prepare({"w": (5000,)})
        exchange.measure_errors(2)
        for _ in range(2):
            exchange.report.times.clear()
            exchange.start("w", torch.randn(5000))()
            exchange.end_step()
        return exchange.report

    (report,) = run_ranks(World(1), Policy("topk:sparsity=0.9"), run)
    scalars = report.scalars()
    nbytes = TopK(sparsity=0.9).nbytes(5000)
    assert scalars["gcompress/sent_bytes"] == nbytes and report.sent_bytes == 2 * nbytes
    assert scalars["gcompress/ratio"] == 20000 / nbytes
    assert scalars["gcompress/error/w"] == report.errors["w"] > 0
    for phase, seconds in zip(PHASES, report.times.last_step, strict=True):
        assert scalars[f"gcompress/{phase}_seconds"] == seconds
    assert all(type(value) is float for value in scalars.values())
    assert report.scalars(prefix="").keys() == {name.removeprefix("gcompress/") for name in scalars}
    assert Report().scalars()["gcompress/ratio"] == 1.0


@pytest.mark.filterwarnings("default")  # of what tensorboard itself imports
def test_tensorboard_draws_the_scalars(tmp_path):
    if importlib.util.find_spec("tensorboard") is None:
        pytest.skip("tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    given = []

    def run(rank, exchange):
        exchange.prepare({"w": (5000,)})
        exchange.measure_errors(1)
        with SummaryWriter(tmp_path) as writer:
            for step in range(3):
                exchange.start("w", torch.randn(5000))()
                exchange.end_step()
                given.append(exchange.report.scalars())
                for name, value in exchange.report.scalars().items():
                    writer.add_scalar(name, value, step)

    run_ranks(World(1), Policy("topk:sparsity=0.9"), run)
    found = EventAccumulator(str(tmp_path))
    found.Reload()
    assert set(found.Tags()["scalars"]) == set(given[0])
    for name in given[0]:
        drawn = [(event.step, event.value) for event in found.Scalars(name)]
        assert [step for step, _ in drawn] == [0, 1, 2]
        assert [value for _, value in drawn] == pytest.approx([each[name] for each in given])


def test_states_hold_counts_and_no_seconds():
    """States of two runs of the same training are the same; those of earlier releases, and all figures, load."""

    def run(rank, exchange):
        _, state = trained(rank, exchange)
        figures = exchange.report.as_dict()
        assert json.loads(json.dumps(figures)) == figures
        assert figures["timed_steps"] == 3 and figures["encode_seconds"] == exchange.report.times.total.encode > 0
        assert not [name for name in state["report"] if "seconds" in name]
        old = copy.deepcopy(state)
        del old["report"]["last_step_fp32_bytes"]
        for report in (old["report"], figures):
            other = GradientExchange(exchange.policy, exchange.engine)
            other.load_state_dict({**state, "report": report})
            assert other.report.sent_bytes == exchange.report.sent_bytes and other.report.steps == 3
            assert other.report.times.total == Seconds() and other.report.times.steps == 0

    run_ranks(World(2), EVERY_WAY[0], run)


def test_a_table_has_a_line_for_each_group():
    def run(rank, exchange):
        trained(rank, exchange)
        return exchange.report.times

    for times in run_ranks(World(2), Policy("topk:sparsity=0.9", bucket_bytes=50_000), run):
        head, *lines = str(times).splitlines()
        assert head.split() == ["ms", "per", "step", *PHASES, "bytes"]
        assert len(lines) == 1 + len(times.groups) > 2 and lines[-1].startswith("all ")
        assert lines[-1].split()[-1] == f"{sum(group.sent_bytes for group in times.groups.values()) // 3:,}"
    assert "all" in str(Times())
