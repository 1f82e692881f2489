"""Data: sources, templates, packing plan, batches, preview. Nothing here imports jax."""

from lora_jax.data.batches import Batches
from lora_jax.data.records import Record, Splits
from lora_jax.data.sources import load

__all__ = ["Batches", "Record", "Splits", "load"]
