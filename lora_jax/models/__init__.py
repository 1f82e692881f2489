"""Model families and their checkpoints: plain Linen modules that know nothing of adapters."""

from lora_jax.models.base import Base as Base
from lora_jax.models.base import from_config as from_config
