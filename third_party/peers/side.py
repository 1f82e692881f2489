"""What the peers' sides share: settings in, numbers out, threads, a LoRA of PEFT on a Llama at random weights.

Each script is run as `python third_party/peers/NAME.py SETTINGS` with settings as JSON, and writes {name: number} to the
file that BENCHMARK_RESULT names. They use torch, transformers and PEFT as their documentation says, with the settings
that we found fastest, and nothing of ours.
"""

import json
import os
import sys
import time
from pathlib import Path

import torch

torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or torch.get_num_threads()))
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def run(function):
    """Calls `function(settings)` and writes what it returns."""
    started = since_spawned()
    if os.environ.get("BENCHMARK_ACCELERATOR") == "1" and DEVICE == "cpu":
        print(f"torch {torch.__version__} finds no CUDA device here")
        sys.exit(77)  # what the benchmark takes for "absent"
    values = {"start_seconds": started, **function(json.loads(sys.argv[1]))}
    values["peak_rss_bytes"] = status("VmHWM")
    Path(os.environ["BENCHMARK_RESULT"]).write_text(json.dumps(values))


def since_spawned():
    """Seconds since the process was started."""
    return time.time() - float(os.environ["BENCHMARK_SPAWNED"])


def status(name):
    """A size from /proc/self/status in bytes: VmHWM is the most memory held so far, VmRSS what is held now."""
    lines = open("/proc/self/status", encoding="ascii").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":"))


def wait():
    """Until the device has done what it was given."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def llama(config, dtype="float32"):
    """A decoder of transformers at random weights; attention is torch's scaled_dot_product_attention."""
    from transformers import AutoConfig, AutoModelForCausalLM

    given = AutoConfig.for_model(**{**config, "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0})
    torch.manual_seed(0)
    with torch.device(DEVICE):
        model = AutoModelForCausalLM.from_config(given, attn_implementation="sdpa", dtype=getattr(torch, dtype))
    return model


def matmul_peak(size, dtype, tries=5):
    """FLOP/s of the best of some products of two square matrices."""
    a, b = (torch.randn(size, size, dtype=getattr(torch, dtype), device=DEVICE) for _ in range(2))
    best = float("inf")
    for _ in range(1 + tries):
        wait()
        began = time.perf_counter()
        a @ b
        wait()
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best
