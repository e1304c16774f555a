"""What every engine promises, on real ranks of each; see promises.py for the promises themselves."""

import importlib.util
import json
import pathlib

import pytest

from promises import PROMISES

pytestmark = pytest.mark.ranks

HERE = pathlib.Path(__file__).parent
RANKS = HERE / "promise_ranks.py"


def launched(engine, out):
    """Run all promises of an engine; returns its output."""
    if engine == "ddp":
        from test_ddp import launch

        return launch(3, RANKS, engine, out, timeout=300)
    if engine == "horovod":
        from test_horovod import launch

        # Of two: Horovod adds the floats of three in an order that follows what it happens to fuse.
        return launch(2, RANKS, engine, out, timeout=300)
    if engine == "mpi":
        from test_mpi import launch

        return launch(4, RANKS, engine, out, timeout=300)
    from test_byteps import launch

    return launch(RANKS, engine, out, timeout=300)


def missing(engine):
    """Why an engine's ranks cannot be started here, or None."""
    module = {"ddp": "torch", "horovod": "horovod.torch", "mpi": "mpi4py", "byteps": "byteps"}[engine]
    if importlib.util.find_spec(module.partition(".")[0]) is None:
        return f"{module} is not installed"
    built = HERE.parent / "plugins" / "byteps" / "_server.so"
    return "BytePS's compressors are not built" if engine == "byteps" and not built.exists() else None


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """{engine: {promise: [its outcome on each rank]}}, each engine's in one launch."""
    found = {}

    def of(engine):
        if engine not in found:
            out = tmp_path_factory.mktemp(engine) / "outcomes"
            _, output = launched(engine, out)
            ranks = [json.loads(path.read_text()) for path in sorted(out.parent.glob("outcomes.*"))]
            found[engine] = ranks, output[-4000:]
        return found[engine]

    return of


MARKS = {"ddp": (), "horovod": pytest.mark.horovod, "mpi": pytest.mark.mpi, "byteps": pytest.mark.byteps}
CASES = [
    pytest.param(engine, name, marks=marks, id=f"{engine}-{name}")
    for engine, marks in MARKS.items()
    for name, (_, engines) in PROMISES.items()
    if not engines or engine in engines
]


@pytest.mark.parametrize("engine, name", CASES)
def test_promise(outcomes, engine, name):
    if why := missing(engine):
        pytest.skip(why)
    ranks, output = outcomes(engine)
    assert ranks, f"the ranks wrote nothing:\n{output}"
    for rank, found in enumerate(ranks):
        assert found.get(name) == "ok", f"rank {rank}:\n{found.get(name, f'did not come so far:{chr(10)}{output}')}"
