"""Horovod by nodes: which ranks share one, and the process sets within nodes and among peers."""

import json
import os

import horovod.torch as hvd
from horovod.common import process_sets

from gcompress.errors import ConfigError
from gcompress.exchange.node_engine import NodeEngine, Place, Topology, groups_of, topology_of
from gcompress.policy import Policy

from .collectives import HorovodEngine

DYNAMIC = "HOROVOD_DYNAMIC_PROCESS_SETS"


def engine_for(everyone: HorovodEngine, policy: Policy | None) -> HorovodEngine | NodeEngine:
    """The engine of a policy's exchange: that of everyone, or by nodes.

    Of a job on several nodes, and where the policy's `local_size` is a number, all ranks must call it.

    Args:
        everyone: the ranks of a process set; some of the job's ranks stay flat.
        policy: None on a rank that compresses nothing, which the first step refuses if others do.

    Raises:
        ExchangeError: a rank did not call it in time.
        ConfigError: the policy's `local_size` does not go with the ranks, or Horovod adds no process sets.
    """
    wanted = policy.local_size if policy else "auto"
    everyone.topology = _flat(_alone_because(everyone, wanted))
    if everyone.topology.why:
        return everyone
    place = [hvd.cross_rank(), hvd.local_rank(), hvd.local_size()]
    own = json.dumps([wanted if policy else None, place, os.environ.get(DYNAMIC) == "1"])
    told = [json.loads(text) for text in everyone.gather_texts(own, "nodes")]
    if policy is None or any(local_size != wanted for local_size, _, _ in told):
        everyone.topology = _flat("ranks want different exchanges")  # or none: the first step refuses that
        return everyone
    topology = topology_of([Place(*place) for _, place, _ in told], policy)
    if not topology.by_nodes:
        everyone.topology = topology
        return everyone
    groups, known = groups_of(topology), _known_sets()
    if not all(dynamic for _, _, dynamic in told) and any(tuple(ranks) not in known for ranks in sum(groups, [])):
        how = f"set {DYNAMIC}=1 on all ranks before hvd.init(), which lets Horovod add the nodes' process sets"
        if wanted != "auto":
            raise ConfigError(f"local_size: got {wanted}, expected 'auto' or 1 without process sets: {how}")
        everyone.topology = _flat(f"to sum within the {topology.nodes} nodes first, {how}")
        return everyone
    engines = [HorovodEngine(_own_set(ranks, known), everyone.number) for ranks in groups]
    return NodeEngine(everyone, *engines, topology)


def _flat(why):
    return Topology(hvd.size(), 1, why)


def _alone_because(engine, wanted):
    """Why an exchange is flat whatever other ranks say, the same on all; empty if it may not be."""
    if engine.process_set.process_set_id != 0:
        return "the process set has some of the job's ranks"
    if engine.elastic:
        return "nodes may come and go in an elastic job"
    if wanted in ("auto", 1) and hvd.local_size() == hvd.size():
        return "all ranks are on one node"
    return ""


def _known_sets():
    """{ranks: number} of the process sets that there are."""
    found = process_sets._basics._get_process_set_ids_and_ranks()
    return {tuple(ranks): number for number, ranks in found.items()}


def _own_set(groups, known):
    """This rank's one of several process sets; all ranks add in one order those that are not there yet."""
    own = None
    for ranks in groups:
        made = hvd.ProcessSet(ranks)
        if tuple(ranks) in known:
            made.process_set_id = known[tuple(ranks)]
        else:
            hvd.add_process_set(made)
        own = made if hvd.rank() in ranks else own
    return own
