"""How far apart two clouds of attention keys are: one file per estimator, and `measure`, which fills the tables.

Estimators take arrays [..., n, d] (numpy or torch, CPU or GPU) and return numpy float64 of the leading shape [...].
"""

from lmms_keyspace.divergence.bandwidth import median_bandwidth2, reference_bandwidths
from lmms_keyspace.divergence.centroid import centroid_cosine, centroid_distance, mmd2_linear
from lmms_keyspace.divergence.cka import linear_cka
from lmms_keyspace.divergence.contrasts import LayerKeys
from lmms_keyspace.divergence.energy import energy_distance
from lmms_keyspace.divergence.histogram import js_histogram
from lmms_keyspace.divergence.js import JSClassifier, JSEstimate, js_classifier
from lmms_keyspace.divergence.knn import js_knn
from lmms_keyspace.divergence.laplace import mmd2_laplace
from lmms_keyspace.divergence.measure import Measurement, measure
from lmms_keyspace.divergence.mmd import SCALES, kernel_sums, mmd2, mmd2_biased, mmd_biased
from lmms_keyspace.divergence.paper import PaperProtocol, paper_protocol
from lmms_keyspace.divergence.permutation import block_permutation_test

__all__ = [
    "SCALES",
    "JSClassifier",
    "JSEstimate",
    "LayerKeys",
    "Measurement",
    "PaperProtocol",
    "block_permutation_test",
    "centroid_cosine",
    "centroid_distance",
    "energy_distance",
    "js_classifier",
    "js_histogram",
    "js_knn",
    "kernel_sums",
    "linear_cka",
    "measure",
    "median_bandwidth2",
    "mmd2",
    "mmd2_biased",
    "mmd2_laplace",
    "mmd2_linear",
    "mmd_biased",
    "paper_protocol",
    "reference_bandwidths",
]
