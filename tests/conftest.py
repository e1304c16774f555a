import pytest
import torch

# Tests start processes of their own; one thread each keeps two cores fair.
torch.set_num_threads(1)

# Not modules of tests: the ranks that tests start, and a method that would be one of all from then on.
collect_ignore = [
    "byteps_workers.py",
    "elastic_outer_ranks.py",
    "elastic_ranks.py",
    "fsdp_memory.py",
    "fsdp_models.py",
    "fsdp_ranks.py",
    "mpi_ranks.py",
    "outer_restart_ranks.py",
    "promise_ranks.py",
    "toy",
]


# What `make check` runs: seconds each, in one process, and together what most changes break.
FAST = (
    "test_compressors",
    "test_dct",
    "test_documents",
    "test_engine",
    "test_feedback",
    "test_golden",
    "test_house",
    "test_memory",
    "test_policy",
    "test_summed",
)


def pytest_collection_modifyitems(items):
    """Mark the tests of FAST, and the examples in docstrings."""
    for item in items:
        if item.path.stem in FAST or item.path.parent.name != "tests":
            item.add_marker(pytest.mark.fast)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """What a test logged may have characters that no encoding has, which pytest-xdist could not pass on."""
    report = yield
    report.sections = [(name, text.encode("utf-8", "backslashreplace").decode()) for name, text in report.sections]
    return report
