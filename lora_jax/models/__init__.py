"""Model families and their checkpoints: plain Linen modules that know nothing of adapters."""

from lora_jax.models.base import Base as Base
from lora_jax.models.base import from_config as from_config
from lora_jax.models.base import quantized as quantized
from lora_jax.models.base import reseeded as reseeded
from lora_jax.models.hf import load_pretrained as load_pretrained
from lora_jax.models.hf import outline as outline
from lora_jax.models.writing import save_pretrained as save_pretrained
