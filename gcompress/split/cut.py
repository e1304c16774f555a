"""Cut a model in two or more parts that run one after the other."""

from __future__ import annotations

import contextlib
import difflib
import operator
import threading
from collections.abc import Sequence

import torch
from torch import fx, nn

from ..errors import ConfigError

SEVERAL = (nn.RNNBase, nn.LSTMCell, nn.MultiheadAttention)  # modules of torch whose output is a tuple
_TRACING = threading.Lock()  # torch.fx patches nn.Module for all threads while it traces


class Part(nn.Module):
    """One part of a cut model. It has the model's own submodules, parameters and names, in the model's order.

    The model is traced twice, in train() and in eval() mode, since it may run other code in each
    (functional dropout, auxiliary outputs).
    """

    def __init__(self, model, graphs):
        super().__init__()
        modules = {mode: fx.GraphModule(model, graph, "Part") for mode, graph in graphs.items()}
        for module in modules.values():  # registered here once, by their names in the model
            for name, child in module.named_children():
                self.add_module(name, child)
            for name, parameter in module.named_parameters(recurse=False):
                self.register_parameter(name, parameter)
            for name, buffer in module.named_buffers(recurse=False):
                self.register_buffer(name, buffer)
        # Not submodules: their parameters are those registered above.
        object.__setattr__(self, "_modes", modules)
        self.train(model.training)

    def forward(self, value):
        return self._modes[self.training](value)


def cut(model: torch.nn.Module, *at: int | str) -> list[Part]:
    """Cut a model after the named submodules.

    Args:
        model: any module that torch.fx can trace and whose forward takes one tensor: an
            nn.Sequential, torchvision's classifiers, your own.
        at: where to cut: after the submodule of this dotted name (`"layer2"`, `"layer3.0"`,
            `"features.17"`, `"encoder.layers.encoder_layer_3"`), or, in an nn.Sequential, after
            this many modules. Each cut gives one more part.

    Cut before other threads run models: while torch.fx traces, it changes nn.Module for all threads.

    Returns:
        The parts, a list of modules that share the model's parameters and their names:
        `parts[1](parts[0](x))` is `model(x)`. A state dict's names are those in the model.

    Raises:
        ConfigError: there is no such submodule, or more than one tensor would cross the cut
            (within a residual block, for instance). If the submodule returns a tuple or a dict, as
            nn.LSTM does, the layers behind the cut may use one tensor of it.

    >>> from torch import nn
    >>> head, tail = cut(nn.Sequential(nn.Linear(9, 4), nn.ReLU(), nn.Linear(4, 2)), 2)
    >>> list(tail.state_dict())
    ['2.weight', '2.bias']
    """
    if not at:
        raise ConfigError("at: got nothing, expected the name of at least one submodule to cut after")
    names = [_name(model, place) for place in at]
    pieces = {}
    with _TRACING, kept_modes(model):
        for mode in (True, False):
            model.train(mode)
            pieces[mode] = _pieces(fx.Tracer().trace(model), names, dict(model.named_modules()))
    graphs = zip(pieces[True], pieces[False], strict=True)
    return [Part(model, {True: trained, False: evaluated}) for trained, evaluated in graphs]


def _name(model, place):
    if isinstance(place, int) and not isinstance(place, bool) and isinstance(model, nn.Sequential):
        if not 1 <= place < len(model):
            raise ConfigError(f"at: got {place}, expected 1 to {len(model) - 1} of the {len(model)} modules")
        return list(model._modules)[place - 1]
    names = [name for name, _ in model.named_modules() if name]
    if place not in names:
        near = difflib.get_close_matches(str(place), names, 3) or names[:8]
        raise ConfigError(f"at: got {place!r}, expected the name of a submodule such as {', '.join(near)}")
    return place


def _pieces(graph, names, modules):
    """The graph, cut after each named submodule, as graphs of one input and one output."""
    nodes = list(graph.nodes)
    ends = [_last_node(nodes, name) for name in names]
    if ends != sorted(set(ends)):
        raise ConfigError(f"at: got {', '.join(names)}, expected the order in which the model runs them")
    edges, crossing = [0], [None]
    for name, end in zip(names, ends, strict=True):
        end, value = _crossing_value(nodes, end, name, modules)
        edges.append(end + 1)
        crossing.append(value)
    edges.append(len(nodes))
    stretches = zip(edges, edges[1:], crossing, [*crossing[1:], None], strict=False)
    return [_copy(nodes[low:high], entry, result) for low, high, entry, result in stretches]


def _last_node(nodes, name):
    inside = [number for number, node in enumerate(nodes) if name in node.meta.get("nn_module_stack", {})]
    if not inside:
        raise ConfigError(f"at: the model does not run {name!r}")
    return inside[-1]


def _crossing_value(nodes, end, name, modules):
    """(where the first part ends, the node that crosses): the submodule's output, or the one item of it in use."""
    output = nodes[end]
    last, items = end, []
    while _is_item(nodes[last + 1], [output, *items]):
        last += 1
        items.append(nodes[last])
    several = output.op == "call_module" and isinstance(modules.get(output.target), SEVERAL)
    used = [node for node in items if node in _crossing(nodes, last)]
    if output in _crossing(nodes, last) or not used:
        last, used = end, [output]
    others = _crossing(nodes, last) - set(used)
    if others or nodes[last + 1].op == "output":
        what = ", ".join(sorted(str(node.target) for node in others)) or "nothing"
        raise ConfigError(
            f"at: cannot cut after {name!r}: besides its output {what} crosses there; expected a place that "
            "everything goes through, such as the end of a block, and not the end of the model"
        )
    if len(used) > 1 or (several and used == [output]):
        kind = type(modules[output.target]).__name__ if several else output.target
        raise ConfigError(
            f"at: cannot cut after {name!r}: the output of {kind} is a tuple or dict, of which "
            f"{', '.join(map(str, used))} would cross; expected one tensor: cut where the model has made one of it"
        )
    return last, used[0]


def _crossing(nodes, end):
    """The nodes up to `end` that later ones use."""
    earlier = set(nodes[: end + 1])
    return {source for node in nodes[end + 1 :] for source in node.all_input_nodes if source in earlier}


def _is_item(node, values):
    """Whether a node takes an item, by its number or name, out of one of these."""
    return node.target is operator.getitem and node.args[0] in values and isinstance(node.args[1], (int, str))


def _copy(nodes, entry, result):
    graph, copies = fx.Graph(), {}
    if entry is not None:
        copies[entry] = graph.placeholder("value")
    for node in nodes:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    if result is not None:
        graph.output(copies[result])
    return graph


@contextlib.contextmanager
def kept_modes(module):
    """A context that leaves train() or eval() of every submodule as it was."""
    before = {part: part.training for part in module.modules()}
    try:
        yield
    finally:
        for part, training in before.items():
            part.training = training


def checked_activation(activation):
    """A head's output; ConfigError unless it is one batch of floating-point numbers."""
    if not isinstance(activation, torch.Tensor):
        what = type(activation).__name__
        if isinstance(activation, (tuple, list, dict)):
            what += f" of {len(activation)}"
        raise ConfigError(f"head: its output is a {what}, expected one tensor; cut elsewhere, or return only one")
    if not activation.is_floating_point() or not activation.dim():
        got = f"{activation.dtype} of shape {tuple(activation.shape)}"
        raise ConfigError(f"head: its output is {got}, expected a batch of floating-point numbers")
    return activation


def activation_shape(head: torch.nn.Module, input_shape: Sequence[int], dtype: torch.dtype | None = None) -> torch.Size:
    """The shape of one sample's activation behind `head`, for inputs of `input_shape` (without the batch).

    Args:
        head: the client's part.
        input_shape: of one sample.
        dtype: of the inputs. None: the parameters' dtype, or int64 if the head takes integers.

    >>> activation_shape(nn.Conv2d(3, 8, 3), (3, 10, 10))
    (8, 8, 8)
    >>> activation_shape(nn.Embedding(100, 8), (12,))
    (12, 8)
    """
    parameter = next(head.parameters(), torch.empty(0))
    if dtype is not None:
        return _shape_behind(head, input_shape, parameter.device, dtype)
    try:
        return _shape_behind(head, input_shape, parameter.device, parameter.dtype)
    except ConfigError:
        raise
    except Exception as error:
        try:
            return _shape_behind(head, input_shape, parameter.device, torch.int64)
        except Exception:
            raise error from None


def _shape_behind(head, input_shape, device, dtype):
    with kept_modes(head), torch.no_grad():
        sample = torch.zeros(1, *input_shape, device=device, dtype=dtype)
        return tuple(checked_activation(head.eval()(sample)).shape[1:])
