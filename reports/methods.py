"""What every report says about itself: how numbers were made, and what nobody outside knows of the published ones."""

BUNDLED_NOTICE = (
    "Some of these runs are of the model that comes with the package: one million parameters, trained on procedural "
    "pictures. They show how the instruments behave, not how large models do."
)
METHODS = (
    "Accuracy and flip rates: Wilson 95 % intervals; differences of rates within a run: matched pairs (Agresti and "
    "Min, 2005). A group is one scene and question under all conditions.",
    "Changes between runs are paired by group: percentile interval of the cluster bootstrap, p of the cluster "
    "sign-flip permutation; adjusted by Holm, over the metrics of the verdict (of all runs) and over all others apart. "
    "Where no group differs, the interval is the exact binomial bound on how often one could.",
    "Minimum detectable effect: the change that a two-sided test at 5 % finds with 80 % probability.",
    "MMD²: cluster U-statistic with five Gaussian bandwidths around the median distance of the base model, pairs of "
    "tokens from one document left out; delete-one-cluster jackknife intervals, paired between runs (Gretton et al., "
    "2012; Arvesen, 1969).",
    "JS: lower bound on the Jensen-Shannon divergence in nats from a classifier tested on held-out clusters; cluster "
    "bootstrap and, for changes, delete-one-cluster jackknife, both with what a cluster does to the fits, to first "
    "order (Koh and Liang, 2017). Where a change is not paired by cluster, its interval is conservative and the row "
    "says so.",
    "Attention: share of the last prompt token's attention, mean over query heads, from the captured forward pass.",
    "Functional link: least squares of the outcome on one measure of attention at a time, an intercept for every "
    "condition, errors by cluster (CR1; Liang and Zeger, 1986), Student's t, Holm over layers.",
    "Pictures of keys: standardized, PCA to at most 50 dimensions, t-SNE (van der Maaten and Hinton, 2008) with "
    "perplexity 30 at most, PCA start, seed 0.",
    "A divergence between modalities is expected in any model and is no fault by itself; only its change is tested.",
    "Every figure also lies in figures/ as SVG, PNG and PDF, the data behind it in tables/ as CSV and Parquet. Numbers "
    "in tables are unrounded; columns named `printed` hold what this page shows.",
)
UNKNOWN = (
    "Where the key was read: before or after rotary position embedding. Positions alone can make a gap after it.",
    "How many tokens and images, from which layers, and whether template and special tokens were left out.",
    "Whether the number is MMD or MMD², biased or not, and with which kernel and bandwidth. A biased MMD is never 0: "
    "part of a published floor may be sample size.",
    "The estimator of the Jensen-Shannon divergence, its base (nats or bits), and whether its root was taken.",
    "On what the PCA was fitted, and how much variance its 50 dimensions kept.",
    "The test, its unit (token or image) and its correction over layers.",
    "For MaLoRA itself: formulas, gate, kernels, loss weights, layers, rank, training data and every result number. "
    "The adapter here is this project's own reading of the abstract (arXiv 2510.26721, version 2).",
)
