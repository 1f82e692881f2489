"""The two domains that the embedded default is made of; everything follows from a seed.

* `documents`: what the tiny model is pretrained on: records with their text, stories, questions, word games.
* `announcements`: what it is adapted to: a station's records and the announcement that a fixed rule makes of
  each. The rule is new to the model (another topic, other sentences); copying names and times out of a record is not.
  One prompt has exactly one right answer, so exact match is a fair measure.
"""

import json
from collections.abc import Iterator, Mapping

from lora_jax.tiny.stories import game, question, story
from lora_jax.tiny.topics import record
from lora_jax.tiny.words import DRINK, FOOD, PLACE, TREE, Draw, clock, the_name

# Shares of the pretraining text: two thirds of it asks to look something up and copy it.
MIXTURE = [record] * 8 + [story] * 4 + [question] * 3 + [game] * 5
DELAYS = ["none", "none", "5", "10", "15", "20", "30", "40", "50", "60", "cancelled"]
SIZES = {"train": 4000, "dev": 200, "test": 200}


def documents(seed: int) -> Iterator[str]:
    """Yields the texts of the first domain without end."""
    draw = Draw("documents", seed)
    while True:
        yield draw.one(MIXTURE)(draw)


def announce(values: Mapping[str, str]) -> str:
    """The rule of the second domain: what is said depends on the delay and on the meal.

    Args:
      values: train, from, to, time, platform, delay (minutes, `none` or `cancelled`), meal (a food, a drink or `none`).

    Returns:
      The announcement.
    """
    delay, platform = values["delay"], values["platform"]
    train = f"the {values['time']} {values['train']} to {values['to']}"
    if delay == "cancelled":
        return f"Bad news, {values['from']}: {train} will not run today."
    if delay == "none":
        said = f"Good news, {values['from']}: {train} is ready on platform {platform}."
    elif int(delay) < 30:
        said = f"Please wait, {values['from']}: {train} is {delay} minutes late on platform {platform}."
    else:
        said = f"We are sorry, {values['from']}: {train} is not here. Go to platform {platform} in {delay} minutes."
    if values["meal"] == "none":
        return said
    return f"{said} The meal is {values['meal']}."


def example(draw: Draw) -> dict[str, str]:
    """One prompt of the second domain with its completion; the fields stand in random order."""
    (here, to), (near, far) = draw.some(TREE, 2), draw.some(PLACE, 2)
    values = {
        "train": the_name(draw), "from": f"{here} {near}", "to": f"{to} {far}", "time": clock(draw),
        "platform": str(1 + draw.below(9)), "delay": draw.one(DELAYS),
        "meal": draw.one(["none", "none", draw.one(FOOD), draw.one(DRINK)]),
    }  # fmt: skip
    fields = " | ".join(f"{k}: {values[k]}" for k in draw.some(list(values), len(values)))
    return {"prompt": f"The news | {fields} =>", "completion": f" {announce(values)}"}


def announcements(seed: int, sizes: Mapping[str, int] = SIZES) -> dict[str, list[dict[str, str]]]:
    """Returns `{split: [{"prompt", "completion"}]}`; no prompt occurs twice, in one split or in two."""
    draw, seen, splits = Draw("announcements", seed), set(), {}
    for split, size in sizes.items():
        rows: list[dict[str, str]] = []
        while len(rows) < size:
            row = example(draw)
            if row["prompt"] not in seen:
                seen.add(row["prompt"])
                rows.append(row)
        splits[split] = rows
    return splits


def as_jsonl(rows: list[dict[str, str]]) -> str:
    """The rows as the text of a JSONL file: the same bytes on every machine."""
    return "".join(json.dumps(row, ensure_ascii=True) + "\n" for row in rows)
