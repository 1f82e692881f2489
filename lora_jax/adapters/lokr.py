"""LoKr: `W + scale * kron(w1, w2)`: a Kronecker product of two small matrices, the second a low-rank one where it pays.

Yeh, Hsieh, Gao, Yang, Oh, Gong (2023), "Navigating Text-To-Image Customization: From LyCORIS Fine-Tuning to Model
Evaluation", arXiv:2309.14859, eq. 7 and section 3.2; shapes, splits and initial values as in PEFT. A width is taken
apart into m * n by `factorization`; w1 is (m_in, m_out), w2 (n_in, n_out), so entry (i n_in + j, k n_out + l) of the
update is w1[i, k] w2[j, l] * scale. The scale is alpha / rank also where nothing is split.

A product applies w1 and w2 one after the other and never forms the update. Weights with batch axes outside a scan,
lookups and convolutions use the dense update. In a convolution the Kronecker product is over the channels (the last
axis of fan_in) and w2 holds the window, as in PEFT. Not built: the Tucker form for convolutions, PEFT's dropouts.
"""

import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.adapters.base import Adapter, Entry, draw, entry, json_ready, per_site
from lora_jax.adapters.parts import inits
from lora_jax.adapters.parts.ranks import check_word, choose_ranks, idle, scale_at, times
from lora_jax.errors import UserError
from lora_jax.lift.nodes import FlatWeight, dense
from lora_jax.lift.products import Conv, Dot, Take
from lora_jax.lift.weight import Axes, NotStructural, register
from lora_jax.sites import Site

INITS = ("default", "lycoris")


@entry(meta=("ranks", "scales", "window"))
class LoKr(Entry):
    """One site's factors: w1 or its split a1 b1, w2 or its split a2 b2. PEFT's arrays are the transposes.

    Attributes:
      w1: (*batch, m_in, m_out) float32, or None.
      a1, b1: (*batch, m_in, rank), (*batch, rank, m_out) float32, or None.
      w2: (*batch, window * n_in, n_out) float32, or None.
      a2, b2: (*batch, window * n_in, rank), (*batch, rank, n_out) float32, or None.
      ranks: rank of each batch index; what lies beyond it in a split is zero in both factors.
      scales: scale of each batch index.
      window: number of a kernel's places; 1 for a product.
    """

    axes: Axes
    ranks: tuple[int, ...]
    scales: tuple[float, ...]
    window: int = 1
    w1: Any = None
    a1: Any = None
    b1: Any = None
    w2: Any = None
    a2: Any = None
    b2: Any = None
    member: str = ""
    layout: ClassVar = {
        "w1": ("batch", "m_in", "m_out"), "a1": ("batch", "m_in", "rank"), "b1": ("batch", "rank", "m_out"),
        "w2": ("batch", "n_in", "n_out"), "a2": ("batch", "n_in", "rank"), "b2": ("batch", "rank", "n_out"),
    }  # fmt: skip

    def fits(self, fan_in: int, fan_out: int) -> bool:
        """The Kronecker product has the weight's size."""
        first_in, second_in = (w.shape[-2] for w in (self._either(self.w1, self.a1), self._either(self.w2, self.a2)))
        first_out, second_out = (w.shape[-1] for w in (self._either(self.w1, self.b1), self._either(self.w2, self.b2)))
        return first_in * second_in == fan_in and first_out * second_out == fan_out

    @staticmethod
    def _either(whole: Any, part: Any) -> Any:
        return part if whole is None else whole

    def parameters(self) -> int:
        """How many train, without those beyond a layer's own rank."""
        live = [r for r in self.ranks if r]
        whole = sum(w.size // len(self.ranks) * len(live) for w in (self.w1, self.w2) if w is not None)
        columns = sum(w.size // len(self.ranks) for w in (self.a1, self.b1, self.a2, self.b2) if w is not None)
        return whole + columns * sum(live) // max(live)

    def about(self) -> str:
        """For the audit."""
        split = ", ".join(name for name, w in (("w1", self.w1), ("w2", self.w2)) if w is None)
        return f"lokr, rank {max(self.ranks)}" + (f", {split} split" if split else ", nothing split")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoKrWeight(FlatWeight):
    """`base + scale * kron(w1, w2)`."""

    window: int
    scale: Any
    w1: Any = None
    a1: Any = None
    b1: Any = None
    w2: Any = None
    a2: Any = None
    b2: Any = None
    layout: ClassVar = {**LoKr.layout, "scale": ("batch",)}

    def parts(self) -> tuple[list[jax.Array], list[jax.Array]]:
        """The matrices whose product is w1, and those of w2, scale included."""
        first = [self.a1, self.b1] if self.w1 is None else [self.w1]
        second = [self.a2, self.b2] if self.w2 is None else [self.w2]
        return [*first[:-1], times(first[-1], self.scale)], second

    def update(self) -> jax.Array:
        """The dense update, float32."""
        w1, w2 = (p[0] if len(p) == 1 else p[0] @ p[1] for p in self.parts())
        w2 = w2.reshape(*w2.shape[:-2], self.window, -1, w2.shape[-1])
        blocks = jnp.einsum("...ik,...sjl->...sijkl", w1, w2)
        return self.unflat(blocks)

    def dense(self) -> jax.Array:
        base = dense(self.base)
        return (base.astype(jnp.float32) + self.update()).astype(base.dtype)

    def dot_general(self, x: jax.Array, use: Dot) -> jax.Array:
        if self.window > 1:
            return self._beside(x, use)
        _, fan_in, fan_out = self.sizes()
        first, second = self.parts()
        first_t, second_t = ([w.swapaxes(-1, -2) for w in reversed(part)] for part in (first, second))
        try:
            y = use.mapped(
                x, self.axes,
                lambda x: _through(x, first, second, len(fan_in), fan_out, use.precision),
                lambda x: _through(x, first_t, second_t, len(fan_out), fan_in, use.precision),
            )  # fmt: skip
        except NotStructural:
            return self._beside(x, use)
        return use.apply(x, self.base) + y

    def take(self, indices: jax.Array, use: Take) -> jax.Array:
        return self._beside(indices, use)

    def conv(self, x: jax.Array, use: Conv) -> jax.Array:
        return self._beside(x, use)

    def _beside(self, x: jax.Array, use: Any) -> jax.Array:
        """The dense update beside the base: added to a bfloat16 weight a small one would be rounded away."""
        y = use.apply(x, self.base)
        return y + use.apply(x, self.update().astype(self.dtype)).astype(y.dtype)


register(LoKrWeight, meta=("window",))


def _through(x: jax.Array, first: list, second: list, n_in: int, out: tuple[int, ...], precision: Any) -> jax.Array:
    """(*lead, *fan_in) -> (*lead, *out) by matrices along either half of the flattened axis, the cheaper order."""
    lead = x.shape[: x.ndim - n_in]
    m, n, k, l = (first[0].shape[0], second[0].shape[0], first[-1].shape[1], second[-1].shape[1])  # noqa: E741
    x = x.reshape(*lead, m, n)
    steps = [("...mn,mk->...kn", w) for w in first], [("...mn,nk->...mk", w) for w in second]
    for rule, w in sum(steps if n * k * (m + l) <= m * l * (n + k) else steps[::-1], []):
        x = jnp.einsum(rule, x, w.astype(x.dtype), precision=precision)
    return x.reshape(*lead, *out)


def lokr(
    rank: Any = 8,
    alpha: Any = 8,
    *,
    targets: Any = None,
    layers: Any = "all",
    decompose_factor: int = -1,
    decompose_both: bool = False,
    init: str = "default",
) -> Adapter:
    """Kronecker adaptation.

    Args:
      rank: an integer, or ordered (pattern, rank) rules, first match wins; 0 leaves a site (or a layer of a stack) out.
        w2 is split in two factors of this rank where it is below max(n_in, n_out) / 2; a higher one only scales.
      alpha: a number, or rules; the scale is alpha / rank.
      targets: patterns on whole paths, or roles; None: every linear, DenseGeneral and convolution, but neither
        embeddings nor a head that the family names.
      layers: 'all', 'last:k', 'first:k', or a list of layer indices.
      decompose_factor: m of a width where it divides it, else m is the largest divisor up to it; -1: up to the square
        root.
      decompose_both: split w1 as well, where rank is below max(m_in, m_out) / 2.
      init: 'default' (w1, or its factor along fan_out, zero) or 'lycoris' (w2, or its factor along fan_in, zero).

    Returns:
      An Adapter. Its first output equals the base's exactly.

    Raises:
      UserError: a rule that matches nothing, rank 0 everywhere, layers of one stack of which only some would be split.
    """
    check_word("lokr", "init", init, INITS)
    check_word("lokr", "decompose_both", decompose_both, (True, False))
    if type(decompose_factor) is not int or decompose_factor < -1 or decompose_factor == 0:
        raise UserError(f"lokr: decompose_factor={decompose_factor!r}: expected -1 or an integer of at least 1")
    spec = json_ready(
        method="lokr", rank=rank, alpha=alpha, targets=targets, layers=layers,
        decompose_factor=decompose_factor, decompose_both=decompose_both, init=init,
    )  # fmt: skip

    def choose(sites):
        return choose_ranks(sites, method="lokr", targets=targets, layers=layers, rank=rank, alpha=alpha, bounded=False)

    def make(key, leaf, site, option):
        return _start(inits.start_of(key, leaf, site, option), decompose_factor, decompose_both, init)

    def weight(base, one, place):
        arrays = {name: getattr(one, name) for name in one.layout}
        return LoKrWeight(
            base=base, axes=one.axes, path=place.path, idle=idle(one), window=one.window,
            scale=scale_at(one, place.scale), **arrays,
        )  # fmt: skip

    return per_site(spec, choose=choose, make=make, weight=weight)


def factorization(width: int, factor: int = -1) -> tuple[int, int]:
    """Takes a width apart into m * n, as PEFT: m is `factor` where that divides it, else the largest divisor up to the
    square root and, if it is not -1, up to `factor`."""
    if factor > 0 and width % factor == 0:
        return factor, width // factor
    most = math.isqrt(width) if factor == -1 else min(factor, math.isqrt(width))
    m = next(d for d in range(most, 0, -1) if width % d == 0)
    return m, width // m


def window_of(site: Site) -> int:
    """Places of a kernel's window; 1 for a product."""
    return math.prod(site.dims(site.fan_in[:-1])) if site.uses[:1] == ("conv",) else 1


def _start(at: inits.Start, factor: int, both: bool, init: str) -> LoKr:
    window = window_of(at.site)
    m_in, n_in = factorization(math.prod(at.fan_in) // window, factor)
    m_out, n_out = factorization(math.prod(at.fan_out), factor)
    split_1 = both and _splits(at, max(m_in, m_out), "w1")
    split_2 = _splits(at, max(n_in, n_out), "w2")
    keys = iter(jax.random.split(at.key, 4))
    default = init == "default"
    first = _matrix(at, keys, m_in, m_out, split_1, zero="b" if default else None)
    second = _matrix(at, keys, window * n_in, n_out, split_2, zero=None if default else "a")
    ranks, scales = at.static()
    arrays: dict[str, Any] = {f"{name}1": w for name, w in first.items()} | {
        f"{name}2": w for name, w in second.items()
    }
    return LoKr(**arrays, axes=Axes.of(at.site), ranks=ranks, scales=scales, window=window)


def _splits(at: inits.Start, largest: int, name: str) -> bool:
    """PEFT's rule, for all layers of a stack at once."""
    found = {int(r) < largest / 2 for r in at.ranks.reshape(-1) if r}
    if len(found) > 1:
        raise UserError(
            f"lokr: {at.site.path!r} is a stack of layers with ranks {sorted({*at.ranks.reshape(-1).tolist()} - {0})}, "
            f"of which only those below {largest / 2:g} split {name}; give ranks on one side, or unroll the layers"
        )
    return found.pop()


def _matrix(at: inits.Start, keys: Any, n_in: int, n_out: int, split: bool, zero: str | None) -> dict[str, jax.Array]:
    """One matrix, or its factors a and b: uniform within 1/sqrt of PEFT's last axis, one of them zero."""
    key_a, key_b, n = next(keys), next(keys), len(at.batch)
    if not split:
        w = draw(key_a, at.batch, 1, inits.uniform(n_in), (n_in, n_out)).reshape(*at.batch, n_in, n_out)
        return {"w": times(w, jnp.asarray(at.ranks > 0, jnp.float32) * (zero is None))}
    a = jnp.moveaxis(draw(key_a, at.batch, at.r, inits.uniform(n_in), (n_in,)), n, -1)
    bound = 1 / np.sqrt(np.maximum(at.ranks, 1), dtype=np.float32)
    b = times(draw(key_b, at.batch, at.r, inits.uniform(1), (n_out,)), bound)
    a, b = at.alive(a, -1), at.alive(b, n)
    return {"a": a * 0 if zero == "a" else a, "b": b * 0 if zero == "b" else b}
