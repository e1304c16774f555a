"""Adapters to training engines, one folder each, importable as gcompress.plugins.<engine>."""
