"""One LoRA step of PEFT on a Llama at random weights, as it is or under torch.compile.

AdamW is torch's fused one. The batch needs no attention mask, so none is given and SDPA takes its causal path. On an
accelerator, where the activations do not fit, gradient checkpointing is turned on.
"""

import time

import torch
from peft import LoraConfig, get_peft_model

import side


def main(settings):
    settings = {"checkpointing": False, **settings}
    try:
        return measured(settings)
    except torch.cuda.OutOfMemoryError:
        torch.cuda.empty_cache()
    return measured({**settings, "checkpointing": True})


def measured(settings):
    model, weights = built(settings)
    batch, length, vocabulary = settings["batch"], settings["length"], settings["model"]["vocab_size"]
    draw = torch.Generator().manual_seed(0)
    rows = [torch.randint(1, vocabulary, (batch, length), generator=draw).to(side.DEVICE) for _ in range(4)]
    tx = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.0, fused=True)
    call = torch.compile(model) if settings["compile"] else model

    def step(i):
        tokens = rows[i % len(rows)]
        call(input_ids=tokens, labels=tokens).loss.backward()
        tx.step()
        tx.zero_grad(set_to_none=True)

    before = side.status("VmRSS")
    began = time.perf_counter()
    step(0)
    side.wait()
    first = time.perf_counter() - began
    for i in range(2):
        step(1 + i)
    side.wait()
    began = time.perf_counter()
    for i in range(settings["steps"]):
        step(3 + i)
    side.wait()
    steady = (time.perf_counter() - began) / settings["steps"]
    peak_rss = side.status("VmHWM")
    peak = side.matmul_peak(settings["matmul"], settings["dtype"])
    tokens, matrices = batch * length, matrix_params(model)
    return {
        "tokens_per_second": tokens / steady,
        "step_seconds": steady,
        "first_step_seconds": first,
        "matmul_flops_per_second": peak,
        "peak_share": 4 * matrices * tokens / steady / peak,
        "matrix_params": matrices,
        "weight_bytes": weights,
        "over_weights_bytes": peak_rss - weights,
        "training_bytes": peak_rss - before,
        "checkpointing": float(settings["checkpointing"]),
        "device_peak_bytes": torch.cuda.max_memory_allocated() if side.DEVICE == "cuda" else 0,
    }


def built(settings):
    """(the model with its adapter, bytes of the frozen weights)."""
    model = side.llama(settings["model"], settings["dtype"])
    model.config.use_cache = False
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    rank = settings["rank"]
    config = LoraConfig(
        r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules=side.LINEARS, task_type="CAUSAL_LM"
    )
    model = get_peft_model(model, config)
    if settings["checkpointing"]:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train(), weights


def matrix_params(model):
    """Frozen weights that are multiplied with every token: linear layers, the head among them."""
    linear = (m for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "lora_" not in name)
    return sum(m.weight.numel() for m in linear)


if __name__ == "__main__":
    side.run(main)
