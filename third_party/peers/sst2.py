"""Fine-tunes a BERT-like encoder on sentences with PEFT, for one arm or for several in turn.

As `experiments.train` with configs/sst2_minilm.py: LoRA on query and value, pooler and classifier trained whole, AdamW
without decay, gradients clipped to 1, the learning rate down to 0 on a line, batches of a fresh permutation every epoch,
dev as often, test at the end, the adapter saved. Texts are tokenized once, a batch is padded to its longest text, and
evaluation takes texts of like length together. Several arms share one process, its imports and the tokenized data.
"""

import json
import os
import time
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model

import side


def main(settings):
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    data, labels = texts(settings)
    before = side.since_spawned()  # imports and tokenizing, for all arms together
    found = []
    for arm in settings["arms"]:
        began = time.perf_counter()
        accuracy = trained({**settings, **arm, "seed": int(arm["seed"])}, data, len(labels))
        found.append({**accuracy, "layers": arm["layers"], "seconds": time.perf_counter() - began})
    out = {f"{split}_accuracy": mean(one[split] for one in found) for split in ("dev", "test")}
    return {**out, "grid_seconds": before + whole(settings, found), "measured_arms": len(found)}


def whole(settings, found):
    """Seconds of all arms: those that were trained, times how many there are of their kind."""
    total = 0.0
    for layers, count in settings.get("arms_by_layers", {}).items():
        total += count * mean(one["seconds"] for one in found if str(one["layers"]) == layers)
    return total or sum(one["seconds"] for one in found)


def mean(values):
    values = list(values)
    return sum(values) / len(values)


def texts(settings):
    """{split: [(token ids, label)]} and the labels."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(settings["model"])
    rows = {}
    for split in ("train", "dev", "test"):
        lines = Path(settings["data"], f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
        rows[split] = [json.loads(line) for line in lines][: settings["limit"]]
    labels = sorted({str(row["label"]) for row in rows["train"]})
    out = {}
    for split, own in rows.items():
        cut = {"truncation": True, "max_length": settings["max_length"]}
        ids = tokenizer([row["text"] for row in own], **cut)["input_ids"]
        out[split] = [(one, labels.index(str(row["label"]))) for one, row in zip(ids, own)]
    out["pad"] = tokenizer.pad_token_id
    return out, labels


def trained(settings, data, labels):
    """Trains one arm; {split: accuracy}."""
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(settings["seed"])
    model = AutoModelForSequenceClassification.from_pretrained(settings["model"], num_labels=labels)
    config = LoraConfig(
        task_type="SEQ_CLS", r=settings["rank"], lora_alpha=settings["alpha"], target_modules=["query", "value"],
        modules_to_save=["pooler", "classifier"], layers_to_transform=settings["layers"],
    )
    model = get_peft_model(model.to(side.DEVICE), config).train()
    tx = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=settings["learning_rate"], weight_decay=0.0, fused=True
    )
    steps, last = settings["steps"], {}
    schedule = torch.optim.lr_scheduler.LambdaLR(tx, lambda step: 1 - step / steps)
    chosen = drawn(len(data["train"]), settings["batch_size"], settings["seed"])
    for step in range(1, steps + 1):
        tokens, mask, target = batch([data["train"][i] for i in next(chosen)], data["pad"])
        logits = model(input_ids=tokens, attention_mask=mask).logits
        torch.nn.functional.cross_entropy(logits, target).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        tx.step()
        schedule.step()
        tx.zero_grad(set_to_none=True)
        if step % settings["eval_every"] == 0 or step == steps:
            last["dev"] = accuracy(model, data["dev"], data["pad"], settings["batch_size"])
    last["test"] = accuracy(model, data["test"], data["pad"], settings["batch_size"])
    model.save_pretrained(Path(os.environ["BENCHMARK_RESULT"]).parent / "adapter")
    return last


def drawn(count, size, seed):
    """Batches of numbers: one permutation after the other."""
    generator, left = torch.Generator().manual_seed(seed), []
    while True:
        while len(left) < size:
            left += torch.randperm(count, generator=generator).tolist()
        yield left[:size]
        left = left[size:]


def batch(rows, pad):
    """Tokens and mask, padded to the longest row, and labels."""
    longest = max(len(ids) for ids, _ in rows)
    tokens = torch.tensor([ids + [pad] * (longest - len(ids)) for ids, _ in rows], device=side.DEVICE)
    mask = torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids, _ in rows], device=side.DEVICE)
    return tokens, mask, torch.tensor([label for _, label in rows], device=side.DEVICE)


@torch.inference_mode()
def accuracy(model, rows, pad, size):
    """Share of right answers."""
    model.eval()
    rows, right = sorted(rows, key=lambda row: len(row[0])), 0
    for first in range(0, len(rows), size):
        tokens, mask, target = batch(rows[first : first + size], pad)
        right += (model(input_ids=tokens, attention_mask=mask).logits.argmax(-1) == target).sum().item()
    model.train()
    return right / len(rows)


if __name__ == "__main__":
    side.run(main)
