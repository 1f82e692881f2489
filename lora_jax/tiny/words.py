"""The words of the seeded grammar, and a random source whose draws never change.

Every list is shared by both domains, so the second domain has no word that the tiny model has not read: what is new
there is the task, not the language.
"""

import random
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


class Draw:
    """Draws from a seed. Built on `random.random` alone: the one method whose sequence Python promises to keep."""

    def __init__(self, *seed: int | str):
        self._random = random.Random("/".join(map(str, seed))).random

    def below(self, n: int) -> int:
        """A whole number from 0 to n - 1."""
        return int(self._random() * n)

    def one(self, options: Sequence[T]) -> T:
        """One of the options."""
        return options[self.below(len(options))]

    def some(self, options: Sequence[T], count: int) -> list[T]:
        """`count` different ones, in random order."""
        pool = list(options)
        return [pool.pop(self.below(len(pool))) for _ in range(count)]

    def chance(self, p: float) -> bool:
        """True with probability p."""
        return self._random() < p


PERSON = """
Ada Amir Anna Aron Bea Ben Bora Cara Carl Cleo Dana Dora Edgar Ella Emil Enid Erik Esther Fay Felix Flora Greta Hana
Hugo Ida Igor Ines Iris Ivan Jana Jonas Jun Karim Kira Lars Lena Leo Lila Luca Mara Mats Mina Nadia Nils Nora Olga
Omar Otto Pavel Petra Pia Raul Rosa Ruben Sana Selma Simon Stella Tara Theo Tilda Uma Vera Viktor Wanda Yara Yusuf
Zoe
""".split()
# The first half of a name: The Silver Arrow, Alder Bridge. The second halves fit pubs, ships and trains, or places.
FIRST = """
Silver Golden Old Little Red Blue Green White Black Grey Royal Northern Southern Eastern Western Quiet Happy Lucky
Wild Swift Brave Merry Morning Evening Winter Summer Autumn Spring Copper Iron Crystal Velvet Distant Hidden Lonely
Proud
""".split()
SECOND = """
Arrow Fox Crown Lion Swan Falcon Star Moon Sun Rose Lantern Anchor Wheel Ship Horse Bell Owl Wolf Bear Raven Dolphin
Comet Feather Flame Garden Kettle Ladder Mirror Pearl Piper Rocket Shadow Thunder Tiger Violin Whistle Meteor
Express
""".split()
TREE = """
Alder Ash Birch Brook Cedar Cherry Clay Clover Cliff Cloud Crow Deer Elm Fern Flint Frost Hazel Heron Holly Ivy
Kings Lake Linden Maple Marsh Mill Moss Oak Olive Otter Pine Plum Queens Reed Salt Sand Snow Stone Thorn Willow
""".split()
PLACE = """
Bridge Hill Harbour Field Ford Valley Wood Gate Cross Point Bay Castle Park Green Road Market Cove Ridge Springs
Falls Heath Meadow Chapel Landing Court End Square Junction
""".split()
FOOD = """
soup bread cheese rice fish noodles pasta beans eggs pancakes dumplings curry stew pie salad cake apples pears plums
honey nuts olives mushrooms potatoes tomatoes onions carrots sausages sandwiches biscuits
""".split()
DRINK = "tea coffee milk water juice lemonade cocoa cider".split()
CUISINE = "Thai French Indian Greek Turkish Polish Korean Mexican Italian Japanese Spanish Persian".split()
COLOUR = "red blue green yellow white black brown grey pink purple orange silver".split()
THING = """
boat cart lamp book chair table kite drum clock basket bottle ring coat hat key map box bag bell cup knife spoon
ladder mirror rope shoe stone toy violin wheel window letter ticket ball brush candle coin bicycle radio camera
blanket umbrella
""".split()
ANIMAL = "cat dog horse goat sheep rabbit duck goose parrot turtle hamster pony donkey hen fox owl".split()
JOB = """
teacher baker doctor nurse sailor farmer driver painter writer singer tailor carpenter gardener judge pilot cook
dentist plumber miner soldier student guard librarian engineer
""".split()
SPOT = """
mill river market forest harbour school library kitchen garden station bridge castle beach village church museum
bakery theatre park farm hospital hotel airport town tower bank lake mountain valley island
""".split()
AREA = ["riverside", "city centre", "old town", "market square", "harbour", "north side", "south side", "park"]
KIND = ["pub", "bar", "restaurant", "tea room", "coffee shop", "diner", "hotel", "inn"]
PRICE = ["cheap", "low", "fair", "moderate", "high", "very high"]
RATING = ["poor", "average", "good", "very good", "excellent"]
WEATHER = ["raining", "snowing", "windy", "sunny", "cold", "hot", "foggy", "cloudy", "dark", "warm", "stormy"]
DAY = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MOOD = "happy sad tired angry hungry late busy sorry quiet proud afraid ready sick lucky alone lost".split()
SIZE = "small big old new heavy light long short broken clean dirty beautiful strange cheap tiny huge".split()
TOPIC = "love war gardens ships music history trains stars dogs money winter cooking kings birds mountains".split()
HOBBY = "chess football music dancing swimming painting reading fishing cooking running sewing climbing".split()
SEA = ["coal", "salt", "wool", "grain", "tea", "timber", "fish", "oil", "cotton", "sugar", "glass", "iron"]

LISTS = {
    "person": PERSON, "food": FOOD, "drink": DRINK, "cuisine": CUISINE, "colour": COLOUR, "thing": THING,
    "animal": ANIMAL, "job": JOB, "spot": SPOT, "area": AREA, "kind": KIND, "price": PRICE, "rating": RATING,
    "weather": WEATHER, "day": DAY, "mood": MOOD, "size": SIZE, "topic": TOPIC, "hobby": HOBBY, "sea": SEA,
}  # fmt: skip
ANY = (
    PERSON + FIRST + SECOND + TREE + PLACE + FOOD + DRINK + CUISINE + COLOUR + THING + ANIMAL + JOB + SPOT + DAY + MOOD
)


def the_name(draw: Draw) -> str:
    """A name such as `Silver Arrow`: of a pub, a ship, a train."""
    return f"{draw.one(FIRST)} {draw.one(SECOND)}"


def place_name(draw: Draw) -> str:
    """A name such as `Alder Bridge`: of a town, a street, a station."""
    return f"{draw.one(TREE)} {draw.one(PLACE)}"


def clock(draw: Draw) -> str:
    """A time of the day such as `9:40`."""
    return f"{6 + draw.below(17)}:{draw.below(12) * 5:02d}"


def word(draw: Draw, kind: str) -> str:
    """A word of the named list, or a made value: `name`, `town`, `clock`, `number`, `small`."""
    if kind in LISTS:
        return draw.one(LISTS[kind])
    made = {
        "name": the_name, "town": place_name, "clock": clock,
        "number": lambda d: str(2 + d.below(98)), "small": lambda d: str(1 + d.below(9)),
    }  # fmt: skip
    return made[kind](draw)
