"""Structured records and the ways to put them into sentences: half of what the tiny model is pretrained on.

A record is a row of fields written in one of several notations; its text names every field. Every phrase is a
predicate of the record's subject, so any order and any grouping of them makes a sentence.
"""

from lora_jax.tiny.words import Draw, word

# topic -> (subject field, how the subject is made, pronoun, {field: (word list, predicates)})
TOPICS: dict[str, tuple[str, str, str, dict[str, tuple[str, list[str]]]]] = {
    "eating": ("name", "The {name}", "It", {
        "kind": ("kind", ["is a {v}", "is known as a {v}"]),
        "food": ("cuisine", ["serves {v} food", "offers {v} dishes", "cooks {v} meals"]),
        "area": ("area", ["stands by the {v}", "is in the area of the {v}", "can be found at the {v}"]),
        "price": ("price", ["has {v} prices", "asks for {v} prices"]),
        "near": ("town", ["is near {v}", "is not far from {v}", "lies close to {v}"]),
        "rating": ("rating", ["has a {v} rating", "is rated as {v}"]),
        "opens": ("clock", ["opens at {v}", "opens its doors at {v}"]),
    }),
    "people": ("person", "{person}", "This person", {
        "job": ("job", ["works as a {v}", "is a {v}"]),
        "home": ("town", ["lives in {v}", "has a house in {v}", "comes from {v}"]),
        "born in": ("town", ["was born in {v}", "spent the first years in {v}"]),
        "friend": ("person", ["is a friend of {v}", "often meets {v}"]),
        "age": ("number", ["is {v} years old", "has lived for {v} years"]),
        "pet": ("animal", ["has a {v}", "looks after a {v}"]),
        "likes": ("hobby", ["likes {v}", "spends every evening on {v}"]),
        "drinks": ("drink", ["drinks {v}", "never drinks anything but {v}"]),
    }),
    "ships": ("ship", "The {name}", "She", {
        "cargo": ("sea", ["carries {v}", "is full of {v}"]),
        "port": ("town", ["sails from {v}", "has her port in {v}"]),
        "next": ("town", ["will call at {v} next", "is on her way to {v}"]),
        "captain": ("person", ["is led by {v}", "has {v} as captain"]),
        "leaves": ("day", ["leaves on {v}", "goes to sea on {v}"]),
        "crew": ("number", ["has a crew of {v}", "has room for {v} sailors"]),
        "colour": ("colour", ["is painted {v}", "has {v} sails"]),
    }),
    "books": ("title", "{name}", "The book", {
        "writer": ("person", ["was written by {v}", "is the work of {v}"]),
        "about": ("topic", ["is about {v}", "tells a story of {v}"]),
        "reader": ("person", ["is read by {v}", "was given to {v}"]),
        "pages": ("number", ["has {v} pages", "is {v} pages long"]),
        "price": ("number", ["costs {v} coins", "sells for {v} coins"]),
        "place": ("town", ["was printed in {v}", "plays in {v}"]),
    }),
    "shops": ("shop", "{name}", "The shop", {
        "sells": ("thing", ["sells every kind of {v}", "is the place to buy a {v}"]),
        "street": ("town", ["is on {v}", "has its door on {v}"]),
        "owner": ("person", ["belongs to {v}", "is owned by {v}"]),
        "opens": ("clock", ["opens at {v}", "is open from {v}"]),
        "closes": ("clock", ["closes at {v}", "shuts its door at {v}"]),
        "rest": ("day", ["is shut on {v}", "takes its rest on {v}"]),
    }),
    "animals": ("animal", "{person} the {animal}", "The animal", {
        "colour": ("colour", ["is {v}", "has a {v} coat"]),
        "eats": ("food", ["eats {v}", "is fond of {v}"]),
        "owner": ("person", ["belongs to {v}", "is kept by {v}"]),
        "sleeps": ("spot", ["sleeps near the {v}", "goes to the {v} at night"]),
        "born": ("day", ["was born on a {v}", "came home on {v}"]),
    }),
}  # fmt: skip
ENDINGS = [" => ", " => ", "\nText: ", "\nThat is: "]


def _write(style: int, fields: list[tuple[str, str]]) -> str:
    """The fields in one of the notations."""
    if style == 0:
        return ", ".join(f"{k}[{v}]" for k, v in fields)
    if style == 1:
        return " | ".join(f"{k}: {v}" for k, v in fields)
    if style == 2:
        return "; ".join(f"{k} = {v}" for k, v in fields)
    if style == 3:
        return "\n".join(f"- {k}: {v}" for k, v in fields)
    return " ".join(f"( {k} {v} )" for k, v in fields)


def _join(draw: Draw, subject: str, pronoun: str, phrases: list[str]) -> str:
    """Sentences of one to three phrases; the first names the subject, later ones may use the pronoun."""
    sentences: list[str] = []
    while phrases:
        count = 1 + draw.below(3)
        now, phrases = phrases[:count], phrases[count:]
        who = subject if not sentences or draw.chance(0.4) else pronoun
        listed = now[0] if len(now) == 1 else f"{', '.join(now[:-1])} and {now[-1]}"
        sentences.append(f"{who} {listed}.")
    return " ".join(sentences)


def record(draw: Draw) -> str:
    """One record and its text: `name[The Red Fox], food[Thai] => The Red Fox serves Thai food.`"""
    key, made, pronoun, fields = TOPICS[draw.one(list(TOPICS))]
    subject = made.format(**{k: word(draw, k) for k in ("name", "person", "animal")})
    chosen = draw.some(list(fields), 2 + draw.below(min(6, len(fields)) - 1))
    values = {f: word(draw, fields[f][0]) for f in chosen}
    rows = [(key, subject), *((f, values[f]) for f in chosen)]
    phrases = [draw.one(fields[f][1]).format(v=values[f]) for f in draw.some(chosen, len(chosen))]
    written = _write(draw.below(5), draw.some(rows, len(rows)))
    return written + draw.one(ENDINGS) + _join(draw, subject, pronoun, phrases)
