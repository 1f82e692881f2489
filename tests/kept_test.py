"""What a process leaves for the next: where, and that small programs are left too."""

import os
import subprocess
import sys
from pathlib import Path

CODE = """
import jax, jax.numpy as jnp
from lora_jax import kept
kept.use(kept.usual())
jax.jit(lambda x: x + 1)(jnp.ones(3)).block_until_ready()
print(kept.used() == kept.usual())
"""


def process(folder, **environment):
    unset = ("JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS")
    env = {name: value for name, value in os.environ.items() if name not in unset}
    env |= {"XDG_CACHE_HOME": str(folder), "PYTHONPATH": str(Path(__file__).parent.parent), **environment}
    done = subprocess.run([sys.executable, "-c", CODE], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True"


def test_the_usual_folder_takes_small_programs(tmp_path):
    process(tmp_path)
    assert list((tmp_path / "lora_jax" / "xla").glob("jit__lambda*"))


def test_jaxs_own_variables_win(tmp_path):
    process(tmp_path, JAX_COMPILATION_CACHE_DIR=str(tmp_path / "own"), JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0")
    assert list((tmp_path / "own").glob("jit__lambda*")) and not (tmp_path / "lora_jax" / "xla").exists()
    process(tmp_path, JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="60")
    assert not list(tmp_path.glob("lora_jax/xla/jit__lambda*"))
