"""Outer steps through the parameter servers (gcompress/outer/means.py)."""

from gcompress.outer.means import finished

from .worker import Worker


class WorkerExchange:
    """Means by pushes to the servers and pulls from them.

    Args:
        job: a Job, on a worker rank without a connection.
        policy: which compressor for which tensor.
        tensors: {name: tensor} of all that will be exchanged.
    """

    def __init__(self, job, policy, tensors):
        self._job, self.ranks, self.terms = job, job.all_workers, {}  # a Worker agrees on all its own
        self.results = Worker(job, {name: tensor.numel() for name, tensor in tensors.items()}, policy, scaler=1.0)

    def broadcast(self, tensors):
        self._job.broadcast(tensors)

    def begin(self, tensors):
        return WorkerMeans(self.results, {name: self.results.push_pull(name, each) for name, each in tensors.items()})


class WorkerMeans:
    """Means on their way to a worker."""

    def __init__(self, results, finishing):
        self._results, self._finishing = results, finishing

    def done(self):
        self._results.job.progress()
        return False  # a mean is decoded when it is waited for

    def wait(self):
        return finished(self._results, {name: finish() for name, finish in self._finishing.items()})
