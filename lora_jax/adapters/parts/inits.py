"""Initial factors of a low-rank update, by name.

An init is a function of `Start` that returns a (*batch, *fan_in, r) and b (*batch, r, *fan_out), float32. One that
starts away from zero also returns the update to subtract, as a second pair of factors, so that the base itself is
never changed. Random draws depend on the site's key, the layer and the column alone: a smaller rank starts from the
first columns of a larger one, and leaving a layer out changes nothing for the others.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.adapters.base import batch_dims, draw, per_batch
from lora_jax.adapters.parts.ranks import SCALINGS, Ranks
from lora_jax.errors import UserError
from lora_jax.lift.nodes import dense
from lora_jax.sites import Site, Sites

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Start:
    """What an init may look at.

    Attributes:
      key: of the site.
      site: the site.
      leaf: the base weight.
      ranks: (*batch,) integers.
      scales: (*batch,) floats.
      given: what the init asks for beside the weight (`DATA`), or None.
    """

    key: Array
    site: Site
    leaf: Any
    ranks: np.ndarray
    scales: np.ndarray
    given: Any = None

    @property
    def r(self) -> int:
        """Columns of the factors: the largest rank of the stack."""
        return int(self.ranks.max())

    @property
    def batch(self) -> tuple[int, ...]:
        """Sizes of the batch axes."""
        return batch_dims(self.site)

    @property
    def fan_in(self) -> tuple[int, ...]:
        """Sizes of the fan_in axes."""
        return self.site.dims(self.site.fan_in)

    @property
    def fan_out(self) -> tuple[int, ...]:
        """Sizes of the fan_out axes."""
        return self.site.dims(self.site.fan_out)

    def matrices(self, weight: Any = None) -> Array:
        """The base weight (or another of its shape) as (*batch, n_in, n_out), float32."""
        order = (*self.site.batch, *self.site.fan_in, *self.site.fan_out)
        w = jnp.asarray(dense(self.leaf) if weight is None else weight, jnp.float32).transpose(order)
        return w.reshape(*self.batch, math.prod(self.fan_in), math.prod(self.fan_out))

    def shaped(self, a: Array, b: Array) -> tuple[Array, Array]:
        """(*batch, n_in, r) and (*batch, r, n_out) with the weight's own axes."""
        return a.reshape(*self.batch, *self.fan_in, -1), b.reshape(*self.batch, -1, *self.fan_out)

    def alive(self, factor: Array, axis: int) -> Array:
        """A factor with zeros beyond each layer's own rank along an axis: a fixed point of the optimizers."""
        live = np.arange(self.r) < self.ranks[..., None]  # (*batch, r)
        shape = [*self.batch, *(1,) * (factor.ndim - len(self.batch))]
        shape[axis] = self.r
        return jnp.where(live.reshape(shape), factor, 0)

    def static(self) -> tuple[tuple[int, ...], tuple[float, ...]]:
        """Rank and scale of each batch index, for an entry's static fields."""
        return tuple(int(n) for n in self.ranks.reshape(-1)), tuple(float(s) for s in self.scales.reshape(-1))


class Factors(NamedTuple):
    """Attributes: a0, b0: of the update that is subtracted; None where the first update is zero."""

    a: Array
    b: Array
    a0: Array | None = None
    b0: Array | None = None


def initial(start: Start, init: str) -> Factors:
    """The initial factors by an init's name, with zeros in the columns beyond each layer's own rank."""
    found = INITS[init](start)
    if isinstance(found, Factors):
        return found
    a, b = start.alive(found[0], -1), start.alive(found[1], len(start.batch))
    return Factors(a, b, a, b) if init in RESIDUAL else Factors(a, b)


def _columns(key: Array, start: Start, sampler: Callable) -> Array:
    """(*batch, *fan_in, r), drawn column by column."""
    return jnp.moveaxis(draw(key, start.batch, start.r, sampler, start.fan_in), len(start.batch), -1)


def _zeros(start: Start) -> tuple[Array, Array]:
    return jnp.zeros((*start.batch, *start.fan_in, start.r)), jnp.zeros((*start.batch, start.r, *start.fan_out))


@functools.cache
def uniform(fan: int) -> Callable:
    """Draws within 1/sqrt(fan)."""
    width = 2.0 / math.sqrt(fan)
    # u - 1/2 is exact and one product rounds once: the same bits jitted or not, whatever a compiler fuses.
    return lambda key, shape: (jax.random.uniform(key, shape) - 0.5) * width


def _default(start: Start) -> tuple[Array, Array]:
    """A uniform within 1/sqrt(fan_in), B zero; for an embedding A zero and B normal, as in PEFT."""
    key_a, key_b = jax.random.split(start.key)
    a, b = _zeros(start)
    if start.site.uses[:1] == ("embedding",):
        return a, draw(key_b, start.batch, start.r, jax.random.normal, start.fan_out)
    return _columns(key_a, start, uniform(math.prod(start.fan_in))), b


def _gaussian(start: Start) -> tuple[Array, Array]:
    """A ~ N(0, 1/rank**2), B zero (PEFT's 'gaussian'); for an embedding as `default`."""
    if start.site.uses[:1] == ("embedding",):
        return _default(start)
    a = _columns(jax.random.split(start.key)[0], start, jax.random.normal)
    own = np.maximum(start.ranks, 1).astype(np.float32)
    return a / own.reshape(own.shape + (1,) * (a.ndim - own.ndim)), _zeros(start)[1]


def _a_zero(start: Start) -> tuple[Array, Array]:
    """A zero, B uniform within 1/sqrt(fan_out)."""
    sampler = uniform(math.prod(start.fan_out))
    return _zeros(start)[0], draw(jax.random.split(start.key)[1], start.batch, start.r, sampler, start.fan_out)


def _orthogonal(start: Start) -> tuple[Array, Array]:
    """Both factors non-zero with a zero product: columns of one orthogonal r x r matrix shared out between them.

    As PEFT's 'orthogonal'. Differs from the other inits: a smaller rank is not the beginning of a larger one.
    """
    r = start.r
    if r % 2 or len({*start.ranks.reshape(-1).tolist()} - {0}) != 1:
        raise UserError(
            f"lora: init='orthogonal' needs an even rank, the same in all layers of a stack; {start.site.path!r} has "
            f"{sorted({*start.ranks.reshape(-1).tolist()})}"
        )
    total = math.prod(start.batch)

    def one(key):
        key_q, key_a, key_b = jax.random.split(key, 3)
        q = jnp.linalg.qr(jax.random.normal(key_q, (r, r)))[0]
        a = jax.random.normal(key_a, (math.prod(start.fan_in), r // 2)) @ q[0::2] / 10.0
        return a, q[1::2].T @ jax.random.normal(key_b, (r // 2, math.prod(start.fan_out))) / 10.0

    keys = jax.vmap(lambda i: jax.random.fold_in(start.key, i))(jnp.arange(total))
    return start.shaped(*jax.vmap(one)(keys))


def _pissa(start: Start) -> tuple[Array, Array]:
    """The principal part of the weight (Meng, Wang, Zhang 2024, arXiv:2404.02948, eq. 2-3), divided by the scale."""
    return _principal(start, start.matrices())


def _principal(start: Start, matrices: Array) -> tuple[Array, Array]:
    """Factors of the best approximation of that rank, divided by the scale, the singular values shared out evenly."""
    u, s, vt = jnp.linalg.svd(matrices, full_matrices=False)
    scale = np.where(start.scales == 0, 1, start.scales)[..., None]
    root = jnp.sqrt(s[..., : start.r] / scale)
    return start.shaped(u[..., : start.r] * root[..., None, :], root[..., :, None] * vt[..., : start.r, :])


def _olora(start: Start) -> tuple[Array, Array]:
    """The first columns of a QR factorization of the transposed weight (Buyukakyuz 2024, arXiv:2406.01775)."""
    q, right = jnp.linalg.qr(jnp.swapaxes(start.matrices(), -1, -2))
    a, b = right[..., : start.r, :], q[..., :, : start.r]
    return start.shaped(jnp.swapaxes(a, -1, -2), jnp.swapaxes(b, -1, -2))


def _eva(start: Start) -> tuple[Array, Array]:
    """The directions that explain most of the site's input (Paischer et al. 2024, arXiv:2410.07170), B zero."""
    if start.batch:
        raise UserError(f"lora: init='eva' cannot start the stacked weight {start.site.path!r}; unroll the layers")
    _, vectors = jnp.linalg.eigh(jnp.asarray(start.given, jnp.float32))
    return start.shaped(vectors[:, ::-1][:, : start.r], jnp.zeros((start.r, math.prod(start.fan_out))))


def _loftq(start: Start) -> tuple[Array, Array]:
    """The principal part of what quantization took away (Li, Yu, Liang, He, Karampatziakis, Chen, Zhao 2023,
    arXiv:2310.08659, algorithm 1 with one step: further ones would change the quantized base, which others share)."""
    return _principal(start, start.matrices(start.given))


INITS: dict[str, Callable[[Start], Any]] = {
    "default": _default, "gaussian": _gaussian, "a_zero": _a_zero, "orthogonal": _orthogonal,
    "pissa": _pissa, "olora": _olora, "eva": _eva, "loftq": _loftq,
}  # fmt: skip
RESIDUAL = ("pissa", "olora")  # start away from zero: their first update is subtracted
DATA = {"eva": "moments", "loftq": "residuals"}  # what else they start from


def start_of(key: Array, leaf: Any, site: Site, option: Ranks, given: Any = None) -> Start:
    """Spreads one rank and scale per layer over all batch axes."""
    ranks, scales = option
    return Start(key, site, leaf, per_batch(ranks, site), per_batch(scales, site), given)


def share_out(ranks: Mapping[str, Ranks], moments: Mapping[str, Any], sites: Sites, scaling: str) -> dict[str, Ranks]:
    """Redistributes the ranks between sites: the components that explain most of their site's input get them.

    Paischer et al. (2024), arXiv:2410.07170, section 3: every site offers up to twice its rank; the total stays. A
    site's alpha is kept, so its scale follows its new rank.
    """
    offers = []
    for path, (own, _) in ranks.items():
        values = np.maximum(np.linalg.eigvalsh(np.asarray(moments[path], np.float64))[::-1], 0)
        most = min(2 * own[0], sites[path].max_rank)
        offers += [(share, path) for share in (values / max(values.sum(), 1e-30))[:most]]
    kept = sorted(offers, key=lambda o: -o[0])[: sum(own[0] for own, _ in ranks.values())]
    out = {}
    for path, (own, scales) in ranks.items():
        r = sum(p == path for _, p in kept)
        alpha = scales[0] / SCALINGS[scaling](1.0, own[0])
        if r:
            out[path] = ([r], [SCALINGS[scaling](alpha, r)])
    return out
