"""Cut a model in two or more parts that run one after the other."""

import difflib
import threading

import torch
from torch import fx, nn

from ..errors import ConfigError

_TRACING = threading.Lock()  # torch.fx patches nn.Module for all threads while it traces


class Part(nn.Module):
    """A stretch of a model: the model's own submodules, parameters and names, in its order.

    The model's two modes are traced apart, since what is traced under train() holds for
    train() only (functional dropout, auxiliary outputs).
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


def cut(model, *at):
    """Cut a model after the named submodules.

    Args:
        model: any module that torch.fx can trace and whose forward takes one tensor: an
            nn.Sequential, torchvision's classifiers, your own.
        at: where: the dotted name of a submodule (`"layer2"`, `"layer3.0"`, `"features.17"`,
            `"encoder.layers.encoder_layer_3"`), or for an nn.Sequential the number of its
            first modules that go into the first part. Several cuts give as many more parts.

    Cut before other threads run models: torch.fx changes nn.Module for all of them while it traces.

    Returns:
        The parts, a list of modules that share the model's parameters and their names:
        parts[1](parts[0](x)) is model(x). A state dict's names are those in the model.

    Raises:
        ConfigError: no such submodule, or more than one tensor would cross there (within a
            residual block, for instance).

    >>> from torch import nn
    >>> head, tail = cut(nn.Sequential(nn.Linear(9, 4), nn.ReLU(), nn.Linear(4, 2)), 2)
    >>> list(tail.state_dict())
    ['2.weight', '2.bias']
    """
    if not at:
        raise ConfigError("at: got nothing, expected the name of at least one submodule to cut after")
    names = [_name(model, place) for place in at]
    before = {module: module.training for module in model.modules()}
    pieces = {}
    _TRACING.acquire()
    try:
        for mode in (True, False):
            model.train(mode)
            pieces[mode] = _pieces(fx.Tracer().trace(model), names)
    finally:
        _TRACING.release()
        for module, training in before.items():
            module.training = training
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


def _pieces(graph, names):
    """The graph's stretches between the named submodules, as graphs of one input and one output."""
    nodes = list(graph.nodes)
    ends = [_last_node(nodes, name) for name in names]
    if ends != sorted(set(ends)):
        raise ConfigError(f"at: got {', '.join(names)}, expected the order in which the model runs them")
    edges = [0, *[end + 1 for end in ends], len(nodes)]
    for name, end in zip(names, ends, strict=True):
        _check_single_crossing(nodes, end, name)
    entries = [None, *[nodes[end] for end in ends]]
    return [_copy(nodes[low:high], entry) for low, high, entry in zip(edges, edges[1:], entries, strict=False)]


def _last_node(nodes, name):
    inside = [number for number, node in enumerate(nodes) if name in node.meta.get("nn_module_stack", {})]
    if not inside:
        raise ConfigError(f"at: the model does not run {name!r}")
    return inside[-1]


def _check_single_crossing(nodes, end, name):
    earlier = set(nodes[:end])
    crossing = {source for node in nodes[end + 1 :] for source in node.all_input_nodes if source in earlier}
    if crossing or nodes[end + 1].op == "output":
        what = ", ".join(sorted(str(node.target) for node in crossing)) or "nothing"
        raise ConfigError(
            f"at: cannot cut after {name!r}: besides its output {what} crosses there; expected a place that "
            "everything goes through, such as the end of a block, and not the end of the model"
        )


def _copy(nodes, entry):
    graph, copies = fx.Graph(), {}
    if entry is not None:
        copies[entry] = graph.placeholder("value")
    for node in nodes:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    if nodes[-1].op != "output":
        graph.output(copies[nodes[-1]])
    return graph


def activation_shape(head, input_shape):
    """The shape of one sample's activation behind `head`, for inputs of `input_shape` (without the batch).

    >>> activation_shape(nn.Conv2d(3, 8, 3), (3, 10, 10))
    (8, 8, 8)
    """
    training = head.training
    parameter = next(head.parameters(), torch.empty(0))
    try:
        with torch.no_grad():
            sample = torch.zeros(1, *input_shape, device=parameter.device, dtype=parameter.dtype)
            return tuple(head.eval()(sample).shape[1:])
    finally:
        head.train(training)
