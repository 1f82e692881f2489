"""Shared test set-up: eight virtual CPU devices, no silent rank promotion, the shared data sets, test markers."""

import os
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# Many tests compile the same small programs: each is compiled once, by whichever test or command comes first.
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", str(Path(__file__).resolve().parent.parent / ".pytest_cache" / "xla")
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data sets: skipped where a machine has none, an error on CI."""
    folder = os.environ.get("LORA_JAX_DATA")
    if folder and Path(folder).is_dir():
        return Path(folder)
    reason = f"real data sets are needed: set LORA_JAX_DATA to their folder (now {folder!r})"
    if os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)
