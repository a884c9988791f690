"""Writes and reads the files of a run, beside those of lmms-eval and with the same `<date>_` prefix.

A run is a folder and a date. lmms-eval writes `<date>_results.json` and `<date>_samples_<task>.jsonl`; this package
adds `<date>_gram.safetensors`, `<date>_losses.safetensors`, `<date>_divergence.parquet`, `<date>_attention.parquet`,
`<date>_tokens.parquet`, `<date>_options.parquet` (only with option log-probabilities), `<date>_keys_<task>.safetensors`
and, last because it says that the run is whole, `<date>_keyspace.json`. Every file is written under a temporary name,
synced and renamed; what killed processes left of such files is removed by the next that writes into the folder.

Kernel sums and keys are stored as float32. A sum of kernel values carries a relative rounding of 6e-8, which moves
MMD^2 by less than 1e-6, and float64 would double the largest file of a run. Reading returns float64 sums and float32
keys, both loaded on access: a run of a large model does not fit in memory whole.
"""

from lmms_keyspace.store.runs import (
    LoadedRun,
    RunFiles,
    find_runs,
    load_run,
    logged_samples,
    read_run,
    read_samples,
    write_run,
)

__all__ = [
    "LoadedRun",
    "RunFiles",
    "find_runs",
    "load_run",
    "logged_samples",
    "read_run",
    "read_samples",
    "write_run",
]
