"""The server's part of the model, as functions of the activation for torch's autograd."""

import torch


class Batch:
    """A batch that the server was asked about, and its answer. It lives as long as something needs the result.

    result: the loss or, if U-shaped, the outputs. repeated: whether gradient checkpointing has
    computed this batch again. It may do so once more.
    """

    def __init__(self, activation, labels, before):
        self.activation, self.labels, self.before = activation, labels, before
        self.result = self.gradient = None
        self.repeated = False

    def is_of(self, activation, labels):
        """Whether these are the batch's activation and labels, to the bit."""
        pairs = (self.activation, activation), (self.labels, labels)
        return all(one is other or _equal(one, other) for one, other in pairs)

    def done(self):
        """The gradient was handed on: drop what only a repetition needs."""
        if not self.repeated:
            self.activation = self.labels = self.result = self.gradient = None


def _equal(one, other):
    return isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor) and torch.equal(one, other)


class CutLoss(torch.autograd.Function):
    """The rest of the model and the loss, which the server computes, as one function of the activation."""

    @staticmethod
    def forward(ctx, activation, client, batch, ids):
        if batch.result is None:
            client._train_step(batch, ids)
        ctx.batch = batch
        ctx.save_for_backward(batch.gradient.to(activation.dtype))
        return batch.result.clone()

    @staticmethod
    def backward(ctx, gradient):
        (activation_gradient,) = ctx.saved_tensors  # here gradient checkpointing computes the head again
        ctx.batch.done()
        return activation_gradient * gradient, None, None, None


class CutOutputs(torch.autograd.Function):
    """The server's layers of a U-shaped model as a function of the activation."""

    @staticmethod
    def forward(ctx, activation, client, batch, ids):
        if batch.result is None:
            client._forward_outputs(batch, ids)
        ctx.client, ctx.batch = client, batch
        ctx.save_for_backward(activation)
        return batch.result.clone()

    @staticmethod
    def backward(ctx, gradient):
        ctx.saved_tensors  # noqa: B018 - here gradient checkpointing computes the head again
        result = ctx.client._backward_outputs(ctx.batch, gradient)
        ctx.batch.done()
        return result, None, None, None
