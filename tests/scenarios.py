"""Scenarios: what all ranks of one launch do, one after the other, each with a verdict of its own."""

import json
import time
import traceback


class Scenarios(dict):
    """{name: function}; also the decorator that adds one."""

    def __call__(self, function):
        self[function.__name__] = function
        return function


def failure_of(function, who):
    """Run a function; returns the traceback of its error with `who` it was raised on, or None."""
    try:
        function()
    except Exception:
        return f"{who}:\n{traceback.format_exc()}"


def run_scenarios(scenarios, out, rank, gather):
    """Run {name: function} on every rank; rank 0 writes {name: "ok" or the errors} to a file.

    Args:
        gather: function of an object, returns the list of all ranks' objects on every rank.
    """
    results, started = {}, time.monotonic()
    for name, function in scenarios.items():
        failures = gather(failure_of(function, f"rank {rank}"))
        results[name] = "\n".join(filter(None, failures)) or "ok"
        print(f"{time.monotonic() - started:6.1f} s  {name}", flush=True)
    if rank == 0:
        with open(out, "w") as file:
            json.dump(results, file)
