"""Training algorithms, one file each: settings, samples, loss and metrics. Imports neither torch nor numpy."""

from megatron_nft.algorithms.base import Algorithm, AlgorithmSettings, counted, training_sample
from megatron_nft.algorithms.open import (
    ALGORITHMS,
    DEFAULT,
    AlgorithmError,
    algorithm_class,
    open_algorithm,
    read_settings,
)

__all__ = [
    "ALGORITHMS",
    "DEFAULT",
    "Algorithm",
    "AlgorithmError",
    "AlgorithmSettings",
    "algorithm_class",
    "counted",
    "open_algorithm",
    "read_settings",
    "training_sample",
]
