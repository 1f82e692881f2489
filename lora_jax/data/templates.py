"""Templates: a record of `prompt`/`completion` or `messages` -> pieces of text, each with or without loss.

The pieces are tokenised one by one, so the border of the loss falls exactly between two tokens, and a prompt has the
same tokens in training as in generation. (Tokenised in one go, the last letters of a prompt and the first of its
completion may share a token, which generation never sees.)

`template` is one of
* a string with fields of the record in braces, `"{prompt}\\n"`: what stands before the completion;
* `"chat"`: the tokenizer's own chat template, for `messages` and for `prompt`/`completion` as one exchange;
* `"simple"`: the built-in one below, for tokenizers that have none: `User: ...`, `Assistant: ...`, a line each.
By default `messages` take `"chat"`, and `prompt`/`completion` take `"{prompt}\\n"`.
"""

import dataclasses
import string
from collections.abc import Callable, Sequence
from typing import Any

from lora_jax.data.records import Record
from lora_jax.errors import UserError, did_you_mean

DEFAULT = "{prompt}\n"
CHAT, SIMPLE = "chat", "simple"
Messages = list[dict[str, str]]


@dataclasses.dataclass(frozen=True)
class Piece:
    """Some text; `learned` says whether its tokens carry loss, `end` whether an end-of-sequence token follows."""

    text: str
    learned: bool = False
    end: bool = False


@dataclasses.dataclass(frozen=True)
class Rendered:
    """A record as text. `special` says that the template wrote its own beginning-of-sequence token."""

    pieces: tuple[Piece, ...]
    special: bool = False


Render = Callable[[Record, bool], Rendered]


def renderer(template: str | None, chat: bool, tokenizer: Any) -> Render:
    """Chooses how records are rendered.

    Args:
      template: see above; None = the default.
      chat: whether the records hold `messages`.
      tokenizer: for its chat template.

    Returns:
      A function (record, prompt_only) -> Rendered; with `prompt_only` the pieces end where the last completion begins.

    Raises:
      UserError: a template that does not fit these records or this tokenizer.
    """
    template = template if template is not None else CHAT if chat else DEFAULT
    if not isinstance(template, str):
        raise UserError(f"the template must be text, 'chat' or 'simple'; got {template!r}")
    if template in (CHAT, SIMPLE):
        if template == CHAT and not getattr(tokenizer, "chat_template", None):
            raise UserError(
                f"the tokenizer {getattr(tokenizer, 'name_or_path', '')!r} has no chat template; set the task's option "
                "template='simple' for the built-in one, or add chat_template to its tokenizer_config.json"
            )
        turns = _chat_turns if template == CHAT else _simple_turns
        return lambda record, prompt_only: turns(messages(record, prompt_only), tokenizer, prompt_only, record.where)
    if chat:
        raise UserError(f"records with messages take the template 'chat' or 'simple', got {template!r}")
    names = fields(template)
    return lambda record, prompt_only: _completion(template, names, record, prompt_only)


def fields(template: str) -> list[str]:
    """The fields that a template uses.

    Raises:
      UserError: braces that are not closed, or that hold something else than a name.
    """
    try:
        names = [name for _, name, *_ in string.Formatter().parse(template) if name is not None]
    except ValueError as error:
        raise UserError(f"the template {template!r} is broken: {error}; write {{{{ for a brace in the text") from None
    for name in names:
        if not name.isidentifier():
            raise UserError(f"the template {template!r} holds {{{name}}}; only names of fields may stand in braces")
    return names


def _completion(template: str, names: Sequence[str], record: Record, prompt_only: bool) -> Rendered:
    values = {}
    for name in names:
        if name not in record.values and name not in record.fields:
            raise UserError(
                f"the template uses {{{name}}}, but {record.where} has no such field; "
                f"{did_you_mean(name, record.values)}"
            )
        value = record.require(name)
        values[name] = record.text(name) if isinstance(value, str) else str(value)
    prompt = Piece(template.format(**values))
    return Rendered((prompt,) if prompt_only else (prompt, Piece(completion(record), learned=True, end=True)))


def completion(record: Record) -> str:
    """What is to be learned: the field `completion`, or the first reference of a record that has only those."""
    if "completion" not in record.values and record.values.get("references"):
        return references(record)[0]
    return record.text("completion")


def references(record: Record) -> list[str]:
    """The texts a generation is compared with: `references`, else the completion, else the last assistant turn.

    Raises:
      UserError: `references` is neither text nor a list of texts.
    """
    if record.values.get("references"):
        found = record.values["references"]
        found = [found] if isinstance(found, str) else found
        if not isinstance(found, (list, tuple)) or not all(isinstance(r, str) for r in found):
            name = record.fields.get("references", "references")
            raise UserError(
                f"{record.where}: the field {name!r} must be text or a list of texts, got {str(found)[:60]!r}"
            )
        return list(found)
    if is_chat(record):
        return [messages(record)[-1]["content"]]
    return [record.text("completion")]


def is_chat(record: Record) -> bool:
    """Whether a record is read as `messages`: it has them, and nobody said where its prompt or completion is."""
    chosen = "prompt" in record.fields or "completion" in record.fields
    return "messages" in record.fields or ("messages" in record.values and not chosen)


def messages(record: Record, prompt_only: bool = False) -> Messages:
    """The turns of a conversation up to its last assistant turn; `prompt`/`completion` are a conversation of two.

    Args:
      record: with `messages`, or `prompt` and `completion`.
      prompt_only: the completion may be absent, for a prompt to be answered has none: an empty turn stands for it.

    Raises:
      UserError: not a list of {"role", "content"}, or no assistant turn.
    """
    if not is_chat(record):
        answer = "" if prompt_only else completion(record)
        return [{"role": "user", "content": record.text("prompt")}, {"role": "assistant", "content": answer}]
    turns = record.require("messages")
    shape = '[{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]'
    if not isinstance(turns, (list, tuple)):
        raise UserError(f"{record.where}: messages must be a list like {shape}, got {type(turns).__name__}")
    for i, turn in enumerate(turns, 1):
        if not isinstance(turn, dict) or not all(isinstance(turn.get(k), str) for k in ("role", "content")):
            raise UserError(
                f"{record.where}: message {i} must have a role and a content, both text, like {shape}; "
                f"got {str(turn)[:60]}"
            )
    last = max((i for i, turn in enumerate(turns) if turn["role"] == "assistant"), default=None)
    if last is None and prompt_only and turns:
        return [*(dict(turn) for turn in turns), {"role": "assistant", "content": ""}]
    if last is None:
        roles = ", ".join(turn["role"] for turn in turns) or "none"
        raise UserError(f"{record.where} has no assistant turn to learn from (its roles: {roles})")
    return [dict(turn) for turn in turns[: last + 1]]


def _simple_turns(turns: Messages, tokenizer: Any, prompt_only: bool, where: str) -> Rendered:
    del tokenizer, where
    pieces = []
    for turn in turns:
        name = turn["role"].capitalize()
        if turn["role"] == "assistant":
            pieces += [Piece(f"{name}:"), Piece(f" {turn['content']}", learned=True, end=True), Piece("\n")]
        else:
            pieces.append(Piece(f"{name}: {turn['content']}\n"))
    return Rendered(tuple(pieces[:-2] if prompt_only else pieces[:-1]))


def _chat_turns(turns: Messages, tokenizer: Any, prompt_only: bool, where: str) -> Rendered:
    """Renders growing prefixes of the conversation: what an assistant turn adds to its prompt is what is learned."""
    pieces, done = [], ""
    for i, turn in enumerate(turns):
        if turn["role"] != "assistant":
            continue
        prompt = _apply(tokenizer, turns[:i], True, where)
        pieces.append(Piece(_rest(prompt, done, where)))
        if prompt_only and i == len(turns) - 1:
            break
        done = _apply(tokenizer, turns[: i + 1], False, where)
        pieces.append(Piece(_rest(done, prompt, where), learned=True, end=i == len(turns) - 1))
    return Rendered(tuple(pieces), special=True)


def _apply(tokenizer: Any, turns: Messages, generation: bool, where: str) -> str:
    import jinja2

    try:
        return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=generation)
    except jinja2.TemplateError as error:
        raise UserError(f"{where}: the tokenizer's chat template refuses this conversation: {error}") from None


def _rest(text: str, start: str, where: str) -> str:
    if not text.startswith(start):
        raise UserError(
            f"{where}: the tokenizer's chat template rewrites earlier turns when later ones follow, so the assistant's "
            "tokens cannot be told apart; use the task's option template='simple'"
        )
    return text[len(start) :]
