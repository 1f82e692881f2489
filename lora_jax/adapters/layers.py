"""Full fine-tuning of whole layers: every weight of the chosen layers, biases and norms included, nothing else.

The classical baseline of partial fine-tuning ("variable fine-tuning" of the top k layers in Houlsby et al. 2019,
arXiv:1902.00751, section 3.2).
"""

from typing import Any

from lora_jax.adapters.base import Adapter, json_ready
from lora_jax.adapters.full import in_place
from lora_jax.errors import UserError
from lora_jax.sites import in_layers, select


def layers(layers: Any = "last:1", *, targets: Any = None) -> Adapter:
    """Trains all weights of some layers.

    Args:
      layers: 'all', 'last:k', 'first:k', or a list of layer indices.
      targets: patterns or roles that narrow the choice inside the layers; None: every weight there.

    Returns:
      An Adapter. Its first output equals the base's exactly.

    Raises:
      UserError: the model has no layers.
    """
    spec = json_ready(method="layers", layers=layers, targets=targets)

    def choose(sites):
        inside = [p for p, s in sites.items() if s.layers]
        if not inside:
            raise UserError("the method 'layers' needs weights with a layer index, and no path of this model has one")
        return in_layers(sites, select({p: sites[p] for p in inside}, targets, inside), layers)

    return in_place(spec, choose)
