"""What every engine promises, on real ranks of each; see promises.py for the promises themselves."""

import importlib.util
import json

import pytest

import tests.promises_of_auto  # noqa: F401 (adds to PROMISES)
import tests.promises_of_layers  # noqa: F401
import tests.promises_of_memory  # noqa: F401
import tests.promises_of_outer  # noqa: F401
import tests.promises_of_refusals  # noqa: F401
import tests.promises_of_times  # noqa: F401
from tests.launching import REPOSITORY, launch_byteps, launch_ddp, launch_horovod, launch_mpi
from tests.promises import LONG, PROMISES

pytestmark = pytest.mark.ranks

RANKS, BY_NODES = ("-m", "tests.promise_ranks"), "_by_nodes"
# Outer steps are flat, wherever ranks are.
OF_NODES = [name for name, (function, _) in PROMISES.items() if function.__module__ != tests.promises_of_outer.__name__]
# Four ranks of Horovod on two cores are slow, and most of what is by nodes they have in common with those of DDP.
OF_HOROVODS_NODES = (
    "a_frozen_layer_stands_still_and_goes_on_later",
    "a_layer_unfrozen_for_the_optimizer_later_is_exchanged",
    "a_rank_that_does_not_compress_is_refused_on_all",
    "a_step_thrown_away_leaves_no_trace",
    "layers_used_in_turns_lose_nothing",
    "the_state_of_all_ranks_is_one_that_any_rank_may_load",
    "what_ef21_delivers_is_the_mean_of_the_ranks_estimates",
)
if LONG:
    OF_HOROVODS_NODES = OF_NODES
ONE_BY_ONE = {"HOROVOD_DYNAMIC_PROCESS_SETS": "1", "HOROVOD_FUSION_THRESHOLD": "0"}
LAUNCHES = {
    "ddp_by_nodes": lambda out: launch_ddp(4, *RANKS, "ddp_by_nodes", out, *OF_NODES, timeout=500),
    "ddp": lambda out: launch_ddp(3, *RANKS, "ddp", out, timeout=400),
    # Of two: Horovod adds the floats of three in an order that follows what it happens to fuse.
    "horovod": lambda out: launch_horovod(2, *RANKS, "horovod", out, timeout=400),
    # Of two nodes, and one by one, for the same reason.
    "horovod_by_nodes": lambda out: launch_horovod(
        4, *RANKS, "horovod_by_nodes", out, *OF_HOROVODS_NODES, timeout=500, **ONE_BY_ONE
    ),
    "mpi": lambda out: launch_mpi(4, *RANKS, "mpi", out, timeout=400),
    "byteps": lambda out: launch_byteps(2, *RANKS, "byteps", out, timeout=400),
}


def missing(engine):
    """Why an engine's ranks cannot be started here, or None."""
    module = {"ddp": "torch", "horovod": "horovod", "mpi": "mpi4py", "byteps": "byteps"}[engine.removesuffix(BY_NODES)]
    if importlib.util.find_spec(module) is None:
        return f"{module} is not installed"
    built = REPOSITORY / "plugins" / "byteps" / "_server.so"
    return "BytePS's compressors are not built" if engine == "byteps" and not built.exists() else None


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """{engine: {promise: [its outcome on each rank]}}, each engine's in one launch."""
    found = {}

    def of(engine):
        if engine not in found:
            out = tmp_path_factory.mktemp(engine) / "outcomes"
            _, output = LAUNCHES[engine](out)
            ranks = [json.loads(path.read_text()) for path in sorted(out.parent.glob("outcomes.*"))]
            found[engine] = ranks, output[-4000:]
        return found[engine]

    return of


MARKS = {
    "ddp": (),
    "ddp_by_nodes": (),
    "horovod": pytest.mark.horovod,
    "horovod_by_nodes": pytest.mark.horovod,
    "mpi": pytest.mark.mpi,
    "byteps": pytest.mark.byteps,
}
SOME = {"ddp_by_nodes": OF_NODES, "horovod_by_nodes": OF_HOROVODS_NODES}
CASES = [
    pytest.param(engine, name, marks=marks, id=f"{engine}-{name}")
    for engine, marks in MARKS.items()
    for name, (_, engines) in PROMISES.items()
    if (not engines or engine.removesuffix(BY_NODES) in engines) and name in SOME.get(engine, PROMISES)
]


@pytest.mark.parametrize("engine, name", CASES)
def test_promise(outcomes, engine, name):
    if why := missing(engine):
        pytest.skip(why)
    ranks, output = outcomes(engine)
    assert ranks, f"the ranks wrote nothing:\n{output}"
    for rank, found in enumerate(ranks):
        assert found.get(name) == "ok", f"rank {rank}:\n{found.get(name, f'did not come so far:{chr(10)}{output}')}"
