"""Every file in configs/ resolves, every arm of its sweep too; its docstring says what it asks and how to run it."""

import ast
import functools
from pathlib import Path

import pytest

from configs import minilm
from experiments import launch
from lora_jax import adapters, config
from lora_jax.ablation import expand

ROOT = Path(__file__).parents[1]
FILES = sorted(p for p in (ROOT / "configs").rglob("*.py") if "def get_config" in p.read_text(encoding="utf-8"))
SWEEPS = [p for p in FILES if "def sweep" in p.read_text(encoding="utf-8")]


def name(file):
    return str(file.relative_to(ROOT / "configs").with_suffix(""))


@functools.cache
def arms_of(file):
    """The arms of an ablation. A sweep that reads its model's sizes needs the checkpoint."""
    if "def sweep(cfg" in file.read_text(encoding="utf-8") and not Path(minilm.path()).is_dir():
        pytest.skip("the sweep reads sizes of MiniLM: install the extra `peers`")
    cfg = launch.load(str(file))
    return expand(launch.load_sweep(str(file), cfg), functools.partial(config.variant, cfg))


@pytest.mark.parametrize("file", FILES, ids=name)
def test_resolves(file):
    cfg = launch.load(str(file))
    resolved = config.resolve(cfg)
    assert config.from_dict(cfg.to_dict()) == cfg
    assert resolved == config.resolve(config.from_dict(cfg.to_dict()))


@pytest.mark.parametrize("file", FILES, ids=name)
def test_docstring_has_question_and_command(file):
    docstring = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8")))
    assert "?" in docstring.splitlines()[0], "the first line asks a question"
    assert f"--config=configs/{file.relative_to(ROOT / 'configs')}" in docstring
    assert ("experiments.ablate" if file in SWEEPS else "experiments.train") in docstring


@pytest.mark.parametrize("file", SWEEPS, ids=name)
def test_every_arm_resolves(file):
    arms = arms_of(file)
    assert len({arm.label for arm in arms}) == len({arm.id for arm in arms}) == len(arms) > 1
    assert {arm.axes["seed"] for arm in arms} == {0, 1, 2}
    docstring = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8")))
    if file.stem != "methods":  # which grows with the methods
        assert f"{len(arms)} arms" in docstring


def test_every_method_gets_the_same_search():
    arms = arms_of(ROOT / "configs" / "ablations" / "methods.py")
    by_method = {}
    for arm in arms:
        by_method.setdefault(arm.config.adapter.method, []).append((arm.config.train.learning_rate, arm.config.seed))
    assert set(by_method) == set(adapters.methods()) - {"chain"}
    assert len({tuple(tried) for tried in by_method.values()}) == 1


def test_there_are_configs():
    assert {"quickstart", "sst2_minilm", "e2e", "banking"} <= {f.stem for f in FILES}
    assert {"rank", "layers", "matrices", "methods", "scaling", "learning_rate"} <= {f.stem for f in SWEEPS}
