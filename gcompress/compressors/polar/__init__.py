"""The polar code: method.py says what it is."""

from .method import Polar

__all__ = ["Polar"]
