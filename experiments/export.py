"""Takes the adapter of a finished run to the outside world.

python -m experiments.export --workdir=runs/quickstart --format=peft --out=DIR   (adapter, for PEFT, vLLM, ...)
python -m experiments.export --workdir=runs/quickstart --format=hf --out=DIR     (merged, in Hugging Face layout)

A run on a quantized base is merged into the dequantized weights, since those are what its adapter was trained on.
"""

from pathlib import Path

from absl import flags

from experiments import launch, workdir
from lora_jax import config as config_lib
from lora_jax import export, models, quant
from lora_jax.assemble import assemble, load_adapter
from lora_jax.errors import UserError, did_you_mean

FORMATS = ("peft", "hf")
FORMAT = flags.DEFINE_string("format", None, "peft: the adapter alone; hf: merged into the checkpoint.")
VLLM = flags.DEFINE_bool("vllm_compatible", False, "peft: one rank, no scales; refuse what vLLM cannot serve.")


def main() -> None:
    folder = workdir.path()
    if FORMAT.value not in FORMATS:
        raise UserError(f"--format={FORMAT.value or ''}: {did_you_mean(FORMAT.value or '', FORMATS)}")
    if VLLM.value and FORMAT.value != "peft":
        raise UserError("--vllm_compatible goes with --format=peft; a merged checkpoint needs no adapter support")
    if not launch.OUT.value:
        raise UserError("--out=DIR is needed: the directory to write")
    out = Path(launch.OUT.value)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out={out} is there already and not an empty directory; name another one")
    cfg = launch.config()
    workdir.check_finished(folder, cfg)
    parts = assemble(config_lib.resolve(cfg))
    adapter, delta = load_adapter(folder / workdir.ADAPTER, parts.base)
    if FORMAT.value == "peft":
        export.save_peft(out, adapter, delta, parts.base, vllm_compatible=VLLM.value)
    else:
        merged = export.merge(adapter, delta, parts.base.variables)
        models.save_pretrained(out, parts.base, quant.dequantize(merged))
        print(export.rounding(adapter, delta, parts.base.variables, merged))
    print(f"wrote {', '.join(sorted(p.name for p in out.iterdir()))} to {out}")


if __name__ == "__main__":
    launch.run(main, base=workdir.read)
