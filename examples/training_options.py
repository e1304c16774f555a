"""The options of train.py, what they mean together, and which of them a checkpoint must repeat."""

import argparse
import math

import image_data
import image_training
import training_report
from command_line import (
    Parser,
    Refusal,
    add_exchange,
    add_results,
    at_least,
    canonical,
    check_results,
    compression_of,
    make_folders,
    refuse_what_is_lacking,
)

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


def build_parser(description):
    parser = Parser(
        prog="train.py",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument_group("gradient compression").add_argument
    add_exchange(add, DEFAULT_COMPRESSOR)
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
    add_results(add, "epoch", "accuracy against steps and against bytes")
    add("--trace", metavar="FILE", help="write when the first steps encode, send, wait and decode, and show a table")
    return parser


def parse_arguments(engine, description):
    arguments = build_parser(description).parse_args()
    refuse_what_is_lacking(engine, arguments)
    arguments.compared = check_results(arguments, training_report.read_log)
    build_compression(arguments, engine)
    arguments.compressor = canonical(arguments.compressor, engine)
    make_folders(arguments, engine)
    return arguments


def build_compression(arguments, engine):
    """What the engine takes as `compression`: one of its own, a Policy, or None."""
    if engine.own_compression(arguments.compressor) is not None or arguments.compressor == "none":
        if arguments.momentum_correction or arguments.warmup_steps or arguments.clip:
            raise Refusal("--momentum-correction, --warmup-steps and --clip need a compressor with a memory")
    return compression_of(
        arguments,
        engine,
        momentum=arguments.momentum if arguments.momentum_correction else None,
        # Each rank's share of the limit for the mean.
        clip=arguments.clip / math.sqrt(engine.size) if arguments.clip else None,
        warmup_steps=arguments.warmup_steps,
    )


def settings(arguments, engine):
    """What a checkpoint records of the arguments, and a resumed run must repeat."""
    return {
        "engine": engine.name,
        "world_size": engine.size,
        **{name: getattr(arguments, name) for name in RESUME_MUST_MATCH},
    }
