"""Interventions without training: what aligning keys, or raising attention to the image, does by itself.

`spec` reads the argument `intervene=`, `moments` takes the statistics from a saved run, `keys` and `boost` change the
model's forward pass (`change` is what they share), `install` puts one of them into a model. Sources and limits are in
docs/malora.md.
"""
