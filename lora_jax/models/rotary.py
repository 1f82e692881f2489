"""Rotary position embeddings, with the frequency scalings of the Llama family.

A head's dimensions `j` and `j + D/2` form a plane that turns by `position * frequency[j]`, with
`frequency[j] = theta^(-2j/D)` (Su et al. 2021, RoFormer, arXiv 2104.09864). Scalings change the frequencies alone:
`linear` divides them all by a factor; `llama3` divides only those whose wavelength exceeds the original context, keeps
the short ones and blends in between (Grattafiori et al. 2024, The Llama 3 Herd of Models, arXiv 2407.21783).
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.errors import UserError, did_you_mean

KINDS = ("default", "linear", "llama3")


@dataclasses.dataclass(frozen=True)
class Rope:
    """How positions turn into angles.

    Attributes:
      kind: 'default', 'linear' or 'llama3'.
      theta: base of the geometric series of wavelengths.
      factor: what 'linear' and 'llama3' divide frequencies by.
      low_freq_factor, high_freq_factor: wavelengths above original_length / low are divided, those below
        original_length / high are kept ('llama3').
      original_length: context length before the scaling ('llama3'), in tokens.
    """

    kind: str = "default"
    theta: float = 10000.0
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_length: int = 8192

    @classmethod
    def from_hf(cls, raw: Mapping[str, Any]) -> "Rope":
        """Reads `rope_parameters`, or the older `rope_scaling` beside `rope_theta`.

        Raises:
          UserError: a kind or an option that is not supported, or one that a kind needs and is missing.
        """
        given = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
        if not isinstance(given, Mapping) or any(isinstance(v, Mapping) for v in given.values()):
            raise UserError(f"config.json: rope parameters per layer type are not supported, got {given!r}")
        kind = given.get("rope_type") or given.get("type") or "default"
        if kind not in KINDS:
            raise UserError(f"config.json: rope type {kind!r} is not supported; {did_you_mean(str(kind), KINDS)}")
        partial = given.get("partial_rotary_factor", raw.get("partial_rotary_factor"))
        if partial not in (None, 1, 1.0):
            raise UserError(f"config.json: partial_rotary_factor={partial!r} is not supported; only 1.0 is")
        theta = given.get("rope_theta") or raw.get("rope_theta") or cls.theta
        if kind == "default":
            return cls(theta=float(theta))
        return cls(kind=kind, theta=float(theta), **_scaling(kind, given, raw))

    def to_hf(self) -> dict[str, Any]:
        """The `rope_parameters` of config.json."""
        out: dict[str, Any] = {"rope_type": self.kind, "rope_theta": self.theta}
        if self.kind != "default":
            out["factor"] = self.factor
        if self.kind == "llama3":
            out |= {"low_freq_factor": self.low_freq_factor, "high_freq_factor": self.high_freq_factor}
            out["original_max_position_embeddings"] = self.original_length
        return out


def _scaling(kind: str, given: Mapping[str, Any], raw: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a scaled kind."""
    needed = ("factor",) if kind == "linear" else ("factor", "low_freq_factor", "high_freq_factor")
    for name in needed:
        if not isinstance(given.get(name), (int, float)) or given[name] <= 0:
            raise UserError(f"config.json: rope type {kind!r} needs a positive {name}, got {given.get(name)!r}")
    options = {name: float(given[name]) for name in needed}
    if kind == "llama3":
        inner = given.get("original_max_position_embeddings", raw.get("max_position_embeddings"))
        # A value beside the rope parameters has priority, as in transformers.
        options["original_length"] = raw.get("original_max_position_embeddings") or inner or Rope.original_length
        if options["high_freq_factor"] <= options["low_freq_factor"]:
            raise UserError("config.json: rope type 'llama3' needs high_freq_factor > low_freq_factor")
    return options


def frequencies(rope: Rope, head_dim: int) -> np.ndarray:
    """Returns (head_dim / 2,) float32: radians per position of each plane."""
    # float32 throughout, as transformers does: at position 10,000 one rounding more is 1e-3 radians.
    exponent = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    base = np.float32(1.0) / np.power(np.float32(rope.theta), exponent, dtype=np.float32)
    if rope.kind == "linear":
        return base / np.float32(rope.factor)
    if rope.kind == "llama3":
        return _llama3(rope, base)
    return base


def _llama3(rope: Rope, base: np.ndarray) -> np.ndarray:
    turns = np.float32(rope.original_length) / (np.float32(2 * np.pi) / base)  # of each plane over the old context
    low, high = np.float32(rope.low_freq_factor), np.float32(rope.high_freq_factor)
    # 0: wavelength beyond the old context, divide; 1: short, keep; linear between.
    keep = np.clip((turns - low) / (high - low), 0, 1)
    return ((1 - keep) * base / np.float32(rope.factor) + keep * base).astype(np.float32)


def tables(rope: Rope, head_dim: int, positions_BxT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines of the angles, computed once for all layers.

    Args:
      rope: the kind and its options.
      head_dim: size of a head, even.
      positions_BxT: int32; B may be 1.

    Returns:
      Two arrays (B, T, 1, head_dim / 2) float32.
    """
    freq = jnp.asarray(frequencies(rope, head_dim)).reshape(1, 1, 1, -1)
    angle = positions_BxT.astype(jnp.float32)[:, :, None, None] * freq
    return _written_out(jnp.cos(angle)), _written_out(jnp.sin(angle))


def _written_out(table: jax.Array) -> jax.Array:
    """The table as an array in memory, on a CPU.

    XLA thinks little of a cosine and computes it anew for every head of every layer, at 5 % of a training step. Through
    a library's product it cannot: that with the identity changes no bit.
    """
    one = jnp.eye(table.shape[-1], dtype=table.dtype)
    numbers = (((table.ndim - 1,), (0,)), ((), ()))
    product = functools.partial(jax.lax.dot_general, dimension_numbers=numbers, precision=jax.lax.Precision.HIGHEST)
    return jax.lax.platform_dependent(table, one, cpu=product, default=lambda table, _: table)


def rotate(x_BxTxHxD: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Turns every head by the angles of its position, in float32; same shape and dtype."""
    half = x_BxTxHxD.shape[-1] // 2
    a = x_BxTxHxD[..., :half].astype(jnp.float32)
    b = x_BxTxHxD[..., half:].astype(jnp.float32)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BxTxHxD.dtype)
