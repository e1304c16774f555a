"""The shapes of a model's parameters: of known models by name, of a module, of a saved state."""

from __future__ import annotations

import importlib
import json
import pathlib
import re
import sys
from collections.abc import Callable

import torch

from ..checks import shown
from ..errors import ConfigError

Shapes = dict[str, torch.Size]


def _resnet(blocks: tuple[int, ...], bottleneck: bool) -> Shapes:
    """ResNet as in torchvision (He et al., arXiv 1512.03385)."""
    shapes: dict[str, tuple[int, ...]] = {"conv1.weight": (64, 3, 7, 7)}

    def norm(name, width):
        shapes.update({f"{name}.weight": (width,), f"{name}.bias": (width,)})

    norm("bn1", 64)
    width_in, expansion = 64, 4 if bottleneck else 1
    for stage, count in enumerate(blocks):
        width = 64 << stage
        for block in range(count):
            at, out = f"layer{stage + 1}.{block}", width * expansion
            kernels = [(width, width_in, 3), (width, width, 3)]
            if bottleneck:
                kernels = [(width, width_in, 1), (width, width, 3), (out, width, 1)]
            for number, (to, of, side) in enumerate(kernels, 1):
                shapes[f"{at}.conv{number}.weight"] = (to, of, side, side)
                norm(f"{at}.bn{number}", to)
            if block == 0 and (stage > 0 or width_in != out):
                shapes[f"{at}.downsample.0.weight"] = (out, width_in, 1, 1)
                norm(f"{at}.downsample.1", out)
            width_in = out
    return _sizes({**shapes, "fc.weight": (1000, width_in), "fc.bias": (1000,)})


def _vit(width: int, layers: int, patch: int) -> Shapes:
    """Vision Transformer as in torchvision (Dosovitskiy et al., arXiv 2010.11929), 224 x 224 pixels."""
    shapes: dict[str, tuple[int, ...]] = {"class_token": (1, 1, width)}
    shapes.update(_layer("conv_proj", (width, 3, patch, patch)))
    shapes["encoder.pos_embedding"] = (1, (224 // patch) ** 2 + 1, width)
    for number in range(layers):
        at = f"encoder.layers.encoder_layer_{number}"
        shapes.update(_layer(f"{at}.ln_1", (width,)))
        shapes[f"{at}.self_attention.in_proj_weight"] = (3 * width, width)
        shapes[f"{at}.self_attention.in_proj_bias"] = (3 * width,)
        shapes.update(_layer(f"{at}.self_attention.out_proj", (width, width)))
        shapes.update(_layer(f"{at}.ln_2", (width,)))
        shapes.update(_layer(f"{at}.mlp.0", (4 * width, width)))
        shapes.update(_layer(f"{at}.mlp.3", (width, 4 * width)))
    shapes.update(_layer("encoder.ln", (width,)))
    return _sizes({**shapes, **_layer("heads.head", (1000, width))})


def _gpt2(width: int, layers: int) -> Shapes:
    """GPT-2 as in transformers, whose head is its embedding."""
    shapes: dict[str, tuple[int, ...]] = {
        "transformer.wte.weight": (50257, width),
        "transformer.wpe.weight": (1024, width),
    }
    for number in range(layers):
        at = f"transformer.h.{number}"
        shapes.update(_layer(f"{at}.ln_1", (width,)))
        shapes.update(_layer(f"{at}.attn.c_attn", (width, 3 * width), 3 * width))
        shapes.update(_layer(f"{at}.attn.c_proj", (width, width)))
        shapes.update(_layer(f"{at}.ln_2", (width,)))
        shapes.update(_layer(f"{at}.mlp.c_fc", (width, 4 * width), 4 * width))
        shapes.update(_layer(f"{at}.mlp.c_proj", (4 * width, width), width))
    return _sizes({**shapes, **_layer("transformer.ln_f", (width,))})


def _layer(name, weight, bias=None):
    return {f"{name}.weight": weight, f"{name}.bias": (bias or weight[0],)}


def _sizes(shapes):
    return {name: torch.Size(shape) for name, shape in shapes.items()}


BUILT_IN: dict[str, Callable[[], Shapes]] = {
    "resnet18": lambda: _resnet((2, 2, 2, 2), False),
    "resnet50": lambda: _resnet((3, 4, 6, 3), True),
    "resnet101": lambda: _resnet((3, 4, 23, 3), True),
    "vit_b_16": lambda: _vit(768, 12, 16),
    "vit_l_16": lambda: _vit(1024, 24, 16),
    "gpt2": lambda: _gpt2(768, 12),
    "gpt2_medium": lambda: _gpt2(1024, 24),
}


def shapes_of(model: torch.nn.Module) -> Shapes:
    """{name: shape} of the parameters that are trained."""
    return {name: p.shape for name, p in model.named_parameters() if p.requires_grad}


def shapes_named(text: str) -> Shapes:
    """{name: shape} of what the command line calls a model.

    Args:
        text: a built-in model's name; another one of torchvision, where that is installed; `module:function` that
            returns a module, or `module:Class`; or the path of a saved state (.pt, .pth, .safetensors), of which every
            floating-point tensor counts as a parameter but those of BatchNorm's statistics.

    Raises:
        ConfigError: it is none of these, or has no parameters.
    """
    if text in BUILT_IN:
        return BUILT_IN[text]()
    suffix = pathlib.Path(text).suffix
    if suffix in (".pt", ".pth", ".bin", ".safetensors"):
        shapes = _of_file(pathlib.Path(text))
    elif ":" in text:
        shapes = _of_function(text)
    else:
        shapes = _of_torchvision(text)
    if not shapes:
        raise ConfigError(f"model: got {shown(text)}, which has no trained parameters")
    return shapes


def shapes_listed(text: str) -> Shapes:
    """{name: shape} of a list such as "512x512*12,50257x768,768".

    Args:
        text: shapes with `x` between sizes, each with `*COUNT` behind it if there are several; or a JSON object of
            {name: [sizes]}.

    Raises:
        ConfigError: it is neither.
    """
    expected = 'expected shapes such as 512x512*12,768 or {"name": [512, 512]}'
    if text.lstrip().startswith("{"):
        try:
            found = {str(name): torch.Size(shape) for name, shape in json.loads(text).items()}
        except (ValueError, TypeError, AttributeError) as error:
            raise ConfigError(f"shapes: got {shown(text)}, {expected}: {error}") from None
        if not found or min(shape.numel() for shape in found.values()) < 1:
            raise ConfigError(f"shapes: got {shown(text)}, {expected}")
        return found
    shapes: Shapes = {}
    for item in text.split(","):
        matched = re.fullmatch(r"([1-9]\d*(?:x[1-9]\d*)*)(?:\*([1-9]\d*))?", item.strip())
        if not matched:
            raise ConfigError(f"shapes: got {shown(item)}, {expected}")
        for _ in range(int(matched[2] or 1)):
            shapes[f"tensor{len(shapes)}"] = torch.Size(map(int, matched[1].split("x")))
    return shapes


def _of_torchvision(name):
    known = f"expected one of {', '.join(BUILT_IN)}, a model of torchvision, module:function or a .pt file"
    try:
        from torchvision import models
    except ImportError:
        raise ConfigError(f"model: got {shown(name)}, {known} (torchvision is not installed)") from None
    if name not in models.list_models():
        raise ConfigError(f"model: got {shown(name)}, {known}")
    with torch.device("meta"):
        return shapes_of(models.get_model(name, weights=None))


def _of_function(text):
    module, _, name = text.partition(":")
    sys.path.insert(0, "")  # a user's own file is looked for where the command is run
    try:
        make = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"model: got {shown(text)}, expected module:function: {error}") from error
    finally:
        sys.path.remove("")
    try:
        model = make() if callable(make) and not isinstance(make, torch.nn.Module) else make
    except TypeError as error:
        raise ConfigError(f"model: got {shown(text)}, expected a function that needs no arguments: {error}") from error
    if not isinstance(model, torch.nn.Module):
        raise ConfigError(f"model: {text} returned {type(model).__name__}, expected a torch.nn.Module")
    return shapes_of(model)


STATISTICS = ("running_mean", "running_var")


def _of_file(path):
    if not path.is_file():
        raise ConfigError(f"model: got {shown(str(path))}, expected a file that exists")
    try:
        if path.suffix == ".safetensors":
            state = _of_safetensors(path)
        else:
            state = torch.load(path, map_location="meta", weights_only=True)
    except ConfigError:
        raise
    except Exception as error:  # of whatever else lies there under that name
        raise ConfigError(f"model: {path} cannot be read as a saved state: {error}") from error
    for key in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict):
        raise ConfigError(f"model: {path} holds {type(state).__name__}, expected a state dict")
    return {
        name: value.shape
        for name, value in state.items()
        if isinstance(value, torch.Tensor) and value.is_floating_point() and not name.endswith(STATISTICS)
    }


def _of_safetensors(path):
    try:
        from safetensors import safe_open
    except ImportError:
        raise ConfigError(f"model: got {path}, which needs safetensors: pip install safetensors") from None
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
