"""The server's half of the model, with its optimizer and scheduler, and how it takes a step."""

import contextlib
import copy

import torch
from torch import nn
from torch.nn import functional

from ..errors import ConfigError, ExchangeError, PayloadError
from .codec import Stats, seed_of
from .undo import buffers, restore_buffers

NO_CLASS = -100  # what torch's losses ignore unless they are told otherwise
CLASS_LOSSES = (functional.cross_entropy, functional.nll_loss)
CLASS_LOSS_MODULES = (nn.CrossEntropyLoss, nn.NLLLoss)


class Tail:
    """A model's later layers, with their optimizer and scheduler.

    Args:
        model: takes a batch of activations, returns outputs.
        optimizer: function of the parameters that returns an optimizer; None for SGD(lr=0.1, momentum=0.9).
        scheduler: function of the optimizer that returns a scheduler, stepped once an epoch; or None.
        loss: function of outputs and labels that returns their mean loss.
        seed: of dropout and other random layers. Each step has a random generator of its own, so
            that a step that is done again draws the same numbers.
    """

    def __init__(self, model, optimizer=None, scheduler=None, loss=functional.cross_entropy, seed=0):
        self.model, self.loss, self.seed = model, loss, seed
        self._makers = optimizer or _default_optimizer, scheduler
        # A model without parameters (all layers at the client) has nothing to optimize.
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = self._makers[0](trained) if trained else None
        self.scheduler = scheduler(self.optimizer) if scheduler and self.optimizer else None
        self._pending = self._failure = None

    def copy(self):
        """Another tail, with a copy of these weights."""
        model = copy.deepcopy(self.model)
        return Tail(model, *self._makers, loss=self.loss, seed=self.seed)

    @property
    def device(self):
        return next(self.model.parameters(), torch.empty(0)).device

    def train_step(self, activation, labels, step, encode):
        """Forward pass, backward pass and optimizer step. After an error, `Undo` puts everything back.

        Args:
            activation: float32 batch.
            labels: as `loss` takes them.
            step: number of the step.
            encode: turns the activation's gradient into bytes; raises if it is not finite.

        Returns:
            (Stats, the gradient's bytes).
        """
        outputs, activation = self._forward(activation, step)
        labels = labels.to(self.device)
        loss = self._loss(outputs, labels)
        if not bool(torch.isfinite(loss)):
            raise ExchangeError(f"step {step}: the loss is {loss.item()}: training has diverged (lower the rate?)")
        stats = _stats(loss, outputs, labels)
        return stats, self._backward_and_step(loss, None, activation, encode)

    def forward(self, activation, step):
        """The outputs for a batch (U-shaped); `backward` then takes the step."""
        before = buffers(self.model)
        outputs, activation = self._forward(activation, step)
        self._pending = checked_outputs(outputs), activation, before
        return outputs.detach()

    def backward(self, gradient, encode):
        """Take the step of the last `forward`, from its outputs' gradient; returns the bytes of the activation's."""
        if self._failure:
            raise self._failure  # asked again, since the first answer was lost on the way
        if self._pending is None or self._pending[0].shape != gradient.shape:
            raise PayloadError("gradient: there is no forward pass of this batch that it belongs to")
        outputs, activation, _ = self._pending
        return self._backward_and_step(outputs, gradient.to(outputs.dtype), activation, encode)

    def drop_forward(self, failure=None):
        """Forget the last `forward`, after its step. If the step failed, put buffers back."""
        if self._pending and failure:
            restore_buffers([self.model], self._pending[2])
            self._failure = failure
        self._pending = None

    @torch.no_grad()
    def evaluate(self, activation, labels=None):
        """`Stats` of a batch; if there are no labels, the outputs."""
        self.model.eval()
        outputs = self.model(activation.to(self.device))
        if labels is None:
            return outputs
        labels = labels.to(self.device)
        return _stats(self._loss(outputs, labels), outputs, labels)

    def end_epoch(self):
        """Step the scheduler."""
        if self.scheduler:
            self.scheduler.step()

    def state_dict(self):
        parts = {"optimizer": self.optimizer, "scheduler": self.scheduler}
        return {"model": self.model.state_dict(), **{name: part.state_dict() for name, part in parts.items() if part}}

    def load_state_dict(self, state):
        self.model.load_state_dict(state["model"])
        for name in ("optimizer", "scheduler"):
            if getattr(self, name):
                getattr(self, name).load_state_dict(state[name])
        self._pending = self._failure = None

    def _forward(self, activation, step):
        self.model.train()
        self._pending = self._failure = None
        activation = activation.to(self.device).requires_grad_()
        with _seeded(self.seed, step, self.device):
            return self.model(activation), activation

    def _loss(self, outputs, labels):
        self._check_classes(outputs, labels)
        loss = self.loss(outputs, labels)
        if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
            got = f"shape {tuple(loss.shape)}" if isinstance(loss, torch.Tensor) else type(loss).__name__
            raise ConfigError(f"loss: got {got}, expected one number, the mean over the batch")
        return loss

    def _check_classes(self, outputs, labels):
        """PayloadError for a label that is not a class, if the loss is known to take classes.

        On a GPU such a label would end the process's use of the GPU. Other losses check their labels themselves.
        """
        classes = self.loss in CLASS_LOSSES or isinstance(self.loss, CLASS_LOSS_MODULES)
        if not classes or labels.is_floating_point() or outputs.dim() < 2:
            return
        labels = labels[labels != getattr(self.loss, "ignore_index", NO_CLASS)]
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < outputs.shape[1]:
            low, high = int(labels.min()), int(labels.max())
            raise PayloadError(f"labels: got {low} to {high}, expected classes 0 to {outputs.shape[1] - 1}")

    def _backward_and_step(self, outputs, gradient, activation, encode):
        if self.optimizer:
            self.optimizer.zero_grad()
        outputs.backward(gradient)
        data = encode(activation.grad)  # before anything changes, since it may raise an error
        if self.optimizer:
            self.optimizer.step()
        return data


def checked_outputs(outputs):
    """The outputs that a server is to send; ConfigError unless they are one tensor of floating-point numbers."""
    if not isinstance(outputs, torch.Tensor) or not outputs.is_floating_point():
        got = outputs.dtype if isinstance(outputs, torch.Tensor) else type(outputs).__name__
        raise ConfigError(f"model_tail: its output is {got}, expected one tensor of floating-point numbers")
    return outputs


def _default_optimizer(parameters):
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


@contextlib.contextmanager
def _seeded(seed, step, device):
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed_of(f"tail {seed}", step))
        yield


def _stats(loss, outputs, labels):
    """`Stats` of a batch. Only if the outputs are scores of classes do they count right samples."""
    top1 = top5 = 0
    scores = isinstance(outputs, torch.Tensor) and outputs.dim() == 2 and outputs.shape[1] > 0
    if scores and labels.shape == outputs.shape[:1] and not labels.is_floating_point():
        best = outputs.detach().topk(min(5, outputs.shape[1]), dim=1).indices == labels.unsqueeze(1)
        top1, top5 = int(best[:, 0].sum()), int(best.sum())
    return Stats(float(loss.detach()), top1, top5, len(labels))
