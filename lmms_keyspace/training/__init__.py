"""Training adapters: `lmms-keyspace train`, on transformers' Trainer, with the alignment terms of MaLoRA.

`config` says what, `examples` and `scene_examples` bring the data, `encoding` makes tensors of it, `trainer` adds the
terms of `alignment` to the loss, `evaluation` follows accuracy and text bias, and `run` puts them together.
"""
