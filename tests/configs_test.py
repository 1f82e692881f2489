"""Every file in configs/ resolves, and its docstring says what it asks and how to run it."""

import ast
from pathlib import Path

import pytest

from experiments import launch
from lora_jax import config

ROOT = Path(__file__).parents[1]
FILES = sorted(p for p in (ROOT / "configs").rglob("*.py") if "def get_config" in p.read_text(encoding="utf-8"))


@pytest.mark.parametrize("file", FILES, ids=lambda p: p.stem)
def test_resolves(file):
    cfg = launch.load(str(file))
    resolved = config.resolve(cfg)
    assert config.from_dict(cfg.to_dict()) == cfg
    assert resolved == config.resolve(config.from_dict(cfg.to_dict()))


@pytest.mark.parametrize("file", FILES, ids=lambda p: p.stem)
def test_docstring_has_question_and_command(file):
    docstring = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8")))
    assert "?" in docstring.splitlines()[0], "the first line asks a question"
    assert f"--config=configs/{file.relative_to(ROOT / 'configs')}" in docstring


def test_there_are_configs():
    assert {"quickstart", "sst2_minilm", "e2e", "banking"} <= {f.stem for f in FILES}
