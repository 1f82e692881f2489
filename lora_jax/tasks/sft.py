"""Supervised fine-tuning: a completion is learned from its prompt; loss on the completion's tokens only by default.

Fields: `prompt` and `completion`, or `messages`; `references` where a generation may be compared with several texts.
The end-of-sequence token is appended and learned, or the model would never stop. A row that is too long first loses
the beginning of its prompt (all but one token and the beginning-of-sequence token), then the end of its completion:
it always keeps a target.
"""

from collections.abc import Sequence
from typing import Any

from lora_jax.data import preview as previews
from lora_jax.data import templates
from lora_jax.data.records import Record, Splits
from lora_jax.errors import UserError, did_you_mean
from lora_jax.tasks import base, causal

LOSS_ON = ("completion", "all")


def sft(
    tokenizer: Any,
    max_length: int,
    splits: Splits,
    *,
    template: str | None = None,
    loss_on: str = "completion",
) -> base.Task:
    """Makes the task.

    Args:
      tokenizer: any tokenizer of transformers with an end-of-sequence token.
      max_length: tokens of a row.
      splits: decides between `messages` and `prompt`/`completion`, and is checked at once.
      template: what stands before the completion, see `data.templates`.
      loss_on: "completion" (with messages: every assistant turn) or "all".

    Raises:
      UserError: a missing field, a template that does not fit, a tokenizer without an end-of-sequence token.
    """
    base.check_max_length(max_length, 2)
    if loss_on not in LOSS_ON:
        raise UserError(f"the option loss_on={loss_on!r} does not exist; {did_you_mean(str(loss_on), LOSS_ON)}")
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"the tokenizer {getattr(tokenizer, 'name_or_path', '')!r} has no end-of-sequence token, with which a "
            "completion must end with; set eos_token in its tokenizer_config.json"
        )
    chat = _is_chat(splits)
    coder = _Coder(tokenizer, max_length, templates.renderer(template, chat, tokenizer), loss_on == "all")
    _check(splits, template, chat, coder)
    return base.Task(
        name="sft",
        options={"template": template, "loss_on": loss_on},
        encode=coder.encode,
        inputs=causal.inputs,
        loss=causal.loss,
        sums=causal.sums,
        summary=causal.summary,
        per_example=causal.per_example,
        prediction=causal.prediction,
        preview=lambda example, colour=False: previews.language(example, tokenizer, colour),
        better=("loss", "min"),
        prompt=coder.prompt,
        references=templates.references,
        score=score,
    )


def score(texts: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, Any]:
    """Compares generations with their references.

    Args:
      texts: N generations.
      references: one or more texts for each.

    Returns:
      exact_match: share of generations equal to one of their references, white space at the ends aside; bleu: corpus
        BLEU of
      sacrebleu, 0 to 100; bleu_signature: the settings it was computed with.
    """
    import sacrebleu

    if not texts or len(texts) != len(references) or not all(references):
        raise UserError(
            f"to score {len(texts)} texts, each needs at least one reference; got {len(references)} lists of them"
        )
    hits = sum(t.strip() in {r.strip() for r in own} for t, own in zip(texts, references, strict=True))
    metric = sacrebleu.BLEU()
    # sacrebleu wants one stream per reference number; None fills the places of texts that have fewer.
    streams = [[own[i] if i < len(own) else None for own in references] for i in range(max(map(len, references)))]
    bleu = metric.corpus_score([t.strip() for t in texts], streams).score  # type: ignore[arg-type]
    return {"exact_match": hits / len(texts), "bleu": float(bleu), "bleu_signature": str(metric.get_signature())}


class _Coder:
    """Rendered pieces -> tokens and flags, cut to length."""

    def __init__(self, tokenizer: Any, max_length: int, render: templates.Render, learn_all: bool):
        self.tokenizer, self.max_length, self.render, self.learn_all = tokenizer, max_length, render, learn_all
        self.start = causal.start(tokenizer)

    def encode(self, record: Record) -> base.Example:
        """The whole record, the completion learned."""
        ids, learned = self._tokens(self.render(record, False))
        ids, learned = _truncate(ids, learned, self.max_length + 1, len(self._keep(ids)))
        if not any(learned[1:]):
            raise UserError(
                f"{record.where}: no token precedes the completion, so nothing can be learned; give it a prompt"
            )
        return causal.example(ids, [True] * len(ids) if self.learn_all else learned)

    def prompt(self, record: Record) -> list[int]:
        """The tokens that generation continues: the last `max_length` of the prompt."""
        ids, _ = self._tokens(self.render(record, True))
        head = self._keep(ids)
        over = max(0, len(ids) - self.max_length)
        return head + ids[len(head) + over :]

    def _keep(self, ids: list[int]) -> list[int]:
        """The beginning-of-sequence token, which a cut on the left leaves standing."""
        return ids[:1] if ids and ids[0] == self.tokenizer.bos_token_id else []

    def _tokens(self, rendered: templates.Rendered) -> tuple[list[int], list[bool]]:
        ids = [] if rendered.special else list(self.start)
        learned = [False] * len(ids)
        for piece in rendered.pieces:
            own = causal.encode(self.tokenizer, piece.text) if piece.text else []
            # A chat template may write the end itself, and a line break after it.
            if piece.end and self.tokenizer.eos_token_id not in own:
                own = [*own, self.tokenizer.eos_token_id]
            ids += own
            learned += [piece.learned] * len(own)
        return ids, learned


def _truncate(ids: list[int], learned: list[bool], length: int, head: int) -> tuple[list[int], list[bool]]:
    """Cuts to `length` tokens: first between the head and the token before the first target, then the end."""
    over = len(ids) - length
    if over > 0:
        first = learned.index(True) if True in learned else len(ids)
        # One token must stand before the first target; a head is that token if there is one.
        left = min(over, max(0, first - max(head, 1)))
        ids, learned = ids[:head] + ids[head + left :], learned[:head] + learned[head + left :]
    return ids[:length], learned[:length]


def _is_chat(splits: Splits) -> bool:
    first = next((records[0] for records in splits.values() if records), None)
    return first is not None and templates.is_chat(first)


def _check(splits: Splits, template: str | None, chat: bool, coder: _Coder) -> None:
    used = templates.fields(template) if template not in (None, templates.CHAT, templates.SIMPLE) else []
    base.check_fields(splits, ("prompt", "completion", "messages", "references", *used))
    for records in splits.values():
        for i, record in enumerate(records):
            # A chat template takes its time: the first of each split is tried here, the others when they are encoded.
            if i == 0 or not chat:
                coder.render(record, False)
            else:
                templates.messages(record)
            templates.references(record)
