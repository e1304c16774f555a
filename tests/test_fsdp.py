"""FSDP2 and HSDP on Gloo; see fsdp_ranks.py and fsdp_memory.py for what each rank does."""

import pytest
import torch.distributed as dist

from tests.launching import launch_ddp, outcomes_of

if not (dist.is_available() and dist.is_gloo_available()):
    pytest.skip("this build of torch has no Gloo", allow_module_level=True)

pytest.importorskip("torch.distributed.fsdp._fully_shard", reason="this torch has no fully_shard")

from tests.fsdp_ranks import SCENARIOS  # noqa: E402

pytestmark = pytest.mark.ranks


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """All scenarios in one launch of four ranks."""
    out = tmp_path_factory.mktemp("fsdp") / "outcomes.json"
    return outcomes_of(out, launch_ddp(4, "-m", "tests.fsdp_ranks", out, timeout=240))


@pytest.mark.parametrize("name", SCENARIOS)
def test_scenario(outcomes, name):
    assert outcomes[name] == "ok", outcomes[name]
