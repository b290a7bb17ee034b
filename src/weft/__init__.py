"""Weft: one thread through every language model and every stage of its life."""

__version__ = "0.1.0"
