"""The command line of train_lm.py, and which of its settings a checkpoint must repeat."""

import argparse

import gcompress
import language_data
import language_model
import language_report
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
    policy_of,
    refuse_what_is_lacking,
)

DEFAULT_COMPRESSORS = {
    "outer": "chain:(topk:sparsity=0.984375,chunk=4096),(sign); mean=senders",
    "gradients": "mask:sparsity=0.99,bits=2",
}
# A resumed run continues the interrupted one only if these are the same; any other difference is refused.
RESUME_MUST_MATCH = (
    "sync",
    "compressor",
    "min_numel",
    "exchange",
    "error_feedback",
    "every",
    "outer_learning_rate",
    "outer_momentum",
    "fragments",
    "delay",
    "layers",
    "width",
    "heads",
    "context",
    "steps",
    "batch",
    "learning_rate",
    "weight_decay",
    "clip_norm",
    "seed",
    "validate_every",
    "validate_sequences",
)
OUTER_DEFAULTS = {"every": 15, "outer_learning_rate": 1.0, "outer_momentum": 0.0, "fragments": 1, "delay": 0}
# Options of train.py that engines ask for.
ABSENT = {"servers": None, "staleness": None, "on_failure": None, "server_momentum": False, "momentum": 0.0}


def build_parser(description):
    parser = Parser(
        prog="train_lm.py",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(**ABSENT)
    add = parser.add_argument_group("what travels").add_argument
    add("--sync", choices=("outer", "gradients"), default="outer", help="what is exchanged (%(default)s)")
    told = ", ".join(f"with --sync {sync} {spec}" for sync, spec in DEFAULT_COMPRESSORS.items())
    add_exchange(add, None, told)
    add("--servers", type=at_least(1), help="ranks that serve, MPI (1)")

    add = parser.add_argument_group("with --sync outer").add_argument
    add("--every", type=at_least(1), metavar="STEPS", help="between two exchanges (15)")
    add("--outer-learning-rate", type=at_least(0, float), metavar="RATE", help="of the mean change (1)")
    add("--outer-momentum", type=at_least(0, float), metavar="MOMENTUM", help="of the mean change (0)")
    add("--fragments", type=at_least(1), help="parts of the model, exchanged in turn (1)")
    add("--delay", type=at_least(0), metavar="STEPS", help="taken while an exchange is under way (0)")

    add_model_and_training(parser)
    add = parser.add_argument_group("results").add_argument
    add("--validate-every", type=at_least(1), metavar="STEPS", help="default: so that there are about 10")
    add("--validate-sequences", type=at_least(1), default=512, metavar="N", help="of all ranks (%(default)s)")
    add_results(add, "validation", "validation loss against steps, bytes and seconds")
    return parser


def add_model_and_training(parser):
    add = parser.add_argument_group("model and data").add_argument
    add("--size", choices=language_model.SIZES, default="tiny", help="0.7, 2.9, 11 or 51 million entries (%(default)s)")
    add("--layers", type=at_least(1), help="instead of those of --size")
    add("--width", type=at_least(1), help="instead of that of --size; a multiple of --heads")
    add("--heads", type=at_least(1), help="instead of those of --size")
    add("--context", type=at_least(1), metavar="BYTES", help="instead of that of --size")
    add("--data", metavar="FILE", help="train on its bytes (the sources of Python's standard library)")

    add = parser.add_argument_group("training").add_argument
    add("--steps", type=at_least(1), default=300, help="default: %(default)s")
    add("--batch", type=at_least(1), default=16, help="sequences per rank and step (%(default)s)")
    add("--learning-rate", type=at_least(0, float), default=2e-3, metavar="RATE", help="AdamW's highest (%(default)s)")
    add("--weight-decay", type=at_least(0, float), default=0.01, metavar="DECAY", help="AdamW's (%(default)s)")
    add("--clip-norm", type=at_least(0, float), metavar="NORM", help="clip the gradient of all weights to this norm")
    add("--seed", type=at_least(0), default=1, help="of initial weights and batches (%(default)s)")
    add("--max-steps", type=at_least(1), metavar="N", help="stop after N steps as if interrupted, for tests")


def parse_arguments(engine, description):
    arguments = build_parser(description).parse_args()
    refuse_what_is_lacking(engine, arguments)
    take_outer(arguments, engine)
    take_shape(arguments)
    arguments.compared = check_results(arguments, language_report.read_log)
    default = DEFAULT_COMPRESSORS[arguments.sync]
    # Servers have no `mean=senders`.
    arguments.compressor = arguments.compressor or (
        default.partition(";")[0] if "exchange" in engine.lacks else default
    )
    build_compression(arguments, engine)
    if arguments.sync == "gradients":
        arguments.compressor = canonical(arguments.compressor, engine)
    elif arguments.compressor != "none":
        arguments.compressor = str(gcompress.as_policy(arguments.compressor))
    arguments.validate_every = validation_period(arguments)
    make_folders(arguments, engine)
    return arguments


def take_outer(arguments, engine):
    """Refuse options of outer steps where there are none, and fill in their defaults."""
    for name, default in OUTER_DEFAULTS.items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, default)
        elif arguments.sync != "outer":
            raise Refusal(f"--{name.replace('_', '-')}: --sync {arguments.sync} has no such thing")
    if arguments.sync == "outer" and "outer" in engine.lacks:
        raise Refusal(f"--sync outer: {engine.name} has no such thing")
    if not arguments.outer_learning_rate:
        raise Refusal("--outer-learning-rate 0: expected more than 0")
    if arguments.outer_momentum >= 1:
        raise Refusal(f"--outer-momentum {arguments.outer_momentum:g}: expected less than 1")
    if arguments.fragments > arguments.every:
        raise Refusal(f"--fragments {arguments.fragments}: expected at most --every {arguments.every}")
    if arguments.delay > arguments.every // arguments.fragments:
        most = arguments.every // arguments.fragments
        raise Refusal(f"--delay {arguments.delay}: expected at most {most}, --every by --fragments")


def take_shape(arguments):
    """The model's size: that of --size, but for what has an option of its own."""
    for name, value in language_model.SIZES[arguments.size]._asdict().items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    if arguments.width % arguments.heads:
        raise Refusal(f"--width {arguments.width}: expected a multiple of --heads {arguments.heads}")


def validation_period(arguments):
    """Steps between validations: where there are outer steps, the ranks' weights are the same after them only."""
    period = arguments.validate_every or -(-arguments.steps // 10)
    return -(-period // arguments.every) * arguments.every if arguments.sync == "outer" else period


def build_compression(arguments, engine):
    """What the engine's `wrap` or `outer` takes as `compression`."""
    if arguments.sync == "gradients":
        return compression_of(arguments, engine)
    return None if arguments.compressor == "none" else policy_of(arguments)


def load_text(arguments):
    return language_data.load(arguments.data, arguments.context)


def settings(arguments, engine, text):
    """What a checkpoint records of the run, and a resumed one must repeat."""
    return {
        "engine": engine.name,
        "world_size": engine.size,
        "text": text.checksum(),
        **{name: getattr(arguments, name) for name in RESUME_MUST_MATCH},
    }
