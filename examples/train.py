#!/usr/bin/env python3
r"""Train an image classifier, its gradients compressed by gcompress, on any engine.

Four ranks on this machine and Fashion-MNIST; of each gradient the largest 1 % are sent exactly and the other
entries in 2 bits:

    horovodrun -np 4 python examples/train.py
    torchrun --nproc-per-node 4 examples/train.py
    mpirun -np 6 python examples/train.py --servers 2
    python -m gcompress.plugins.byteps.launch -np 4 --servers 2 python examples/train.py

(`make train` does the first, and installs and downloads what is needed before. `make engines` installs MPI and
BytePS.) The launcher tells which engine it is; --engine overrules that. One process, no launcher:

    python examples/train.py

Another compressor, or none, with the same initial weights and the same batches, so that accuracies
compare step by step, on all engines:

    horovodrun -np 4 python examples/train.py --compressor topk:sparsity=0.99
    horovodrun -np 4 python examples/train.py --compressor topk:sparsity=0.999 --momentum-correction \
        --warmup-steps 400
    torchrun --nproc-per-node 4 examples/train.py --compressor quantize:bits=4 --exchange twophase
    horovodrun -np 4 python examples/train.py --compressor fp16
    horovodrun -np 4 python examples/train.py --amp fp16
    horovodrun -np 4 python examples/train.py --compressor none --log-file runs/none.jsonl
    horovodrun -np 4 python examples/train.py --plot runs/both.png --compare runs/none.jsonl

Another model (any of torchvision's classifiers) on another data set:

    horovodrun -np 4 python examples/train.py --model resnet18 --dataset cifar100 --data /data/cifar
    horovodrun -np 4 python examples/train.py --model resnet50 --dataset folder --data /data/flowers \
        --image-size 224

Parameter servers over MPI: workers that may be three rounds ahead of the slowest one, momentum kept by the
servers, and going on with the rest when a worker dies:

    mpirun -np 6 python examples/train.py --servers 2 --staleness 3 --server-momentum
    mpirun --with-ft ulfm -np 6 python examples/train.py --servers 2 --on-failure continue

Stop at any moment and go on from the last whole epoch, with each rank's error feedback as it was (BytePS cannot
save its own):

    horovodrun -np 4 python examples/train.py --checkpoint runs/a
    horovodrun -np 4 python examples/train.py --checkpoint runs/a --resume

A resumed run ends with the weights of an uninterrupted one to the bit, if the exchange adds in the same order
each time. All-gathers of compressed gradients do. Horovod's ring all-reduce of floats (`none`, `fp16`, and
tensors below --min-numel) does so with two ranks; with more the order depends on which tensors Horovod fused,
unless HOROVOD_FUSION_THRESHOLD=0 is set. On several machines all must see the same checkpoint folder.

To take gcompress into a training script of your own, look at `wrap` of your engine in training_engines.py: it is
an import and one call and, for checkpoints, one state per rank.
"""

import sys
import time

import torch
from torch.nn import functional

try:
    import gcompress
    import image_data
    import image_training
    import training_checkpoint
    import training_options
    import training_report
except ImportError as error:
    sys.exit(f"train.py: error: {error}; `make setup` installs what is needed into .venv")
from command_line import Refusal
from image_training import build_model, learning_rate, rank_batches
from training_options import build_compression, settings
from training_start import refused_together, share_cores, start_engine

TEST_BATCH = 500


class Training:
    """One run: the model, its optimizer and exchange, the data, and how far it has come."""

    def __init__(self, engine, arguments, data, model):
        self.engine, self.arguments, self.data, self.model = engine, arguments, data, model
        compression = build_compression(arguments, engine)
        parameters = [{"params": list(model.parameters()), "weight_decay": arguments.weight_decay}]
        if isinstance(compression, gcompress.Policy) and compression.momentum:
            named = model.named_parameters()
            parameters = gcompress.parameter_groups(named, compression, weight_decay=arguments.weight_decay)
        momentum = 0.0 if arguments.server_momentum else arguments.momentum
        optimizer = torch.optim.SGD(parameters, lr=arguments.lr, momentum=momentum)
        self.optimizer, self.network = engine.wrap(optimizer, model, compression, arguments)
        self.scaler = image_training.loss_scaler(arguments)
        self.steps_per_epoch = len(data.train_images) // (arguments.batch_size * engine.size)
        self.total_steps = self.steps_per_epoch * arguments.epochs
        self.last_step = min(self.total_steps, arguments.max_steps or self.total_steps)
        self.epoch, self.step, self.seconds, self.curve = 0, 0, 0.0, []

    def batches(self):
        """This rank's batches of the epoch."""
        seed, size = self.arguments.seed, self.arguments.batch_size
        for images, labels in rank_batches(self.data, seed, self.epoch, size, self.engine.rank, self.engine.size):
            yield self.prepared(images), labels

    def prepared(self, images):
        images = self.data.normalised(images)
        size = self.arguments.image_size
        if size and images.shape[2:] != (size, size):
            images = functional.interpolate(images, (size, size), mode="bilinear", antialias=True)
        return images

    def train_step(self, images, labels):
        """One step; returns the loss and the number of images that were classified correctly."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, self.total_steps, self.arguments.lr)

        def loss_of():
            outputs = self.network(images)
            return functional.cross_entropy(outputs, labels), outputs

        loss, outputs = image_training.step_of(
            self.optimizer, self.scaler, loss_of, self.step, self.engine.rank, self.arguments
        )
        self.step += 1
        return loss.item(), (outputs.argmax(1) == labels).sum().item()

    def train_epoch(self):
        """Train for an epoch, or up to the last step allowed; returns this rank's sums for `measured`."""
        self.network.train()
        started, loss_sum, correct, seen = time.perf_counter(), 0.0, 0, 0
        total = min(self.steps_per_epoch, self.last_step - self.step)
        title = f"epoch {self.epoch + 1}/{self.arguments.epochs}"
        with training_report.progress_bar(self.engine, self.arguments.progress, title, total) as bar:
            for images, labels in self.batches():
                if self.step >= self.last_step:
                    break
                loss, right = self.train_step(images, labels)
                seen, correct, loss_sum = seen + len(labels), correct + right, loss_sum + loss * len(labels)
                bar.update()
                if not bar.disable:
                    bar.set_postfix_str(self.progress_text(loss_sum / seen, correct / seen), refresh=False)
        self.seconds += time.perf_counter() - started
        self.epoch += 1
        return loss_sum, correct, seen

    def progress_text(self, loss, accuracy):
        report = self.engine.exchange.report
        sent = training_report.in_bytes(report.sent_bytes)
        ratio = training_report.ratio(report.fp32_bytes, report.sent_bytes)
        return f"loss {loss:.3f}, {100 * accuracy:.1f} %, sent {sent}, {ratio:.0f}x below fp32"

    def test(self):
        """Classify this rank's share of the test set; returns (correct, seen)."""
        # Running statistics of normalisation layers differ between ranks: rank 0's are tested and kept.
        buffers = dict(self.model.named_buffers())
        if buffers:
            self.engine.broadcast(buffers)
        self.model.eval()
        share = slice(self.engine.rank, None, self.engine.size)
        images, labels = self.data.test_images[share], self.data.test_labels[share]
        correct = 0
        with torch.inference_mode():
            for first in range(0, len(images), TEST_BATCH):
                part = slice(first, first + TEST_BATCH)
                correct += (self.model(self.prepared(images[part])).argmax(1) == labels[part]).sum().item()
        return correct, len(images)

    def measured(self, trained):
        """Sum the counts of all ranks and return the epoch's record."""
        loss, correct, seen, test_correct, test_seen = self.engine.sum([*trained, *self.test()])
        report = self.engine.exchange.report.counts()
        return {
            "engine": self.engine.name,
            "compressor": self.arguments.compressor,
            "world_size": self.engine.size,
            "epoch": self.epoch,
            "step": self.step,
            "gradient_steps": report.pop("steps"),
            "seconds": round(self.seconds, 3),
            "train_loss": loss / max(seen, 1),
            "train_accuracy": correct / max(seen, 1),
            "test_accuracy": test_correct / test_seen,
            "weights": image_training.checksum(self.model),
            **report,
        }


def epoch_line(record, epochs):
    ratio = training_report.ratio(record["fp32_bytes"], record["sent_bytes"])
    sent = f"{training_report.in_bytes(record['sent_bytes'])} ({ratio:.1f}x below fp32)"
    return (
        f"epoch {record['epoch']:>2}/{epochs}  step {record['step']:>5}  loss {record['train_loss']:.4f}  "
        f"train {100 * record['train_accuracy']:.2f} %  test {100 * record['test_accuracy']:.2f} %  "
        f"sent {sent}  {record['seconds']:.1f} s"
    )


def start(engine, arguments, data):
    """Build the model and the optimizer alike on all ranks, or take them up from the checkpoint."""
    torch.manual_seed(arguments.seed)
    with refused_together(engine):
        model = build_model(arguments.model, data)
        if len(data.train_images) < arguments.batch_size * engine.size:
            raise Refusal(
                f"{len(data.train_images)} training images are not enough for one step of "
                f"{training_report.in_ranks(engine.size)} with --batch-size {arguments.batch_size}"
            )
    training = Training(engine, arguments, data, model)
    # From here on each rank draws its own dropout; initial weights are drawn.
    torch.manual_seed(arguments.seed * 1_000_003 + 1 + engine.rank)
    if arguments.resume:
        with refused_together(engine):
            training_checkpoint.resume(training, settings(arguments, engine))
    engine.broadcast(model.state_dict())
    return training


def load_data(engine, arguments):
    with refused_together(engine):
        # One rank of each machine downloads; the others wait for it at the end of this block.
        if engine.local_rank == 0:
            image_data.download_if_missing(arguments.dataset, arguments.data)
    with refused_together(engine):
        limits = (arguments.limit_train, arguments.limit_test)
        return image_data.load(arguments.dataset, arguments.data, arguments.image_size, *limits)


def main():
    engine = start_engine()
    share_cores(engine)
    with refused_together(engine):
        arguments = training_options.parse_arguments(engine, __doc__)
    if not engine.start(arguments):
        return  # it has served
    data = load_data(engine, arguments)
    training = start(engine, arguments, data)
    first = engine.rank == 0
    ranks = training_report.in_ranks(engine.size)
    title = f"{arguments.model} on {arguments.dataset}, {engine.name}, {ranks} of {arguments.batch_size} images"
    log = training_report.Log(arguments.log_file if first else None, training.curve)
    if first:
        numel = sum(parameter.numel() for parameter in training.model.parameters())
        print(f"{title}, {numel} parameters, compressor {arguments.compressor}", flush=True)
        plan = getattr(engine.exchange, "plan", None)
        if plan and engine.size > 1:
            print(plan, flush=True)
    if arguments.trace:
        engine.exchange.trace(arguments.trace)
    while training.step < training.last_step:
        record = training.measured(training.train_epoch())
        training.curve.append(record)
        log.write(record)
        if first:
            print(epoch_line(record, arguments.epochs), flush=True)
        if arguments.checkpoint and training.step == training.epoch * training.steps_per_epoch:
            training_checkpoint.save(training, settings(arguments, engine))
    if first and training.curve:
        final = {"final": True, **training.curve[-1], **settings(arguments, engine)}
        log.write(final)
        print(f"\n{training_report.table(final, engine.size)}", flush=True)
        if arguments.trace:
            print(f"\n{engine.exchange.report.times}", flush=True)
        if arguments.plot:
            training_report.plot(arguments.plot, [training.curve, *arguments.compared], title)
            print(f"plot: {arguments.plot}", flush=True)
    log.close()
    engine.end()


if __name__ == "__main__":
    main()
