"""Tensor: where one of our weights lies in a checkpoint of Hugging Face layout."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor of a checkpoint.

    Attributes:
      name: its full name in the file that transformers writes.
      transpose: True if the file holds it as (out, in) and we as (in, out).
    """

    name: str
    transpose: bool = False
