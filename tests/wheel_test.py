"""The wheel: builds, installs, imports from where it was installed, and holds the embedded model."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder with the package installed from its wheel. Built from a copy, so that the checkout stays clean."""
    pytest.importorskip("setuptools")
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("out")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "lora_jax", source / "lora_jax", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "configs", source / "configs")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    quick = ["--no-deps", "--no-index"]
    wheel = [*pip, "wheel", *quick, "--no-build-isolation", "--wheel-dir", str(out), str(source)]
    subprocess.run(wheel, check=True, timeout=120)
    [file] = out.glob("*.whl")
    subprocess.run([*pip, "install", *quick, "--target", str(out / "site"), str(file)], check=True, timeout=120)
    return out / "site"


def test_installs_the_package_and_nothing_else(installed):
    names = {p.name for p in installed.iterdir()}
    assert {n for n in names if not n.endswith(".dist-info")} == {"lora_jax"}


def test_holds_every_file_of_the_package(installed):
    def files(root):
        found = {str(p.relative_to(root)) for p in (root / "lora_jax").rglob("*") if p.is_file()}
        return {name for name in found if "__pycache__" not in name}

    assert files(installed) == files(ROOT)
    assert "lora_jax/tiny/model/model.safetensors" in files(installed)


def test_imports_and_finds_the_embedded_model(installed, tmp_path):
    code = (
        "import lora_jax, lora_jax.tiny as t; from lora_jax.models import load_pretrained;"
        "base = load_pretrained(t.path()); print(lora_jax.__file__);"
        "print(lora_jax.lora(rank=2).spec['rank'], len(base.sites) > 0)"
    )
    env = {**os.environ, "PYTHONPATH": str(installed)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    where, rest = done.stdout.splitlines()
    assert where.startswith(str(installed)) and rest == "2 True"
