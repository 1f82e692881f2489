"""What a training step keeps of its forward pass for the backward pass, and what it computes again.

Products with weights are kept: they are what a step costs. What lies between them (norms, activations, attention's
scores) is cheap, and kept it would be most of the memory: of 30M Llama at 1,024 tokens 452 MB of temporaries become
244, for 1 % of FLOPs (CPU, jax 0.10.2, compiled 2026-11-28). A function that says itself what is computed again is left
alone.
"""

import ctypes
import ctypes.util
import functools
import sys
from collections.abc import Callable
from typing import Any

import jax

from lora_jax.lift import KEPT, recomputes_products, traced

# By the names of primitives. Random bits, since drawing them again would cost more than they take.
PRIMITIVES = frozenset("conv_general_dilated ragged_dot ragged_dot_general pallas_call random_bits".split())
COMPILED = "/jax/core/compile/backend_compile_duration"
LONG = 1.0  # seconds; a program that took less to compile left little behind


def between_products(function: Callable) -> Callable:
    """The function, whose derivative keeps the results of products with weights and computes the rest again."""

    def run(*args: Any) -> Any:
        program, once = traced(function, *args)
        if recomputes_products(program):
            return once(*args)
        return jax.checkpoint(once, policy=_kept)(*args)

    return run


def _kept(primitive: Any, *_: Any, **params: Any) -> bool:
    if primitive.name == "dot_general":  # a product with batch axes is one of two activations, as in attention
        return not params["dimension_numbers"][1][0]
    return primitive.name in PRIMITIVES or (primitive.name == "name" and params["name"] == KEPT)


@functools.cache
def trim_after_compiling() -> None:
    """From now on, what a compiler leaves behind is given back to the system before the program first runs.

    On a CPU the compiler's memory is the process's own, and glibc keeps it: 150 MB under a step's temporaries.
    """
    name = ctypes.util.find_library("c") if sys.platform == "linux" else None
    trim = getattr(ctypes.CDLL(name), "malloc_trim", None) if name else None
    if trim is None or jax.default_backend() != "cpu":
        return

    def compiled(event: str, duration_secs: float, **_: Any) -> None:
        if event == COMPILED and duration_secs > LONG:
            trim(0)

    jax.monitoring.register_event_duration_secs_listener(compiled)
