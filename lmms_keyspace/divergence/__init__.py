"""How far apart two clouds of attention keys are: one file per estimator, and `measure`, which fills the tables.

Estimators take arrays [..., n, d] (numpy or torch, CPU or GPU) and return numpy float64 of the leading shape [...].
"""

from lmms_keyspace.divergence.bandwidth import median_bandwidth2, reference_bandwidths
from lmms_keyspace.divergence.js import JSClassifier, JSEstimate, js_classifier
from lmms_keyspace.divergence.measure import measure
from lmms_keyspace.divergence.mmd import SCALES, kernel_sums, mmd2

__all__ = [
    "SCALES",
    "JSClassifier",
    "JSEstimate",
    "js_classifier",
    "kernel_sums",
    "measure",
    "median_bandwidth2",
    "mmd2",
    "reference_bandwidths",
]
