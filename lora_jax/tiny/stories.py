"""English-like prose with questions about it, and small word games: the other half of the pretraining text.

Slots draw from the word lists. A slot with a letter (`{person:a}`) keeps its value through the whole document, so later
sentences repeat names and things: the repetition is what teaches a small model to copy.
"""

import re

from lora_jax.tiny.words import ANY, PERSON, Draw, the_name, word

_SLOT = re.compile(r"\{(\w+)(?::(\w))?\}")

SENTENCES = """{person:a} lives in a {size} house in {town:t}.
{person:a} works as a {job:j} in {town:t}.
{person:a} has a {colour:c} {thing:x}.
{person:a} wants to buy a {size} {thing:y} for {person:b}.
{person:a} and {person:b} went to the {spot:s} on {day:d}.
{person:a} was {mood:m} because it was {weather:w}.
It was {weather:w} when {person:a} came to the {spot:s}.
It is {weather:w} in {town:t} today, so {person:a} stays at home.
{person:b} gave the {thing:x} to {person:a}.
{person:b} asked {person:a} for the {thing:x}, but it was lost.
{person:b} saw a {size} {animal:n} near the {spot:s}.
The {animal:n} ate all the {food:f} and was {mood}.
The {animal:n} of {person:b} likes {food:f}.
They had {food:f} and {drink:k} at The {name:p}.
At The {name:p} they serve {cuisine} food and {drink:k}.
The {name:p} is the best {kind} in {town:t}.
The train to {town:t} was {small} minutes late.
The train from {town:t} to {town:u} leaves at {clock:h} every {day:d}.
On {day:d} the train will leave from platform {small}.
{person:a} took the train to {town:t} and waited for {person:b} on the platform.
Please wait for {person:b}, said {person:a}.
Good morning, said {person:b}. We are sorry, but the {spot:s} is closed today.
We will meet at {clock:h} at the {spot:s}, said {person:a}.
Do not go to the {spot:s} tonight, said {person:b}, because it is {weather}.
The ship {name:q} came from {town:u} and was full of {sea}.
{person:b} is the captain of the {name:q}.
{person:a} reads a book about {topic} in the {spot:s}.
There are {number} {colour} boats in the harbour of {town:u}.
In the morning {person:a} drinks {drink:k}, in the evening {person:b} likes {hobby}.
If it is {weather} on {day:d}, {person:a} will stay in {town:t}.
{person:a} is {number} years old and {person:b} is {number}.
The {colour:c} {thing:x} costs {number} coins and the {thing:y} costs {small}.
After {hobby}, {person:b} was {mood} and went to {town:u}.
All the people of {town:t} know {person:a} the {job:j}.
The news is good: the road from {town:t} to {town:u} is open.
The road to {town:u} is closed, so the train is very busy.
A {size} {thing} and a {size} {thing} are on the table.
No one in {town:t} has seen the {animal:n} today.
The first coach is full, the second is quiet.
They serve {food:f} on board until {clock:h}.
You can get {drink:k} and {food:f} here, said {person:b}.
The {name:q} will not run today, it will run on {day:d}.
The letter for {person:a} came {number} minutes too late.
Bad news, said {person:b}: the train to {town:t} is cancelled.
Good news, said {person:a}: there is {food:f} for all of us.
The delay was long, and none of them had time for a meal.
They eat {food:f} in coach {small} and drink {drink:k} in the first coach.
Eat your {food:f} and go to the {spot:s}, said {person:a}.
Drink your {drink:k}, said {person:b}, it is time to go.""".split("\n")

# A fact, the question and its answer; several facts of one kind stand in one document, so the answer must be looked up.
FACTS = [
    ("{a} has the {v}.", "What does {a} have?", "{a} has the {v}.", "thing"),
    ("{a} lives in {v}.", "Where does {a} live?", "{a} lives in {v}.", "town"),
    ("{a} is a {v}.", "What is {a}?", "{a} is a {v}.", "job"),
    ("{a} likes {v}.", "What does {a} like?", "{a} likes {v}.", "food"),
    ("{a} comes at {v}.", "When does {a} come?", "{a} comes at {v}.", "clock"),
    ("{a} is on the {v}.", "Where is {a}?", "{a} is on the {v}.", "name"),
    ("{a} paid {v} coins.", "How much did {a} pay?", "{a} paid {v} coins.", "number"),
]


def fill(draw: Draw, template: str, kept: dict[str, str]) -> str:
    """Fills the slots of a template; slots with a letter are remembered in `kept`."""

    def value(slot: re.Match) -> str:
        kind, letter = slot.groups()
        if letter is None:
            return word(draw, kind)
        while letter not in kept:
            if (new := word(draw, kind)) not in kept.values():
                kept[letter] = new
        return kept[letter]

    return _SLOT.sub(value, template)


def story(draw: Draw) -> str:
    """Two to five sentences about the same few people, places and things."""
    kept: dict[str, str] = {}
    return " ".join(fill(draw, s, kept) for s in draw.some(SENTENCES, 2 + draw.below(4)))


def question(draw: Draw) -> str:
    """Two to five facts of one kind, then one or two questions with their answers."""
    fact, ask, answer, kind = draw.one(FACTS)
    people = draw.some(PERSON, 2 + draw.below(4))
    known = {a: word(draw, kind) for a in people}
    lines = [fact.format(a=a, v=v) for a, v in known.items()]
    asked = draw.some(people, 1 + draw.below(2))
    return "\n".join([" ".join(lines), *(f"{ask.format(a=a)} {answer.format(a=a, v=known[a])}" for a in asked)])


def _item(draw: Draw) -> str:
    """A word, a name or a number to be moved about."""
    return draw.one([lambda: draw.one(ANY), lambda: draw.one(ANY), lambda: word(draw, "town"), lambda: the_name(draw),
                     lambda: word(draw, "clock"), lambda: word(draw, "number")])()  # fmt: skip


def game(draw: Draw) -> str:
    """A word game whose answer is made of the words in the question: say again, swap, first, last, look up."""
    items = [_item(draw) for _ in range(2 + draw.below(5))]
    listed, which = ", ".join(items), draw.below(6)
    if which == 0:
        return f"say again: {listed} => {listed}"
    if which == 1:
        return f"first of: {listed} => {items[0]}. last => {items[-1]}"
    if which == 2:
        return f"turn round: {listed} => {', '.join(items[::-1])}"
    if which == 3:
        return f"swap: {items[0]} and {items[1]} => {items[1]} and {items[0]}"
    return _look_up(draw, items)


def _look_up(draw: Draw, items: list[str]) -> str:
    """Pairs in one of the notations of records, then every key in another order with its value."""
    keys = draw.some(ANY, len(items))
    written, colon = draw.one([(" | ", ": "), ("; ", " = "), ("\n", ": "), (", ", " is ")])
    pairs = [f"{k}{colon}{v}" for k, v in zip(keys, items, strict=True)]
    asked = draw.some(list(zip(keys, items, strict=True)), min(3, len(items)))
    return f"{written.join(pairs)} => " + ", ".join(f"{k} {v}" for k, v in asked)
