"""Process groups for the lanes of engines, used again once no rank's engine has them.

A Gloo group is three threads and a connection to each rank, and torch never ends one by itself: a script that makes
model after model would gather hundreds of them.
"""

import atexit
import datetime
import json
import weakref

import torch.distributed as dist

from .process_group_ranks import ProcessGroupRanks


class Lanes:
    """Process groups of the same ranks, one for each lane.

    Attributes:
        groups: the process groups.
        taken: whether an engine of this rank has them.
        under_way: operations that were started and whose end was not seen. With any of them left, the groups of the
            ranks may differ in what comes next: no engine takes them again.
    """

    def __init__(self, groups: list[dist.ProcessGroup]):
        self.groups, self.taken, self.under_way = groups, True, 0

    def release(self) -> None:
        """The engine is gone."""
        self.taken = False


# {group of all ranks: {(the groups' ranks, lanes, backend): all Lanes of them, in the order in which ranks made them}}
_made: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def take(
    everyone: dist.ProcessGroup, groups: list[list[int]], count: int, timeout: datetime.timedelta, backend: str = "gloo"
) -> Lanes:
    """`count` process groups of this rank's one of [[ranks], …]; every rank calls it, with the same lists."""
    made = _made.setdefault(dist.group.WORLD, {}).setdefault((json.dumps(groups), count, backend), [])
    own = [number for number, lanes in enumerate(made) if not (lanes.taken or lanes.under_way)]
    texts = ProcessGroupRanks(everyone).gather_texts(json.dumps(own))
    free = set(own).intersection(*map(json.loads, texts))
    if free:
        lanes = made[min(free)]
        lanes.taken = True
        return lanes
    new = [dist.new_subgroups_by_enumeration(groups, timeout, backend)[0] for _ in range(count)]
    made.append(Lanes(new))
    return made[-1]


@atexit.register
def _let_go():
    """Drop all groups while Python runs: Gloo's threads that outlive it may abort the process at its end."""
    for kinds in _made.values():
        for made in kinds.values():
            for lanes in made:
                lanes.groups = []
    _made.clear()
