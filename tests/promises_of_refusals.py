"""What every engine promises of ranks that differ: all of them hear of it before one decodes another's bytes."""

import torch

import gcompress
from gcompress import Policy
from gcompress.exchange import engine
from tests.promises import batch, make_model, promise, refused


def refused_on_all(new, name, compression, *words):
    """Train a step on ranks that differ; each must be refused and be told of rank 1.

    name: of the layer. What ranks started under other names than their peers never ends: no trainer uses it again.
    """
    torch.manual_seed(0)
    model = torch.nn.Sequential()
    model.add_module(name, torch.nn.Linear(40, 60))
    with refused(gcompress.ConfigMismatchError, "ranks [1]: ") as error, new(model, compression) as trainer:
        trainer.loss(batch(0, trainer.rank)).backward()
        trainer.synchronize()
    assert all(word in str(error[0]) for word in words), error
    return str(error[0])


@promise()
def another_compressor_on_a_rank_is_refused_on_all(new):
    spec = "quantize:bits=4" if new.rank == 1 else "topk:sparsity=0.9"
    said = refused_on_all(new, "compressor", spec, '"topk"', '"quantize"')
    assert "staleness" not in said, "it does not differ"


@promise()
def another_release_on_a_rank_is_refused_on_all(new):
    own = engine.FORMAT_VERSION
    try:
        engine.FORMAT_VERSION += new.rank == 1
        said = refused_on_all(new, "release", "topk:sparsity=0.9")
    finally:
        engine.FORMAT_VERSION = own
    assert said.startswith("format: ")


@promise()
def another_threshold_on_a_rank_is_refused_on_all(new):
    policy = Policy("topk:sparsity=0.9", min_numel=2500 if new.rank == 1 else 1024)
    refused_on_all(new, "threshold", policy, "2500")


@promise("horovod", "ddp")
def another_exchange_on_a_rank_is_refused_on_all(new):
    policy = Policy("topk:sparsity=0.9", exchange="twophase" if new.rank == 1 else "allgather")
    refused_on_all(new, "exchange", policy, '"twophase"')


@promise("horovod")
def a_rank_that_does_not_compress_is_refused_on_all(new):
    import horovod.torch as hvd

    compression = hvd.Compression.none if new.rank == 1 else "topk:sparsity=0.9"
    refused_on_all(new, "compressed", compression, "NoneCompressor")


@promise("mpi", "byteps")
def what_only_ranks_among_themselves_can_is_refused_by_servers(new):
    for argument, value in (("exchange", "turns"), ("mean", "senders"), ("local_size", 2)):
        policy = Policy("topk:sparsity=0.9", **{argument: value})
        with refused(gcompress.ConfigError, f"{argument}: got ", str(value)), new(make_model(), policy):
            pass
