"""The options of train.py, what they mean together, and which of them a checkpoint must repeat."""

import argparse
import dataclasses
import math
import pathlib

import gcompress
import image_data
import image_training
import training_engines
import training_report

DEFAULT_COMPRESSOR = "mask:sparsity=0.99,bits=2"
# A resumed run continues the interrupted one only if these are the same; any other difference is refused.
RESUME_MUST_MATCH = (
    "compressor",
    "min_numel",
    "exchange",
    "error_feedback",
    "momentum_correction",
    "clip",
    "warmup_steps",
    "model",
    "dataset",
    "image_size",
    "epochs",
    "batch_size",
    "lr",
    "momentum",
    "weight_decay",
    "seed",
    "limit_train",
    "amp",
)


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


def build_parser(description):
    parser = Parser(
        prog="train.py",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument_group("gradient compression").add_argument
    add("--engine", choices=training_engines.ENGINES, help="default: that of the launcher, without one Horovod")
    add("--compressor", metavar="POLICY|none|fp16", default=DEFAULT_COMPRESSOR, help="default: %(default)s")
    add("--min-numel", type=at_least(0), help="smaller tensors go uncompressed (1024)")
    add("--exchange", choices=gcompress.EXCHANGES, help="how ranks come to the mean (auto)")
    add("--no-error-feedback", dest="error_feedback", action="store_false", help="forget what was not sent")
    add("--momentum-correction", action="store_true", help="apply --momentum before compressing, for very sparse ones")
    add("--warmup-steps", type=at_least(0), help="keep more in that many first steps (0)")
    add("--clip", type=at_least(0, float), metavar="NORM", help="clip each tensor's gradient, averaged, to this norm")

    add = parser.add_argument_group("parameter servers over MPI").add_argument
    add("--servers", type=at_least(1), help="ranks that serve (1)")
    add("--staleness", type=at_least(0), help="rounds that workers may be ahead (0)")
    add("--server-momentum", action="store_true", help="the servers keep --momentum")
    add("--on-failure", choices=("end", "continue"), help="what becomes of the job when a worker dies (end)")

    add = parser.add_argument_group("model and data").add_argument
    add("--model", default="cnn", help="cnn, or the name of any torchvision classifier (%(default)s)")
    add("--dataset", choices=image_data.NAMES, default="fashion-mnist", help="default: %(default)s")
    add("--data", metavar="PATH", help="folder of the data set; for `folder`: one with train/ and val/")
    add("--image-size", type=at_least(1), help="resize images to squares of this side in pixels")
    add("--limit-train", type=at_least(1), metavar="N", help="use the first N training images only")
    add("--limit-test", type=at_least(1), metavar="N", help="use the first N test images only")

    add = parser.add_argument_group("training").add_argument
    add("--epochs", type=at_least(1), default=10, help="default: %(default)s")
    add("--batch-size", type=at_least(1), default=64, help="images per rank and step (%(default)s)")
    add("--lr", type=at_least(0, float), default=0.1, help="peak learning rate (%(default)s)")
    add("--momentum", type=at_least(0, float), default=0.9, help="default: %(default)s")
    add("--weight-decay", type=at_least(0, float), default=1e-4, help="default: %(default)s")
    add("--seed", type=at_least(0), default=1, help="of initial weights and batches (%(default)s)")
    image_training.add_amp(add)
    add("--max-steps", type=at_least(1), metavar="N", help="stop after N steps as if interrupted, for tests")

    add = parser.add_argument_group("results").add_argument
    add("--checkpoint", metavar="DIR", type=pathlib.Path, help="write a checkpoint there after each epoch")
    add("--resume", action="store_true", help="go on from the last checkpoint in --checkpoint DIR")
    add("--log-file", metavar="FILE", help="write a JSON line for each epoch and a final one")
    add("--plot", metavar="FILE", help="draw accuracy against steps and against bytes")
    add("--compare", metavar="FILE", nargs="+", default=[], help="logs of other runs for the same plot")
    add("--progress", choices=("auto", "bar", "lines"), default="auto", help="auto: a bar if on a terminal")
    return parser


def importable(module):
    try:
        __import__(module)
    except ImportError:
        return False
    return True


def parse_arguments(engine, description):
    arguments = build_parser(description).parse_args()
    for option in engine.lacks:
        if getattr(arguments, option) not in (None, False):
            raise Refusal(f"--{option.replace('_', '-')}: {engine.name} has no such thing")
    if arguments.resume and not arguments.checkpoint:
        raise Refusal("--resume needs --checkpoint DIR to resume from")
    if arguments.compare and not arguments.plot:
        raise Refusal("--compare needs --plot FILE to draw into")
    if arguments.plot and not importable("matplotlib"):
        raise Refusal("--plot needs matplotlib: pip install matplotlib")
    arguments.compared = [training_report.read_log(path) for path in arguments.compare]
    build_compression(arguments, engine)
    if engine.own_compression(arguments.compressor) is None and arguments.compressor != "none":
        # The spec in its one canonical form, so that logs and checkpoints compare.
        arguments.compressor = str(gcompress.as_policy(arguments.compressor))
    if engine.rank == 0:
        for path in filter(None, (arguments.log_file, arguments.plot)):
            pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
    return arguments


def build_compression(arguments, engine):
    """What the engine takes as `compression`: one of its own, a Policy, or None."""
    own = engine.own_compression(arguments.compressor)
    if own is not None or arguments.compressor == "none":
        if arguments.momentum_correction or arguments.warmup_steps or arguments.clip:
            raise Refusal("--momentum-correction, --warmup-steps and --clip need a compressor with a memory")
        return own
    given = {
        "min_numel": arguments.min_numel,
        "exchange": arguments.exchange,
        # Without the option the policy decides: on for biased compressors.
        "error_feedback": None if arguments.error_feedback else False,
        "momentum": arguments.momentum if arguments.momentum_correction else None,
        # Each rank's share of the limit for the mean.
        "clip": arguments.clip / math.sqrt(engine.size) if arguments.clip else None,
        "warmup_steps": arguments.warmup_steps,
    }
    policy = gcompress.as_policy(arguments.compressor)
    return dataclasses.replace(policy, **{name: value for name, value in given.items() if value is not None})


def settings(arguments, engine):
    """What a checkpoint records of the arguments, and a resumed run must repeat."""
    return {
        "engine": engine.name,
        "world_size": engine.size,
        **{name: getattr(arguments, name) for name in RESUME_MUST_MATCH},
    }
