"""One run of train_lm.py: its steps, what is exchanged between them, validation, and how far it has come."""

import contextlib
import time

import torch

import image_training
import language_data
import language_report
import training_checkpoint
from language_model import ByteTransformer, Shape, loss_of, numel
from language_options import build_compression, settings

VALIDATION_BATCH = 64  # sequences
SHARED_FILE = "run.pt"


class Gradients:
    """Every step takes the mean of the ranks' gradients."""

    def __init__(self, engine, optimizer, model, arguments):
        self._engine = engine
        compression = build_compression(arguments, engine)
        self.optimizer, self.network = engine.wrap(optimizer, model, compression, arguments)
        engine.broadcast(model.state_dict())

    def step(self, clip):
        # Horovod and MPI wait for the means here; DDP has them already.
        if hasattr(self.optimizer, "synchronize"):
            self.optimizer.synchronize()
        clip()
        with getattr(self.optimizer, "skip_synchronize", contextlib.nullcontext)():
            self.optimizer.step()

    def finish(self):
        """Nothing is under way between steps, here and in `settle`."""

    settle = finish

    @property
    def rounds(self):
        return self._engine.exchange.report.steps

    def state_dict(self):
        return {"optimizer": self.optimizer.state_dict(), "exchange": self._engine.exchange.state_dict()}

    def load_state_dict(self, state):
        self.optimizer.load_state_dict(state["optimizer"])
        self._engine.exchange.load_state_dict(state["exchange"])


class Outer:
    """Every rank steps alone, and every so often they take the mean of what has changed."""

    def __init__(self, engine, optimizer, model, arguments):
        self.network = model
        self.optimizer = engine.outer(optimizer, model, build_compression(arguments, engine), arguments)
        self.finish = self.optimizer.finish
        self.state_dict, self.load_state_dict = self.optimizer.state_dict, self.optimizer.load_state_dict

    def step(self, clip):
        clip()
        self.optimizer.step()

    def settle(self):
        """Wait for an exchange that is under way: a rank that ended before it would fail the others."""
        self.optimizer.receive()

    @property
    def rounds(self):
        return self.optimizer.rounds


KINDS = {"gradients": Gradients, "outer": Outer}


class LanguageTraining:
    """A model, its optimizer and exchange, the text, and how far the run has come."""

    def __init__(self, engine, arguments, text):
        self.engine, self.arguments, self.text = engine, arguments, text
        self.shape = Shape(*(getattr(arguments, name) for name in Shape._fields))
        torch.manual_seed(arguments.seed)
        self.model = ByteTransformer(self.shape)
        optimizer = torch.optim.AdamW(self.model.parameters(), weight_decay=arguments.weight_decay)
        self.sync = KINDS[arguments.sync](engine, optimizer, self.model, arguments)
        context, size = arguments.context, arguments.validate_sequences
        self.held_out = language_data.validation_share(text, context, size, engine.rank, engine.size)
        self.last_step = min(arguments.steps, arguments.max_steps or arguments.steps)
        self.step, self.seconds, self.curve = 0, 0.0, []
        self._loss_sum, self._steps = 0.0, 0  # since the last record

    def clip(self):
        if self.arguments.clip_norm:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.arguments.clip_norm)

    def train_step(self):
        """One step, with the last exchange after the last one; returns this rank's loss."""
        started, given = time.perf_counter(), self.arguments
        for group in self.sync.optimizer.param_groups:  # other ones once a state was loaded
            group["lr"] = image_training.learning_rate(self.step, given.steps, given.learning_rate)
        sequences = language_data.training_batch(
            self.text, given.context, given.batch, given.seed, self.engine.rank, self.step
        )
        self.sync.optimizer.zero_grad()
        loss = loss_of(self.sync.network, sequences)
        loss.backward()
        self.sync.step(self.clip)
        self.step += 1
        if self.step == given.steps:
            self.sync.finish()
        self.seconds += time.perf_counter() - started
        self._loss_sum, self._steps = self._loss_sum + loss.item(), self._steps + 1
        return loss.item()

    def validates_now(self):
        return self.step == self.arguments.steps or self.step % self.arguments.validate_every == 0

    def validation_sums(self):
        """This rank's share of the validation set: (sum of the losses of its sequences, how many they are)."""
        with torch.inference_mode():
            parts = self.held_out.split(VALIDATION_BATCH)
            return sum(len(part) * loss_of(self.model, part).item() for part in parts if len(part)), len(self.held_out)

    def measured(self):
        """Validate on all ranks and return the record of the run so far."""
        sums = [self._loss_sum, self._steps, *self.validation_sums()]
        loss, steps, held_out_loss, held_out = self.engine.sum(sums)
        self._loss_sum, self._steps = 0.0, 0
        report, tokens = self.engine.exchange.report, self.arguments.batch * self.arguments.context * self.engine.size
        return {
            "engine": self.engine.name,
            "title": language_report.run_title(self.arguments),
            "world_size": self.engine.size,
            "numel": numel(self.model),
            "step": self.step,
            "rounds": self.sync.rounds,
            "seconds": round(self.seconds, 3),
            "tokens_per_second": round(tokens * self.step / self.seconds, 1),
            "train_loss": loss / max(steps, 1),
            "validation_loss": held_out_loss / held_out,
            "sent_bytes": report.sent_bytes,
            "wire_bytes": report.wire_bytes,
            "weights": image_training.checksum(self.model),
        }

    def save(self):
        """Write the checkpoint of this step; weights too are each rank's own, between outer steps."""
        own = {"model": self.model.state_dict(), "sync": self.sync.state_dict(), "rng": torch.get_rng_state()}
        shared = {
            "settings": settings(self.arguments, self.engine, self.text),
            "step": self.step,
            "seconds": self.seconds,
            "curve": self.curve,
        }
        root, name = self.arguments.checkpoint, f"step-{self.step:07}"
        training_checkpoint.write_folder(self.engine, root, name, shared, own, SHARED_FILE)

    def resume(self):
        """Go to where the last checkpoint's run was; CannotResume if that cannot be done."""
        wanted = settings(self.arguments, self.engine, self.text)
        shared, own = training_checkpoint.read_folder(self.engine, self.arguments.checkpoint, wanted, SHARED_FILE)
        self.model.load_state_dict(own["model"])
        self.sync.load_state_dict(own["sync"])
        torch.set_rng_state(own["rng"])
        self.step, self.seconds, self.curve = shared["step"], shared["seconds"], shared["curve"]
