"""What tests/test_frameworks.py runs: `torchrun … framework_ranks.py OUT [SCENARIO…]`, or `python …` for those of one.

Each scenario checks on every rank; rank 0 writes {scenario: "ok" or the error} to OUT.
"""

import datetime
import logging
import os
import sys
import warnings

import torch
import torch.distributed as dist

from tests import accelerate_scenarios, lightning_scenarios, trainer_scenarios  # noqa: F401
from tests.ddp_tools import rank_and_gather
from tests.framework_tools import ALONE, SCENARIOS
from tests.scenarios import run_scenarios


def main():
    out, names = sys.argv[1], sys.argv[2:]
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # of the frameworks about themselves; those of this library are logged
    logging.getLogger("lightning").setLevel(logging.ERROR)
    launched = "RANK" in os.environ
    if launched:
        dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
    scenarios = SCENARIOS if launched else ALONE
    run_scenarios({name: scenarios[name] for name in names or scenarios}, out, *rank_and_gather())
    if launched:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
