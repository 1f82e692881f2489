"""Free: an array that stands at no weight of the base, handed to the function beside them.

Virtual tokens are such arrays. Lifting has nothing to do for them: they become dense at any use without the caller's
leave. They are adapted weights all the same, because `lift` then sees whether the function used them, and a model
that ignores what it is given is an error instead of an adapter that trains and does nothing.
"""

import dataclasses
from typing import Any, ClassVar

import jax

from lora_jax.lift.weight import AdaptedWeight, Axes, NotStructural, register


@dataclasses.dataclass(frozen=True, kw_only=True)
class Free(AdaptedWeight):
    """An array of the function's own.

    Attributes:
      hint: what to do if the function never uses it; the end of the error message.
    """

    axes: Axes = Axes()
    hint: str
    free: ClassVar[bool] = True

    def dense(self) -> jax.Array:
        return self.base

    def unused_hint(self) -> str:
        return self.hint

    def _refuse(self, *args: Any, **kwargs: Any) -> Any:
        """Its axes mean nothing, so no structural operation commutes with it."""
        raise NotStructural

    astype = transpose = reshape = slice = constrain = _refuse


register(Free, meta=("hint",))
