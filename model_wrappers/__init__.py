"""Plug 1: lmms-eval models that capture attention keys while a benchmark runs and load MaLoRA adapters."""
