"""Formats of the outside world: `save_peft` writes what PEFT and vLLM read, `load_peft` reads theirs, strictly.

`merge` and `rounding` are for a checkpoint with the adapter inside, which `models.save_pretrained` writes.
"""

from lora_jax.export.peft_load import load_peft
from lora_jax.export.peft_save import has_format, save_peft
from lora_jax.export.rounding import Rounding, merge, rounding

__all__ = ["Rounding", "has_format", "load_peft", "merge", "rounding", "save_peft"]
