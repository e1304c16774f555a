"""The methods: each is a module of this folder, found and registered when the package is imported."""

import importlib
import pkgutil

from .base import Compressor, Context
from .spec import from_dict, from_spec, methods

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = ["Compressor", "Context", "from_dict", "from_spec", "methods"]
