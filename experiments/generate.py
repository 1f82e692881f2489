"""Text from the base and the adapter of a finished run.

python -m experiments.generate --workdir=runs/quickstart --prompt='...' [--config.generate.temperature=0.7]
"""

from experiments import environment

environment.prepare(__name__)  # before the imports: it may start the process again

from absl import flags

from experiments import launch, workdir
from lora_jax import assess, data
from lora_jax import config as config_lib
from lora_jax.assemble import assemble, load_adapter
from lora_jax.errors import UserError
from lora_jax.lift import lift

PROMPT = flags.DEFINE_multi_string("prompt", None, "What the text answers; may be given several times.")


def main() -> None:
    folder = workdir.path()
    if not PROMPT.value:
        raise UserError("--prompt='...' is needed: what the text answers")
    cfg = launch.config()
    workdir.check_finished(folder, cfg)
    config = config_lib.resolve(cfg)
    parts = assemble(config)
    if not assess.can_write(parts.task):
        raise UserError(f"the run in {folder} is of the task {parts.task.name!r}, which generates no text; sft does")
    adapter, delta = load_adapter(folder / workdir.ADAPTER, parts.base)
    # The record takes the form of the task's own: a conversation where the data has conversations.
    chat = "messages" in parts.splits["train"][0].values
    texts = assess.reply(
        parts.base,
        adapter.bind(parts.base.variables, delta),
        parts.task,
        [data.Record(_values(text, chat), "--prompt") for text in PROMPT.value],
        config.generate,
        apply=lift(parts.base.apply),
        seed=config.seed,
    )
    for text in texts:
        print(text)


def _values(text: str, chat: bool) -> dict[str, object]:
    return {"messages": [{"role": "user", "content": text}]} if chat else {"prompt": text}


if __name__ == "__main__":
    launch.run(main, base=workdir.read)
