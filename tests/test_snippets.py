"""The code of README and docs/ runs as it is printed: each block after the lines that its page takes for granted."""

import importlib.util
import json
import re

import pytest

import run_notebook
from tests.launching import REPOSITORY, quick_python, run

DOCS = REPOSITORY / "docs"
PAGES = {"README.md": REPOSITORY / "README.md"} | {
    path.relative_to(DOCS).as_posix(): path for path in sorted(DOCS.rglob("*.md"))
}
NOTEBOOKS = sorted(DOCS.rglob("*.ipynb"))

# What a reader of the block has: a model, its optimizer, a batch and one rank of an engine.
MODEL = """
import sys, torch, gcompress
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
images, labels = torch.randn(8, 64), torch.arange(8)
compute = lambda: torch.nn.functional.cross_entropy(model(images), labels)
"""
DDP = f"""{MODEL}
import torch.distributed as dist, gcompress.plugins.ddp
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
"""
REGISTERED = f"""{DDP}
model = torch.nn.parallel.DistributedDataParallel(model)
state = gcompress.plugins.ddp.register(model, "topk:sparsity=0.9")
exchange = state.exchange
compute().backward()
optimizer.step()
"""
HOROVOD = f"""{MODEL}
import horovod.torch as hvd
hvd.init()
"""
WRAPPED = f"""{HOROVOD}
import gcompress.plugins.horovod
optimizer = hvd.DistributedOptimizer(optimizer, model.named_parameters(), compression="topk:sparsity=0.9")
compute().backward()
optimizer.step()
"""
PARALLEL = f"""{DDP}
model = torch.nn.parallel.DistributedDataParallel(model)
"""
SHARDED = f"""{DDP}
import gcompress.plugins.fsdp
from torch.distributed.device_mesh import init_device_mesh
mesh = init_device_mesh("cpu", (1,))
torch.distributed.fsdp.fully_shard(model, mesh=mesh)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
"""
SCALED = """
scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
optimizer.zero_grad()
loss = compute()
"""
OUTER = f"""{DDP}
gcompress.plugins.horovod = gcompress.plugins.ddp
sys.modules["gcompress.plugins.horovod"] = gcompress.plugins.ddp
batches, loss = range(20), lambda model, batch: compute()
"""
SPLIT = """
import torch, torchvision
from gcompress import split
model = torchvision.models.resnet18(num_classes=10)
images, labels = torch.randn(2, 3, 32, 32), torch.arange(2)
_, served = split.cut(torchvision.models.resnet18(num_classes=10), "layer2")
server = split.SplitServer(
    served, shape=(128, 4, 4), up="mask:sparsity=0.99,bits=2", down="quantize:bits=4",
    optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
)
link = split.Link(f"127.0.0.1:{server.listen()}")
"""
STEP = "optimizer.zero_grad()\ncompute().backward()\noptimizer.step()\n"
COUNTED = f"{STEP}assert 0 < state.exchange.report.sent_bytes < 4 * 64 * 74 / 4\n"
TAKEN = f"{STEP}assert gcompress.plugins.horovod.exchange(optimizer).policy\n"  # one rank of Horovod exchanges nothing
ENDED = "client.finish()\nserver.stop()\n"

# A process group of one rank, for pages that make theirs as torchrun's workers do.
ONE_RANK = """
import functools, torch.distributed as dist
dist.init_process_group = functools.partial(dist.init_process_group, store=dist.HashStore(), rank=0, world_size=1)
"""
QUESTIONS = f"""{DDP}
network = lambda: torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10))
model = torch.nn.parallel.DistributedDataParallel(model)
"""

# By page, for each of its blocks in order: (what comes before, what after), or why it does not run here. One such pair
# for a page: its blocks are one program.
BLOCKS = {
    "FAQ.md": (QUESTIONS, "assert merged and not policy.uses_feedback"),
    "explanation/error_feedback.md": ("", ""),
    "explanation/mask.md": ("", "assert codes == [1, 3, 1, 2, 1, 1, 3, 0, 1, 2, 1, 0] and kept[1] == 3.0"),
    "howto/checkpoints.md": (f"{REGISTERED}rank = 0\n", STEP),
    "howto/choose_method.md": (REGISTERED, ""),
    "howto/measure_link.md": (f"{ONE_RANK}{REGISTERED}dist.destroy_process_group()\n", ""),
    "howto/own_compressor.md": ("", "assert decoded.shape == gradient.shape"),
    "howto/own_engine.md": ("", "assert exchange.report.ratio > 1"),
    "howto/training_loop.md": [
        (REGISTERED, ""),
        (REGISTERED, ""),
        (REGISTERED, ""),
        (REGISTERED, ""),
        (f"{HOROVOD}import gcompress.plugins.horovod\n", ""),
        ("import gcompress", ""),
    ],
    "reference/compressors.md": ("", ""),
    "reference/specs.md": ("", ""),
    "tutorials/outer_steps.md": (ONE_RANK, "assert outer.rounds == 20"),
    "tutorials/split_two_machines.md": ("", "assert tuple(shape) == (16, 28, 28)"),
    "README.md": [
        ("", "assert payload.numel() < 4 * gradient.numel() / 10"),
        (DDP, COUNTED),
        (HOROVOD, TAKEN),
        (SPLIT, ENDED),
        (DDP, "outer.finish()"),
    ],
    "FRAMEWORKS.md": [
        (PARALLEL, COUNTED),
        "Lightning's Trainer starts it: tests/test_frameworks.py",
        (PARALLEL, COUNTED),
        "accelerate's launcher starts it: tests/test_frameworks.py",
        "the Trainer starts it: tests/test_frameworks.py",
    ],
    "FSDP.md": [
        (SHARDED, STEP),
        "replicas and shards are several ranks: tests/test_fsdp.py",
        (SHARDED, STEP),
        "a line with a hole: tests/test_fsdp.py",
    ],
    "HOROVOD.md": [(HOROVOD, TAKEN), (WRAPPED, STEP)],
    "MEMORY.md": [
        "a line for each of four engines",
        (REGISTERED + SCALED, "assert state.exchange.steps == 2"),
        (WRAPPED + SCALED, "assert scaler.get_scale() == 1024"),
        (
            REGISTERED
            + "saved = [dict(state.state_dict(), rank=rank, world_size=4) for rank in range(4)]\n"
            + "for rank in range(4): torch.save(saved[rank], f'exchange-{rank}.pt')\n",
            "assert exchange.steps == 1",
        ),
        "accelerate stands beside torch.distributed.checkpoint: tests/test_frameworks.py, tests/promises_of_memory.py",
        (f"{DDP}model = torch.nn.parallel.DistributedDataParallel(model)\n", COUNTED),
    ],
    "NODES.md": ("import gcompress\n", "assert gcompress.as_policy(compression).local_size == 1"),
    "OUTER.md": [(OUTER, "assert outer.steps == 20"), "elastic Horovod: tests/elastic_outer_ranks.py"],
    "PLANNING.md": ["the ranks measure their link: tests/ddp_auto.py"],
    "POLICIES.md": [(HOROVOD + "import gcompress.plugins.horovod\n", TAKEN)],
    "SERVERS.md": ["mpirun starts it: tests/mpi_ranks.py", "servers have to be started: tests/byteps_workers.py"],
    "SPLIT.md": [
        "two machines, with certificates: tests/test_split_threats.py",
        "a loop with a hole: tests/test_split_checkpoints.py",
        "the parts of two machines: tests/test_split_example.py",
    ],
}


def blocks_of(path):
    """The blocks of Python and of diffs in a page; of a diff, what the file has after it."""
    for indent, kind, code in re.findall(
        r"^( *)```(python|diff)\n(.*?)^ *```", path.read_text(), re.DOTALL | re.MULTILINE
    ):
        code = re.sub(f"^{indent}", "", code, flags=re.MULTILINE)
        kept = [line[1:] for line in code.splitlines() if not line.startswith("-")]
        yield "\n".join(kept) + "\n" if kind == "diff" else code


FOUND = {name: blocks for name, path in PAGES.items() if (blocks := list(blocks_of(path)))}
PROGRAMS = [
    (f"{name}-{number}", block, code)
    for name, codes in FOUND.items()
    if name in BLOCKS
    for number, (block, code) in enumerate(
        [(BLOCKS[name], "\n".join(codes))]
        if isinstance(BLOCKS[name], tuple)
        else zip(BLOCKS[name], codes, strict=False)
    )
]


def test_every_block_is_known():
    assert set(FOUND) == set(BLOCKS)
    lists = {name: len(blocks) for name, blocks in BLOCKS.items() if isinstance(blocks, list)}
    assert lists == {name: len(FOUND[name]) for name in lists}


@pytest.mark.parametrize("block, code", [program[1:] for program in PROGRAMS], ids=[program[0] for program in PROGRAMS])
def test_the_block_runs(block, code, tmp_path):
    if isinstance(block, str):
        pytest.skip(block)
    before, after = block
    for package in ("horovod", "torchvision", "grpc"):
        if re.search(rf"import .*\b{package}\b", before + code) and importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    (tmp_path / "block.py").write_text(f"{before}\n{code}\n{after}\n")
    code, output = run([*quick_python(), "block.py"], 200, None, {}, folder=tmp_path)
    assert code == 0, output


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_notebook_prints_what_it_shows(path):
    """`python tools/run_notebook.py FILE` writes the outputs anew."""
    pytest.importorskip("matplotlib")
    code = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    outputs = run_notebook.outputs_of(code)
    shown = ["".join(line for each in cell["outputs"] for line in each.get("text", ())) for cell in code]
    assert [text for text, _ in outputs] == shown
    drawn = [sum("data" in each for each in cell["outputs"]) for cell in code]
    assert [len(pictures) for _, pictures in outputs] == drawn and sum(drawn) > 0
