"""Options that train.py and train_lm.py share, and how both refuse what cannot be done."""

import argparse
import dataclasses
import math
import pathlib

import gcompress
import training_engines


class Refusal(ValueError):
    """Something the user asked for that cannot be done, in one sentence."""


class Parser(argparse.ArgumentParser):
    """Reports wrong arguments as a Refusal, so that one rank prints them and not each."""

    def error(self, message):
        raise Refusal(message)


def at_least(minimum, kind=int):
    """An argparse type: a finite number of `kind` from `minimum` up."""

    def convert(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (minimum <= value < math.inf):
            raise argparse.ArgumentTypeError(f"expected a number from {minimum} up, got {text!r}")
        return value

    return convert


def importable(module):
    try:
        __import__(module)
    except ImportError:
        return False
    return True


def add_exchange(add, compressor, told="%(default)s"):
    """The options of how gradients are exchanged; `told`: what the help says of the default compressor."""
    add("--engine", choices=training_engines.ENGINES, help="default: that of the launcher, without one Horovod")
    add("--compressor", metavar="POLICY|none|fp16", default=compressor, help=f"default: {told}")
    add("--min-numel", type=at_least(0), help="smaller tensors go uncompressed (1024)")
    add("--exchange", choices=gcompress.EXCHANGES, help="how ranks come to the mean (auto)")
    add("--no-error-feedback", dest="error_feedback", action="store_false", help="forget what was not sent")


def add_results(add, moment, panels):
    """The options of what a run leaves behind; `moment`: when a record is written; `panels`: what --plot draws."""
    add("--checkpoint", metavar="DIR", type=pathlib.Path, help=f"write a checkpoint there after each {moment}")
    add("--resume", action="store_true", help="go on from the last checkpoint in --checkpoint DIR")
    add("--log-file", metavar="FILE", help=f"write a JSON line for each {moment} and a final one")
    add("--plot", metavar="FILE", help=f"draw {panels}")
    add("--compare", metavar="FILE", nargs="+", default=[], help="logs of other runs for the same plot")
    add("--progress", choices=("auto", "bar", "lines"), default="auto", help="auto: a bar if on a terminal")


def check_results(arguments, read_log):
    """Refuse what does not go together in `add_results`; returns the curves of --compare."""
    if arguments.resume and not arguments.checkpoint:
        raise Refusal("--resume needs --checkpoint DIR to resume from")
    if arguments.compare and not arguments.plot:
        raise Refusal("--compare needs --plot FILE to draw into")
    if arguments.plot and not importable("matplotlib"):
        raise Refusal("--plot needs matplotlib: pip install matplotlib")
    return [read_log(path) for path in arguments.compare]


def make_folders(arguments, engine):
    """For the files of `add_results`."""
    if engine.rank == 0:
        for path in filter(None, (arguments.log_file, arguments.plot, getattr(arguments, "trace", None))):
            pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)


def refuse_what_is_lacking(engine, arguments):
    """Options of another engine are refused, not ignored."""
    for option in engine.lacks:
        if getattr(arguments, option, None) not in (None, False):
            raise Refusal(f"--{option.replace('_', '-')}: {engine.name} has no such thing")


def compression_of(arguments, engine, **given):
    """What the engine takes as `compression`: one of its own, a Policy, or None.

    Args:
        given: fields of the Policy besides those of `add_exchange`; None leaves a field as the spec has it.
    """
    own = engine.own_compression(arguments.compressor)
    if own is not None or arguments.compressor == "none":
        return own
    return policy_of(arguments, **given)


def policy_of(arguments, **given):
    """The Policy of a spec and of the other options of `add_exchange`."""
    given = {
        "min_numel": arguments.min_numel,
        "exchange": arguments.exchange,
        # Without the option the policy decides: on for biased compressors.
        "error_feedback": None if arguments.error_feedback else False,
        **given,
    }
    policy = gcompress.as_policy(arguments.compressor)
    return dataclasses.replace(policy, **{name: value for name, value in given.items() if value is not None})


def canonical(compressor, engine):
    """The spec in its one canonical form, so that logs and checkpoints compare."""
    if engine.own_compression(compressor) is not None or compressor == "none":
        return compressor
    return str(gcompress.as_policy(compressor))
