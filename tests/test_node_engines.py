"""The exchange by nodes on real ranks of two nodes; see node_ranks.py for what each rank does."""

import json
import os

import pytest

import slow_link
import two_nodes
from tests.launching import launch_ddp, launch_horovod, outcomes_of
from tests.node_ranks import SCENARIOS

pytestmark = pytest.mark.ranks
RANKS = "-m", "tests.node_ranks"
LAUNCHES = {
    "ddp": lambda out, *names, ranks=4, **environment: launch_ddp(
        ranks, *RANKS, "ddp", out, *names, timeout=240, **environment
    ),
    "horovod": lambda out, *names, ranks=4, **environment: launch_horovod(
        ranks, *RANKS, "horovod", out, *names, HOROVOD_DYNAMIC_PROCESS_SETS="1", **environment
    ),
}
MARKS = {"ddp": (), "horovod": pytest.mark.horovod}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """{engine: {scenario: its outcome}}, each engine's in one launch."""
    found = {}

    def of(engine):
        if engine not in found:
            if engine == "horovod":
                pytest.importorskip("horovod.torch", reason="Horovod is not installed: run `make setup`")
            out = tmp_path_factory.mktemp(engine) / "outcomes"
            found[engine] = outcomes_of(out, LAUNCHES[engine](out))
        return found[engine]

    return of


CASES = [
    pytest.param(engine, name, marks=marks, id=f"{engine}-{name}")
    for engine, marks in MARKS.items()
    for name in SCENARIOS[engine]
]


@pytest.mark.parametrize("engine, name", CASES)
def test_scenario(outcomes, engine, name):
    assert outcomes(engine)[name] == "ok", outcomes(engine)[name]


@pytest.mark.horovod
def test_horovod_without_process_sets_stays_flat_and_says_how_to_change_it(tmp_path):
    pytest.importorskip("horovod.torch", reason="Horovod is not installed: run `make setup`")
    out = tmp_path / "outcomes"
    _, output = launch_horovod(4, *RANKS, "horovod", out, "no_process_sets", HOROVOD_DYNAMIC_PROCESS_SETS="0")
    assert "flat, not by nodes: to sum within the 2 nodes first, set HOROVOD_DYNAMIC_PROCESS_SETS=1" in output
    assert json.loads(out.read_text()) == {"no_process_sets": "ok"}


@pytest.mark.parametrize("engine", [pytest.param(engine, marks=marks) for engine, marks in MARKS.items()])
@pytest.mark.skipif(os.environ.get("GCOMPRESS_LONG") != "1", reason="sixteen ranks want cores: GCOMPRESS_LONG=1")
def test_sixteen_ranks_give_what_a_simulation_gives(engine, tmp_path):
    out, name = tmp_path / "outcomes", "every_exchange_gives_what_a_simulation_gives"
    assert outcomes_of(out, LAUNCHES[engine](out, name, ranks=16, TEST_LOCAL_SIZE="4")) == {name: "ok"}


@pytest.mark.root
@pytest.mark.skipif(slow_link.missing() is not None, reason=str(slow_link.missing()))
def test_two_nodes_joined_by_one_link(tmp_path):
    """torchrun's own places, to the bit of a simulation; the link counts what the reports say, less than flat."""
    out, names = tmp_path / "outcomes", ["bytes_on_the_link", "every_exchange_gives_what_a_simulation_gives"]
    with two_nodes.joined_nodes() as nodes:
        ended = two_nodes.torchrun(nodes, 2, [*RANKS, "ddp", out, *names], 200)
    assert all(code == 0 for code, _ in ended), "\n".join(output[-3000:] for _, output in ended)
    found = json.loads(out.read_text())
    assert found == dict.fromkeys(names, "ok"), "\n".join(found.values())
