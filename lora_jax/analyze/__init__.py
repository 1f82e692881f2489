"""What an adapter is worth knowing about: pure functions on deltas, for after the training."""

from lora_jax.analyze.combine import cat, linear, recombine
from lora_jax.analyze.report import Report, Row, analyze
from lora_jax.analyze.similarity import Comparison, Similarity, compare, phi, subspace_similarity
from lora_jax.analyze.spectrum import Amplification, amplification, effective_rank, singular_values, stable_rank
from lora_jax.analyze.truncate import truncate
from lora_jax.analyze.updates import SVD, svd, update
from lora_jax.analyze.without import without

__all__ = [
    "Amplification", "Comparison", "Report", "Row", "SVD", "Similarity", "amplification", "analyze", "cat", "compare",
    "effective_rank", "linear", "phi", "recombine", "singular_values", "stable_rank", "subspace_similarity", "svd",
    "truncate", "update", "without",
]  # fmt: skip
