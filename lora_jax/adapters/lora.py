"""LoRA: `W + scale * A B`, with A and B the only trained arrays.

Hu, Shen, Wallis, Allen-Zhu, Li, Wang, Wang, Chen (2021), "LoRA: Low-Rank Adaptation of Large Language Models",
arXiv:2106.09685, eq. 3. `scaling='alpha/sqrt(r)'` is rsLoRA: Kalajdzievski (2023), arXiv:2312.03732. `freeze_a` is
LoRA-FA: Zhang et al. (2023), arXiv:2308.03303 (without the preconditioned gradient of PEFT's optimizer of that name).

A is (*fan_in, rank), B is (rank, *fan_out), for weights of any number of axes. As in PEFT, A is drawn uniformly within
1/sqrt(fan_in) (the paper draws a Gaussian: `init='gaussian'`) and B is zero; for an embedding the roles are swapped, so
that a row that is looked up trains at once. Inits from the weight (`pissa`, `olora`) leave the base as it is:
the first update is kept in the delta and subtracted, so the output starts as the base's up to rounding.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from lora_jax.adapters.base import Adapter, Entry, entry, json_ready, only, per_site
from lora_jax.adapters.parts import inits
from lora_jax.adapters.parts.ranks import (
    SCALINGS,
    check_dropout,
    check_word,
    choose_ranks,
    idle,
    keys_at,
    scale_at,
    times,
)  # fmt: skip
from lora_jax.lift.nodes import LowRankWeight
from lora_jax.lift.weight import Axes, register
from lora_jax.sites import Sites


@entry(meta=("ranks", "scales"))
class LoRA(Entry):
    """One site's factors.

    Attributes:
      a: (*batch, *fan_in, rank) float32.
      b: (*batch, rank, *fan_out) float32.
      a0, b0: factors of an update that is subtracted (an init away from zero), never trained; or None.
      ranks: rank of each batch index; columns beyond it are zero in both factors, a fixed point of the optimizers.
      scales: scale of each batch index.
    """

    a: Any
    b: Any
    axes: Axes
    ranks: tuple[int, ...]
    scales: tuple[float, ...]
    a0: Any = None
    b0: Any = None
    member: str = ""
    widens: ClassVar = True
    layout: ClassVar = {
        "a": ("batch", "fan_in", "rank"), "b": ("batch", "rank", "fan_out"),
        "a0": ("batch", "fan_in", "rank"), "b0": ("batch", "rank", "fan_out"),
    }  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRAWeight(LowRankWeight):
    """`base + scale * (a b - a0 b0)`."""

    a: Any
    b: Any
    scale: Any
    a0: Any = None
    b0: Any = None
    layout: ClassVar = {**LowRankWeight.layout, **LoRA.layout, "scale": ("batch",)}

    def factors(self) -> tuple[jax.Array, jax.Array]:
        """The scale is applied to b, in float32."""
        if self.a0 is None:
            return self.a, times(self.b, self.scale)
        a = jnp.concatenate([self.a, self.a0], axis=-1)
        return a, times(jnp.concatenate([self.b, -self.b0], axis=len(self.axes.batch)), self.scale)


register(LoRAWeight, meta=("dropout",))


def lora(
    rank: Any = 8,
    alpha: Any = 16,
    *,
    targets: Any = None,
    layers: Any = "all",
    dropout: float = 0.0,
    scaling: str = "alpha/r",
    init: str = "default",
    freeze_a: bool = False,
) -> Adapter:
    """Low-rank adaptation.

    Args:
      rank: an integer, or ordered (pattern, rank) rules, first match wins; 0 leaves a site (or a layer of a stack) out.
      alpha: a number, or rules; not rescaled where a rule changes the rank (as PEFT's alpha_pattern).
      targets: patterns on whole paths, or roles; None: every linear, DenseGeneral and convolution, but neither
        embeddings nor a head that the family names.
      layers: 'all', 'last:k', 'first:k', or a list of layer indices.
      dropout: of the activation before A, in [0, 1); on where `bind` is given a key.
      scaling: 'alpha/r', 'alpha/sqrt(r)' (rsLoRA) or 'alpha'.
      init: 'default' (A uniform, B zero), 'gaussian' (A ~ N(0, 1/rank**2), B zero), 'a_zero' (A zero, B uniform),
        'orthogonal' (both non-zero, product zero), 'pissa', 'olora' (from the weight), 'eva' (from data: `init` needs
        `batch`, and the ranks are shared out between sites by the variance they explain), 'loftq' (from what
        quantization took away: `init` needs `batch`; the first output is nearer the dense base's).
      freeze_a: only B trains (LoRA-FA).

    Returns:
      An Adapter. Its first output equals the base's, exactly for default, gaussian and a_zero, else up to rounding.

    Raises:
      UserError: a rule that matches nothing, rank 0 everywhere or above min(fan_in, fan_out), a bad option.
    """
    check_dropout(dropout)
    check_word("lora", "scaling", scaling, SCALINGS)
    check_word("lora", "init", init, inits.INITS)
    check_word("lora", "freeze_a", freeze_a, (True, False))
    spec = json_ready(
        method="lora", rank=rank, alpha=alpha, targets=targets, layers=layers,
        dropout=dropout, scaling=scaling, init=init, freeze_a=freeze_a,
    )  # fmt: skip

    def choose(sites: Sites, given: Mapping | None = None):
        ranks = choose_ranks(
            sites, method="lora", targets=targets, layers=layers, rank=rank, alpha=alpha, scaling=scaling
        )
        return ranks if given is None or init != "eva" else inits.share_out(ranks, given, sites, scaling)

    def make(key, leaf, site, option, given=None):
        return start(key, leaf, site, option, init, given)

    def weight(base, one, place):
        return LoRAWeight(
            base=base, axes=one.axes, path=place.path, idle=idle(one), a=one.a, b=one.b, a0=one.a0, b0=one.b0,
            scale=scale_at(one, place.scale), key=keys_at(one, place.key, dropout), dropout=dropout,
        )  # fmt: skip

    return per_site(
        spec, choose=choose, make=make, weight=weight,
        trainable=only("b") if freeze_a else only("a", "b"),
        needs=inits.DATA.get(init, ""), starts_as_base=init != "loftq",
    )  # fmt: skip


def start(key: jax.Array, leaf: Any, site: Any, option: Any, init: str, given: Any = None) -> LoRA:
    """One site's initial entry; also of methods that add to LoRA."""
    at = inits.start_of(key, leaf, site, option, given)
    ranks, scales = at.static()
    return LoRA(**inits.initial(at, init)._asdict(), axes=Axes.of(site), ranks=ranks, scales=scales)
