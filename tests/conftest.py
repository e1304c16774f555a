import pytest
import torch

# Tests start processes of their own; one thread each keeps two cores fair.
torch.set_num_threads(1)

# Not modules of tests: the ranks that tests start, and a method that would be one of all from then on.
collect_ignore = ["byteps_workers.py", "elastic_ranks.py", "mpi_ranks.py", "promise_ranks.py", "toy"]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """What a test logged may have characters that no encoding has, which pytest-xdist could not pass on."""
    report = yield
    report.sections = [(name, text.encode("utf-8", "backslashreplace").decode()) for name, text in report.sections]
    return report
