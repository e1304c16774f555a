"""A byte-level language model: a decoder of transformer blocks, as small or large as asked for."""

import math
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional

VOCABULARY = 256  # bytes


class Shape(NamedTuple):
    """The size of a model."""

    layers: int
    width: int  # entries of a token's vector; a multiple of `heads`
    heads: int
    context: int  # bytes that a prediction sees at most


# About 0.7, 2.9, 11 and 51 million entries.
SIZES = {
    "tiny": Shape(layers=3, width=128, heads=4, context=64),
    "small": Shape(layers=6, width=192, heads=6, context=128),
    "medium": Shape(layers=6, width=384, heads=6, context=256),
    "large": Shape(layers=16, width=512, heads=8, context=256),
}


class Block(nn.Module):
    """Attention to what came before, then a perceptron for each place; each sees its input normalised."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.norm_attention, self.norm_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query_key_value, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.expand, self.contract = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        x = x + self.attend(self.norm_attention(x))
        return x + self.contract(functional.gelu(self.expand(self.norm_mlp(x))))

    def attend(self, x):
        batch, length, width = x.shape
        # (3, batch, heads, length, width of a head)
        parts = self.query_key_value(x).view(batch, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        attended = functional.scaled_dot_product_attention(*parts, is_causal=True)
        return self.project(attended.transpose(1, 2).reshape(batch, length, width))


class ByteTransformer(nn.Module):
    """Predicts each next byte from those before it, with learned positions.

    Args:
        shape: its size; `width` must be a multiple of `heads`.
    """

    def __init__(self, shape):
        super().__init__()
        self.shape = shape
        self.bytes = nn.Embedding(VOCABULARY, shape.width)
        self.positions = nn.Embedding(shape.context, shape.width)
        self.blocks = nn.Sequential(*[Block(shape.width, shape.heads) for _ in range(shape.layers)])
        self.norm = nn.LayerNorm(shape.width)
        self.head = nn.Linear(shape.width, VOCABULARY, bias=False)
        self.apply(self._initialise)
        for block in self.blocks:
            # What is added on the way of the residual must not grow with the number of layers.
            for layer in (block.project, block.contract):
                nn.init.normal_(layer.weight, std=0.02 / math.sqrt(2 * shape.layers))

    @staticmethod
    def _initialise(module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def forward(self, tokens):
        """The scores of the next byte: int64 of shape (batch, length) to float of shape (batch, length, 256)."""
        places = torch.arange(tokens.shape[1], device=tokens.device)
        return self.head(self.norm(self.blocks(self.bytes(tokens) + self.positions(places))))


def loss_of(model, sequences):
    """The mean loss in nats a byte; sequences: int64 of shape (batch, length + 1)."""
    scores = model(sequences[:, :-1])
    return functional.cross_entropy(scores.flatten(0, 1), sequences[:, 1:].flatten())


def numel(model):
    return sum(parameter.numel() for parameter in model.parameters())
