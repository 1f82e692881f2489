"""What a person sees of a run: where it runs, what trains, one example, text before and after, where the files are."""

import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

import lora_jax as lj
from experiments import environment
from lora_jax import assess
from lora_jax.assemble import Parts
from lora_jax.errors import UserError
from lora_jax.settings import Config

WIDTH = 100


def title(text: str) -> None:
    """A line that begins a part of the output."""
    print(f"\n== {text} " + "=" * max(0, WIDTH - len(text) - 4), flush=True)


def banner(folder: Path) -> None:
    """Versions and devices: the first thing to look at when two runs differ."""
    first = jax.devices()[0]
    print(
        f"lora_jax {lj.__version__}, jax {jax.__version__}, Python {platform.python_version()}; "
        f"{jax.device_count()} x {first.device_kind} ({first.platform}{', huge pages' * _huge(first)}); {folder}",
        flush=True,
    )


def _huge(device: jax.Device) -> bool:
    return device.platform == "cpu" and environment.huge_pages()


def selection(config: Config, parts: Parts, delta: Any) -> None:
    """The audit, on one real example: which sites, what trains, and that the first output is the base's."""
    example = parts.task.encode(parts.task.prepare(parts.splits["train"][:1])[0])
    base = parts.base
    title("what trains")
    tokens = example["tokens"][None]
    print(lj.audit(parts.adapter, delta, base.variables, base.sites, base.apply, tokens, notes=config.adapter.notes))
    title("one example, as the model sees it")
    print(parts.task.preview(example))
    for notice in parts.splits.notices:
        print(notice)


def generations(written: assess.Written, count: int) -> None:
    """Prompts, what the model wrote, and what it should have written."""
    for row in written.rows[:count]:
        for name, text in (("prompt", row["prompt"]), ("generated", row["text"]), ("reference", row["references"][0])):
            print(f"  {name:<11}{_short(text)}")
        print()


def scores(metrics: Mapping[str, Any]) -> str:
    """Numbers on one line: loss 0.512, accuracy 0.85."""
    return ", ".join(
        f"{name.replace('_', ' ')} {value:.4g}" for name, value in metrics.items() if isinstance(value, (int, float))
    )


def comparison(before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
    """Each metric before and after training."""
    for name, value in before.items():
        if isinstance(value, (int, float)) and isinstance(after.get(name), (int, float)):
            print(f"  {name.replace('_', ' '):<14}{value:>10.4g}  ->{after[name]:>10.4g}")


def ending(folder: Path, summary: Mapping[str, Any], next_commands: Sequence[str]) -> None:
    """The result, the files, and what to run next."""
    title("done")
    print(
        f"step {summary['step']}, {summary['trainable_params']:,} of {summary['total_params']:,} parameters trained, "
        f"{summary['seconds']:.0f} s; saved: {summary['saved']}"
    )
    for split in ("dev", "test"):
        if summary[split]:
            print(f"  {split:<5} {scores(summary[split])}")
    print(f"\nfiles in {folder}: {', '.join(sorted(p.name + '/' * p.is_dir() for p in folder.iterdir()))}")
    print("next:\n" + "\n".join(f"  {command}" for command in next_commands))


def _short(text: str) -> str:
    line = " / ".join(text.strip().splitlines())
    return line if len(line) <= WIDTH - 13 else line[: WIDTH - 16] + "..."


def failed_arms(rows: Sequence[Mapping[str, Any]]) -> int:
    """Shows the arms of an ablation that failed, each with its reason; returns how many.

    Raises:
      UserError: all of them failed.
    """
    failed = [row for row in rows if row["status"] == "failed"]
    if failed and len(failed) == len(rows):
        raise UserError(f"no arm has a result, all {len(rows)} failed; {failed[0]['label']}: {failed[0]['reason']}")
    if failed:
        title("failed")
    for row in failed:
        print(f"{row['label']}: {row['reason']}")
    return len(failed)
