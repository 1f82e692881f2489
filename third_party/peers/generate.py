"""Greedy generation of transformers, with its usual growing cache or with a static one and a compiled forward pass."""

import time

import torch

import side


def main(settings):
    model = side.llama(settings["model"]).eval()
    draw = torch.Generator().manual_seed(0)
    shape = (settings["batch"], settings["prompt"])
    prompts = torch.randint(1, settings["model"]["vocab_size"], shape, generator=draw).to(side.DEVICE)
    how = {"do_sample": False, "use_cache": True, "pad_token_id": 0, "max_new_tokens": settings["new"]}
    how |= {"min_new_tokens": settings["new"]}
    if settings["static_cache"]:
        model.forward = torch.compile(model.forward)
        how["cache_implementation"] = "static"

    def call():
        began = time.perf_counter()
        with torch.inference_mode():
            out = model.generate(prompts, attention_mask=torch.ones_like(prompts), **how)
        side.wait()
        assert out.shape[1] == settings["prompt"] + settings["new"]
        return time.perf_counter() - began

    first = call()
    call()
    seconds = sum(call() for _ in range(settings["calls"])) / settings["calls"]
    return {
        "new_tokens_per_second": settings["batch"] * settings["new"] / seconds,
        "call_seconds": seconds,
        "first_call_seconds": first,
    }


if __name__ == "__main__":
    side.run(main)
