"""Data flows down the package: a file imports only from above it, and flags and configs stay at the edge."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "lora_jax"

# Top to bottom, as in docs/design.md. Stations on one line do not import each other.
ORDER = [
    ["errors"],
    ["trees"],
    ["dropout"],
    ["sites"],
    ["lift"],
    ["likelihood"],
    ["virtual"],
    ["adapters"],
    ["quant"],
    ["saving"],
    ["audit"],
    ["analyze"],
    ["models"],
    ["data"],
    ["tasks"],
    ["sharding"],
    ["optim"],
    ["train_settings"],
    ["feed"],
    ["recompute"],
    ["step"],
    ["records"],
    ["manifest"],
    ["stopping"],
    ["progress"],
    ["evaluate"],
    ["checkpoint"],
    ["loop"],
    ["prefix_cache"],
    ["train"],
    ["tiling"],
    ["generate"],
    ["export"],
    ["tiny"],
    ["settings"],
    ["assemble"],
    ["assess"],
    ["config"],
    ["kept"],
    ["ablation"],
]
RANK = {name: i for i, row in enumerate(ORDER) for name in row}
# Inside these folders each file is one method, family or objective; what several need has one of these names.
SHARED = {
    "adapters": {
        "base",
        "parts",
        "full",
        "lora",
        "from_spec",
    },  # full: in place, which head, layers, ... narrow; dora adds to lora
    "quant": {"base", "blocks", "product", "store", "table"},
    "models": {
        "attention",
        "base",
        "cache",
        "files",
        "hf",
        "kernels",
        "layers",
        "linear",
        "masks",
        "options",
        "registry",
        "rotary",
        "tensor",
        "tokenizer",
        "virtual_tokens",
    },
    "tasks": {"base", "causal"},
}
EDGE = {"absl", "ml_collections"}
NEVER = {"torch", "tensorflow", "peft"}


def files() -> list[Path]:
    return sorted(p for p in PACKAGE.rglob("*.py") if p != PACKAGE / "__init__.py")


def imported(file: Path) -> list[str]:
    """Full dotted names of what a file imports, anywhere in it; `from lora_jax import x` gives lora_jax.x."""
    names = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative imports hide the order; write lora_jax.{node.module}"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def station(file: Path) -> str:
    return file.relative_to(PACKAGE).with_suffix("").parts[0]


def name(file: Path) -> str:
    return str(file.relative_to(ROOT))


def test_every_station_has_a_place():
    unknown = sorted({station(f) for f in files()} - set(RANK))
    assert not unknown, f"put {unknown} into ORDER, and into docs/design.md"


@pytest.mark.parametrize("file", files(), ids=name)
def test_imports_only_from_above(file):
    own = station(file)
    for target in imported(file):
        parts = target.split(".")
        if parts[0] != "lora_jax":
            continue
        assert len(parts) > 1, f"{name(file)} imports lora_jax itself, which imports everything"
        other = parts[1]
        assert other in RANK, f"{name(file)} imports lora_jax.{other}, which is no station"
        assert other == own or RANK[other] < RANK[own], f"{name(file)} imports lora_jax.{other} from below it"


@pytest.mark.parametrize("file", files(), ids=name)
def test_flags_and_configs_stay_at_the_edge(file):
    used = {target.split(".")[0] for target in imported(file)}
    assert not used & NEVER, f"{name(file)} imports {used & NEVER}"
    if file != PACKAGE / "config.py":
        assert not used & EDGE, f"{name(file)} imports {used & EDGE}: only config.py, experiments/ and configs/ may"


@pytest.mark.parametrize("folder", sorted(SHARED))
def test_siblings_do_not_import_each_other(folder):
    for file in (PACKAGE / folder).glob("*.py"):
        if file.stem in SHARED[folder] | {"__init__"}:
            continue
        for target in imported(file):
            parts = target.split(".")
            if parts[:2] == ["lora_jax", folder]:
                sibling = parts[2] if len(parts) > 2 else "__init__"
                own_part = sibling.startswith(file.stem + "_")  # llama and llama_config are one idea in two files
                assert own_part or sibling in SHARED[folder], f"{name(file)} imports its sibling {sibling}"


def test_no_config_is_read_with_a_default():
    """`cfg.get(name, default)` hides a misspelt name for good. Only experiments/ and config.py hold a ConfigDict."""
    for file in [*(ROOT / "experiments").glob("*.py"), *(ROOT / "configs").rglob("*.py"), PACKAGE / "config.py"]:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "get":
                text = ast.unparse(node.func.value)
                assert not any(word in text.split(".")[0] for word in ("cfg", "config")), (
                    f"{name(file)} line {node.lineno}: {text}.get"
                )


def test_importing_the_package_loads_nothing_heavy(tmp_path):
    """transformers, datasets and the like cost seconds; torch must never come in."""
    import subprocess
    import sys

    heavy = [
        "torch",
        "tensorflow",
        "transformers",
        "datasets",
        "orbax.checkpoint",
        "absl.flags._heavy",
        "matplotlib",
        "pandas",
    ]
    code = f"import sys, lora_jax; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
