"""Formats of the outside world: `save_peft` writes what PEFT and vLLM read, `load_peft` reads theirs, strictly."""

from lora_jax.export.peft_load import load_peft
from lora_jax.export.peft_save import save_peft

__all__ = ["load_peft", "save_peft"]
