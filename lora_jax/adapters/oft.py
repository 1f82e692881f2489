"""OFT: `R W`, every neuron turned by the same orthogonal matrix, which is block-diagonal.

Qiu, Liu, Feng, Xue, Feng, Liu, Zhang, Weller, Schoelkopf (2023), "Controlling Text-to-Image Diffusion by Orthogonal
Finetuning", arXiv:2306.07280, eq. 2-4 and section 3.3: W is (fan_in, fan_out), R acts on fan_in, and each block is
`(I + Q)(I - Q)^-1` of a skew-symmetric Q (Cayley), of which the b (b - 1) / 2 entries above the diagonal train.

Differs from the paper: `cayley='neumann'` is PEFT's polynomial instead of the inverse, orthogonal only near Q = 0; an
embedding is turned along its width, as in PEFT, since turning the looked-up axis would mix the tokens. Not built: the
constrained form (COFT). A block may not cross the flattened fan_in's end, so it must divide it.

In a product the activation is turned (or the output, where fan_out is contracted) as `x + x (R - I)`: at Q = 0 that is
x bit for bit at every precision of the hardware. Convolutions and weights with batch axes outside a scan are turned
themselves.
"""

import dataclasses
import math
import re
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.adapters.base import Adapter, Entry, batch_dims, entry, json_ready, per_batch, per_site
from lora_jax.adapters.parts.ranks import check_matrices, check_word, default_targets, times
from lora_jax.errors import UserError, did_you_mean
from lora_jax.lift.nodes import FlatWeight, dense
from lora_jax.lift.products import Dot, Take, on_axes
from lora_jax.lift.weight import Axes, NotStructural, register
from lora_jax.sites import Site, in_layers, parse_rules, select

CAYLEY = ("exact", "neumann")
USUAL_SIZE, USUAL_TERMS = 32, 5  # PEFT's


@entry(meta=("size", "live"))
class OFT(Entry):
    """One site's rotation.

    Attributes:
      q: (*batch, blocks, size * (size - 1) / 2) float32, the entries above the diagonals row by row; one block where
        all share it.
      axes: what is turned stands in `fan_in`: for an embedding its width.
      size: of a block.
      live: which batch indices are turned.
    """

    q: Any
    axes: Axes
    size: int
    live: tuple[bool, ...]
    member: str = ""
    layout: ClassVar = {"q": ("batch", "block", "pair")}

    def fits(self, fan_in: int, fan_out: int) -> bool:
        """The blocks cover what is turned; one block that all share divides it."""
        blocks = self.q.shape[-2]
        return blocks * self.size == fan_in or (blocks == 1 and fan_in % self.size == 0)

    def parameters(self) -> int:
        """How many train, without the layers of a stack that are left out."""
        return self.q.size // len(self.live) * sum(self.live)

    def about(self) -> str:
        """For the audit: a default size depends on the width."""
        return f"oft, blocks of {self.size}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class OFTWeight(FlatWeight):
    """`R base`."""

    q: Any
    live: Any
    size: int
    terms: int
    layout: ClassVar = {**OFT.layout, "live": ("batch",)}
    sliceable: ClassVar = ("batch", "fan_out")

    def turn(self) -> jax.Array:
        """`R - I` of every block: (*batch, blocks, size, size) float32."""
        turn = rotation_less_identity(times(self.q, self.live), self.size, self.terms)
        batch, fan_in, _ = self.sizes()
        return jnp.broadcast_to(turn, (*batch, math.prod(fan_in) // self.size, self.size, self.size))

    def dense(self) -> jax.Array:
        base = dense(self.base)
        w = self.flat(base.astype(jnp.float32))
        blocks = w.reshape(*w.shape[:-2], -1, self.size, w.shape[-1])
        moved = jnp.einsum("...rkc,...rco->...rko", self.turn(), blocks, precision="highest")
        return self.unflat(w + moved.reshape(w.shape)).astype(base.dtype)

    def dot_general(self, x: jax.Array, use: Dot) -> jax.Array:
        turn, n = self.turn(), len(self.axes.fan_in)
        if turn.ndim > 3:
            return use.apply(x, self.dense())
        product = lambda x: use.apply(x, self.base)  # noqa: E731
        function, back = (lambda x, t=t: _turned(x, t, n, use.precision) for t in (turn, turn.swapaxes(-1, -2)))
        try:
            return use.turned(x, self.axes, product, function, back)
        except NotStructural:
            return use.apply(x, self.dense())

    def take(self, indices: jax.Array, use: Take) -> jax.Array:
        if self.axes.batch or (use.axis,) != self.axes.fan_out:
            return use.apply(indices, self.dense())
        out, turn = use.in_output(len(self.shape)), self.turn().swapaxes(-1, -2)
        rows = use.apply(indices, self.base)
        return on_axes(rows, [out[a] for a in self.axes.fan_in], lambda y: _turned(y, turn, len(out), None))


register(OFTWeight, meta=("size", "terms"))


def _turned(x: jax.Array, turn: jax.Array, n: int, precision: Any) -> jax.Array:
    """`x R` along the last n axes, flattened and cut into blocks."""
    blocks = x.reshape(*x.shape[: x.ndim - n], *turn.shape[:2])
    moved = jnp.einsum("...rk,rkc->...rc", blocks, turn.astype(x.dtype), precision=precision)
    return x + moved.reshape(x.shape)


def rotation_less_identity(q: jax.Array, size: int, terms: int = 0) -> jax.Array:
    """`R - I` of Cayley's `R = (I + Q)(I - Q)^-1`.

    Args:
      q: (*lead, size * (size - 1) / 2), the entries of Q above the diagonal, row by row.
      size: of Q.
      terms: 0 for the exact inverse; else of PEFT's polynomial, I + 2 Q + ... + 2 Q^(terms-2) + Q^(terms-1) with the
        quirk that 3 terms are 4, and that 2 are I + 2 Q.

    Returns:
      (*lead, size, size) in q's dtype.
    """
    rows, columns = np.triu_indices(size, 1)
    upper = jnp.zeros((*q.shape[:-1], size, size), q.dtype).at[..., rows, columns].set(q)
    skew = upper - upper.swapaxes(-1, -2)
    if not terms:
        identity = jnp.broadcast_to(jnp.eye(size, dtype=q.dtype), skew.shape)
        return jnp.matmul(inverse(identity - skew), 2 * skew, precision="highest")
    out, power = 2 * skew, skew
    if terms > 2:
        times_skew = lambda p: jnp.matmul(p, skew, precision="highest")  # noqa: E731
        for _ in range(2, max(terms, 4) - 1):
            power = times_skew(power)
            out = out + 2 * power
        out = out + times_skew(power)
    return out


@jax.custom_jvp
def inverse(a: jax.Array) -> jax.Array:
    """The inverses of matrices whose symmetric part is positive definite, as that of I - Q is.

    Such a matrix needs no pivots (Gauss and Jordan, a column a step), so no LAPACK: XLA on a CPU runs the calls of
    many sites side by side in the pool of threads that each of them waits for; on two cores a model of 36 stood still.

    Args:
      a: (*lead, n, n).
    """
    n = a.shape[-1]
    unit = jnp.broadcast_to(jnp.eye(n, dtype=a.dtype), a.shape)

    def column(k: jax.Array, m: jax.Array) -> jax.Array:
        row = jnp.take(m, k, axis=-2)
        row = row / jnp.take(row, k, axis=-1)[..., None]
        others = jnp.take(m, k, axis=-1) - jnp.take(unit, k, axis=-1)
        return m - others[..., :, None] * row[..., None, :]

    found = jax.lax.fori_loop(0, n, column, jnp.concatenate([a, unit], axis=-1))[..., n:]
    product = lambda x, y: jnp.matmul(x, y, precision="highest")  # noqa: E731
    return found + product(found, unit - product(a, found))  # one step of Newton's: what was lost for want of pivots


@inverse.defjvp
def _inverse_jvp(primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
    (a,), (da,) = primals, tangents
    found = inverse(a)
    times_a = lambda x, y: jnp.matmul(x, y, precision="highest")  # noqa: E731
    return found, -times_a(times_a(found, da), found)


def oft(
    block_size: Any = None,
    *,
    blocks: Any = None,
    targets: Any = None,
    layers: Any = "all",
    share_blocks: bool = False,
    cayley: str = "exact",
) -> Adapter:
    """Orthogonal fine-tuning.

    Args:
      block_size: PEFT's `oft_block_size`, an integer that divides fan_in, or ordered (pattern, size) rules; None: the
        largest divisor of each fan_in up to 32, or the smallest above it where only 1 is below (the audit shows it).
      blocks: PEFT's `r`, the number of blocks, instead of their size; likewise.
      targets: patterns on whole paths, or roles; None: every linear, DenseGeneral and convolution, but neither
        embeddings nor a head that the family names.
      layers: 'all', 'last:k', 'first:k', or a list of layer indices.
      share_blocks: one rotation for all blocks of a site.
      cayley: 'exact', 'neumann' (PEFT's polynomial of 5 terms) or 'neumann:k' (of k terms, at least 2).

    Returns:
      An Adapter. Its first output equals the base's exactly.

    Raises:
      UserError: a size that does not divide fan_in, both size and number, a bad option, a pattern that matches nothing.
    """
    terms = terms_of(cayley)
    check_word("oft", "share_blocks", share_blocks, (True, False))
    if block_size is not None and blocks is not None:
        raise UserError(f"oft: give block_size={block_size!r} or blocks={blocks!r}, not both: each tells the other")
    spec = json_ready(
        method="oft", block_size=block_size, blocks=blocks, targets=targets, layers=layers,
        share_blocks=share_blocks, cayley=cayley,
    )  # fmt: skip

    def choose(sites):
        flags = in_layers(sites, select(sites, targets, default_targets(sites)), layers)
        paths = check_matrices(sites, list(flags), "oft")
        name, given = ("blocks", blocks) if block_size is None else ("block_size", block_size)
        rules = parse_rules(given, name, sites, paths)
        return {p: (flags[p], _size(sites[p], name, rules[p])) for p in paths}

    def make(key, leaf, site, option):
        flags, size = option
        count = 1 if share_blocks else math.prod(site.dims(turned_axes(site).fan_in)) // size
        q = jnp.zeros((*batch_dims(site), count, size * (size - 1) // 2), jnp.float32)
        live = tuple(bool(on) for on in per_batch(flags, site).reshape(-1))
        return OFT(q=q, axes=turned_axes(site), size=size, live=live)

    def weight(base, one, place):
        if place.scale is not None:
            raise UserError(f"oft has no scale: a rotation at {place.path!r} cannot be scaled; bind it without `scale`")
        live = np.asarray(one.live, np.float32).reshape(one.q.shape[: len(one.axes.batch)])
        return OFTWeight(
            base=base, axes=one.axes, path=place.path, idle=_idle(one, live), q=one.q, live=jnp.asarray(live),
            size=one.size, terms=terms,
        )  # fmt: skip

    return per_site(spec, choose=choose, make=make, weight=weight)


def turned_axes(site: Site) -> Axes:
    """The site's axes with those that are turned as fan_in: an embedding is turned along its width."""
    axes = Axes.of(site)
    return Axes(axes.batch, axes.fan_out, axes.fan_in) if site.uses[:1] == ("embedding",) else axes


def terms_of(cayley: Any) -> int:
    """Terms of the polynomial; 0 for the exact inverse."""
    found = re.fullmatch(r"neumann(?::(\d+))?", str(cayley))
    if cayley != "exact" and not found:
        raise UserError(f"oft: cayley={cayley!r} is unknown, also 'neumann:k'; {did_you_mean(str(cayley), CAYLEY)}")
    terms = int(found.group(1) or USUAL_TERMS) if found else 0
    if found and terms < 2:
        raise UserError(f"oft: cayley={cayley!r}: a polynomial of fewer than 2 terms is the identity; give at least 2")
    return terms


def _size(site: Site, name: str, given: list) -> int:
    """The size of a site's blocks, checked."""
    if len({repr(g) for g in given}) > 1:
        raise UserError(
            f"oft: the layers of the stack {site.path!r} need one {name}, got {given}; or unroll the layers"
        )
    n, value = math.prod(site.dims(turned_axes(site).fan_in)), given[0]
    sizes = [d for d in range(2, n + 1) if n % d == 0]
    if not sizes:
        raise UserError(f"oft cannot turn {site.path!r} of shape {site.shape}: its fan_in is 1; leave it out")
    if value is None:
        return max((d for d in sizes if d <= USUAL_SIZE), default=sizes[0])
    fits = sizes if name == "block_size" else [n // d for d in sizes]
    if type(value) is not int or value not in fits:
        raise UserError(
            f"oft: {name}={value!r} does not fit {site.path!r}, whose fan_in is {n}; "
            f"valid: {', '.join(map(str, sorted(fits)))}"
        )
    return value if name == "block_size" else n // value


def _idle(one: OFT, live: np.ndarray) -> int:
    """Leading slices of a stack that are left out."""
    if not live.ndim or 0 not in one.axes.batch[:1]:
        return 0
    return int(np.argmax(live.reshape(len(live), -1).any(axis=1)))
