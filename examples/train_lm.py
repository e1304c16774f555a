#!/usr/bin/env python3
r"""Train a language model of bytes on ranks that seldom speak: outer steps, or gradients in each step.

Four ranks on this machine, the sources of Python's standard library, a transformer of 0.7 million entries. Each
rank takes 15 steps of AdamW by itself; then of what its weights changed by the signs of the largest entries travel,
a seventh of a bit an entry:

    horovodrun -np 4 python examples/train_lm.py
    torchrun --nproc-per-node 4 examples/train_lm.py
    mpirun -np 5 python examples/train_lm.py

(`make outer` does the first, after the run that it is compared with: gradients in float16 in each step. `make
engines` installs MPI.) The launcher tells which engine it is; --engine overrules that. One process, no launcher:

    python examples/train_lm.py

Gradients in each step instead, in full, in float16 or compressed; runs of one seed begin with the same weights and
see the same text:

    horovodrun -np 4 python examples/train_lm.py --sync gradients --compressor none --log-file runs/none.jsonl
    horovodrun -np 4 python examples/train_lm.py --sync gradients --compressor topk:sparsity=0.99
    horovodrun -np 4 python examples/train_lm.py --plot runs/lm.png --compare runs/none.jsonl

Less often, with momentum outside, uncompressed (DiLoCo); in parts while the ranks compute (Streaming DiLoCo):

    horovodrun -np 4 python examples/train_lm.py --every 50 --steps 1000 --compressor none \
        --outer-learning-rate 0.7 --outer-momentum 0.9
    horovodrun -np 4 python examples/train_lm.py --every 30 --fragments 3 --delay 2

A larger model on a text of your own:

    horovodrun -np 4 python examples/train_lm.py --size medium --steps 5000 --data /data/books.txt
    horovodrun -np 4 python examples/train_lm.py --layers 8 --width 256 --heads 8 --context 128

The loss is in nats a byte. It is validated with one fixed set of sequences from files that are not trained on,
right after an exchange where there is one: all ranks' weights are then the same. Seconds are those of training,
exchanges included and validation not. What a rank sends is counted by what it hands over; on the wire an
all-gather passes each payload on to N - 1 ranks, an all-reduce sends 2 (N - 1) / N of a tensor.

Stop at any moment and go on from the last validation, each rank with its own memory and weights:

    horovodrun -np 4 python examples/train_lm.py --checkpoint runs/lm
    horovodrun -np 4 python examples/train_lm.py --checkpoint runs/lm --resume

A resumed run ends with the weights of an uninterrupted one to the bit, if the exchange adds in the same order
each time (`train.py --help` says when that is). On several machines all must see the same checkpoint folder, and
have the same Python, or the same --data.

To take outer steps into a training script of your own, look at `outer` in training_engines.py.
"""

import sys

try:
    import language_options
    import language_report
    import language_training
    import training_report
except ImportError as error:
    sys.exit(f"train_lm.py: error: {error}; `make setup` installs what is needed into .venv")
from command_line import Refusal
from training_start import refused_together, share_cores, start_engine


def load_text(engine, arguments):
    """The text, which must be the same on all ranks."""
    with refused_together(engine):
        text = language_options.load_text(arguments)
    total = engine.sum([text.checksum()])[0]
    with refused_together(engine):
        if total != engine.size * text.checksum():
            raise Refusal("the ranks read different texts: expected one version of Python, or one --data, on all")
    return text


def train(training, log):
    """Steps, records and checkpoints up to the last step."""
    engine, arguments = training.engine, training.arguments
    show = print if engine.rank == 0 else lambda *_, **__: None
    bar = training_report.progress_bar(engine, arguments.progress, "step", training.last_step, training.step)
    with bar:
        while training.step < training.last_step:
            loss = training.train_step()
            bar.update()
            if not bar.disable:
                sent = training_report.in_bytes(engine.exchange.report.sent_bytes)
                bar.set_postfix_str(f"loss {loss:.3f}, sent {sent}", refresh=False)
            if training.validates_now():
                record = training.measured()
                training.curve.append(record)
                log.write(record)
                bar.clear()
                show(language_report.record_line(record, arguments.steps), flush=True)
                if arguments.checkpoint:
                    training.save()
    training.sync.settle()


def main():
    engine = start_engine()
    share_cores(engine)
    with refused_together(engine):
        arguments = language_options.parse_arguments(engine, __doc__)
    if not engine.start(arguments):
        return  # it has served
    text = load_text(engine, arguments)
    training = language_training.LanguageTraining(engine, arguments, text)
    if arguments.resume:
        with refused_together(engine):
            training.resume()
    first = engine.rank == 0
    ranks = training_report.in_ranks(engine.size)
    name = arguments.data or "the standard library"
    size = f"{language_training.numel(training.model):,} entries"
    title = f"{size} on {name}, {engine.name}, {ranks} of {arguments.batch} sequences"
    log = training_report.Log(arguments.log_file if first else None, training.curve)
    if first:
        print(f"{title}, {language_report.run_title(arguments)}", flush=True)
    train(training, log)
    if first and training.curve:
        log.write({"final": True, **training.curve[-1], **language_options.settings(arguments, engine, text)})
        print(f"\n{language_report.summary(training.curve[-1])}", flush=True)
        if arguments.plot:
            language_report.plot(arguments.plot, [training.curve, *arguments.compared], title)
            print(f"plot: {arguments.plot}", flush=True)
    log.close()
    engine.end()


if __name__ == "__main__":
    main()
