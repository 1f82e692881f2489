"""Measuring inside a process: steady state apart from the first call, the matmul peak, memory."""

import os
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

_STATUS = "/proc/self/status"


def since_spawned() -> float:
    """Seconds since the process was started; what it took to get here."""
    return time.time() - float(os.environ["BENCHMARK_SPAWNED"])


def first_and_steady(turn: Callable[[int], Any], count: int, warm: int = 2) -> tuple[float, float]:
    """(seconds of the first turn, seconds of a turn in steady state).

    Args:
      turn: does the i-th piece of work; what it returns is waited for at the end alone, so turns may overlap as they do
        in a real loop.
      count: turns that are measured together.
      warm: turns between the first one and those.
    """
    began = time.perf_counter()
    jax.block_until_ready(turn(0))
    first = time.perf_counter() - began
    last = None
    for i in range(warm):
        last = turn(1 + i)
    jax.block_until_ready(last)
    began = time.perf_counter()
    for i in range(count):
        last = turn(1 + warm + i)
    jax.block_until_ready(last)
    return first, (time.perf_counter() - began) / count


def matmul_peak(size: int, dtype: Any = jnp.float32, tries: int = 5) -> float:
    """FLOP/s of the best of some products of two square matrices: what this device can do here and now."""
    a, b = (jax.random.normal(jax.random.key(i), (size, size), jnp.float32).astype(dtype) for i in range(2))
    product = jax.jit(jnp.matmul)
    jax.block_until_ready(product(a, b))
    best = float("inf")
    for _ in range(tries):
        began = time.perf_counter()
        jax.block_until_ready(product(a, b))
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best


def peak_rss() -> int:
    """The most memory that this process ever held, in bytes; 0 where the system does not tell."""
    return _status("VmHWM")


def rss() -> int:
    """The memory that this process holds now, in bytes."""
    return _status("VmRSS")


def device_peak() -> int:
    """The most memory of the accelerator that was in use, in bytes; 0 on CPU."""
    return int((jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0))


def device_limit() -> int:
    """Memory that arrays may take, in bytes: the accelerator's, or the machine's."""
    stats = jax.devices()[0].memory_stats() or {}
    return int(stats.get("bytes_limit", 0)) or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def flops(compiled: Any) -> float:
    """FLOPs of a compiled program by the compiler's own count."""
    cost = compiled.cost_analysis()
    return float((cost[0] if isinstance(cost, list) else cost)["flops"])


def temporaries(compiled: Any) -> int:
    """Bytes that a compiled program needs besides its arguments and results."""
    return compiled.memory_analysis().temp_size_in_bytes


def _status(name: str) -> int:
    try:
        lines = open(_STATUS, encoding="ascii").read().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":")), 0)
