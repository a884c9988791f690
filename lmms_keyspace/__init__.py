"""Attention key-space capture, divergence and text-bias probes as a plugin of lmms-eval."""

__version__ = "0.1.0"
