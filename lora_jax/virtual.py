"""Virtual tokens: the collection `virtual` beside `params`, which an adapter fills and a model may read.

Virtual tokens change shapes inside the function, so no transformation from outside can add them. A model that can have
them reads one of

    prompt   (N, D): embeddings that stand before those of the text
    prefix   {layer: {"keys": (N, F), "values": (N, F)}}: what every token of the text attends to besides the text; F =
             key heads * head size; the layer's index as a string

and a model that reads neither is an error of `lift`, never an adapter without effect.
"""

from collections.abc import Mapping
from typing import Any

import jax

from lora_jax import trees
from lora_jax.errors import UserError
from lora_jax.lift.free import Free
from lora_jax.sites import Site, Sites

COLLECTION = "virtual"
_FAMILIES = (
    "the methods 'prompt' and 'prefix' work with lora_jax's own model families; choose another method for this model"
)
_UNREAD = f"They are virtual tokens, and this model does not read them (the collection 'virtual'): {_FAMILIES}"


def put(variables: Mapping[str, Any], name: str, value: Any) -> dict[str, Any]:
    """Adds virtual tokens to a model's variables.

    Args:
      variables: `{'params': ...}`, bound by other adapters or not; not changed.
      name: 'prompt' or 'prefix'.
      value: a tree of arrays.

    Returns:
      The variables with the collection `virtual`, every array an adapted weight for a lifted function.

    Raises:
      UserError: no collection `params`, or there are virtual tokens already.
    """
    if not isinstance(variables, Mapping) or trees.COLLECTION not in variables:
        raise UserError(
            f"the method {name!r} needs variables with the collection 'params' ({{'params': ...}}), got "
            f"{type(variables).__name__}: {_FAMILIES}"
        )
    if COLLECTION in variables:
        raise UserError(
            f"the variables hold virtual tokens ({', '.join(variables[COLLECTION])}) already, and a model reads one "
            f"adapter's: leave out one of the two, or train it first and the {name!r} in another run"
        )

    def node(keys, x):
        return Free(base=x, path="/".join([f"@{name}", *(str(key.key) for key in keys)]), hint=_UNREAD)

    return {**variables, COLLECTION: {name: jax.tree_util.tree_map_with_path(node, value)}}


def find(sites: Sites, name: str, role: str, what: str) -> list[Site]:
    """The sites that tell the sizes of virtual tokens.

    Args:
      sites: from a base.
      name: of the method.
      role: of the sites.
      what: they are.

    Returns:
      At least one site.

    Raises:
      UserError: there is none.
    """
    found = [site for site in sites.values() if site.role == role]
    if not found:
        raise UserError(f"the method {name!r} finds no {what}: this model names none (role {role!r}); {_FAMILIES}")
    return found


def refuse_merge(name: str) -> None:
    """Says why there is nothing to merge.

    Raises:
      UserError: always.
    """
    raise UserError(
        f"the method {name!r} cannot be merged: virtual tokens are inputs of the model, not a change of its weights. "
        "Keep the adapter beside the base (lora_jax.save, or PEFT's format) and bind it"
    )
