"""Selection rules: what a pattern, a role, a choice of layers and a rule by site select, and what each mistake says."""

import numpy as np
import pytest

from lora_jax.errors import UserError, did_you_mean, nearest
from lora_jax.sites import (
    Site,
    count_layers,
    in_layers,
    layer_index,
    parse_layers,
    parse_patterns,
    parse_rules,
    select,
    with_roles,
)


def make(path, shape=(8, 6), **fields):
    fields = {"fan_in": (len(shape) - 2,), "fan_out": (len(shape) - 1,), "layer": layer_index(path)} | fields
    return Site(path=path, shape=shape, dtype=np.dtype("float32"), **fields)


SITES = {
    path: make(path)
    for path in (
        "embed/embedding",
        *(f"layers_{i}/{n}/kernel" for i in range(3) for n in ("query", "value")),
        "out/kernel",
    )
}
STACK = {
    "layers/q": make("layers/q", (3, 8, 6), batch=(0,), layer_axis=0, layer=None),
    "out/kernel": make("out/kernel"),
}


def test_what_a_site_knows():
    site = make("w", (3, 8, 2, 5), batch=(0,), fan_in=(1,), fan_out=(2, 3), layer_axis=0)
    assert site.dims(site.fan_out) == (2, 5) and site.max_rank == 8 and site.is_matrix and site.layers == (0, 1, 2)
    bias = make("layers_4/b", (6,), fan_in=(), fan_out=())
    assert not bias.is_matrix and bias.layers == (4,) and make("out/w").layers == ()


@pytest.mark.parametrize(
    ("path", "index"),
    [("layers_3/mlp/kernel", 3), ("layers/3/kernel", 3), ("h/12/attn/2/w", 12), ("dense2/kernel", None), ("a/b", None)],
)
def test_layer_is_the_first_integer_component(path, index):
    assert layer_index(path) == index


@pytest.mark.parametrize(
    ("given", "patterns"),
    [
        ("q,k", ["q", "k"]),
        (["q , k", "v"], ["q", "k", "v"]),
        (r".*/(query|value)/kernel", [r".*/(query|value)/kernel"]),
        (r"layers_\d{1,2}/.*, out/.*", [r"layers_\d{1,2}/.*", "out/.*"]),
        ("[ab,c]x,y", ["[ab,c]x", "y"]),
        ("f(a,b),g(c,d)", ["f(a,b)", "g(c,d)"]),
        ("", []),
    ],
)
def test_patterns_from_text(given, patterns):
    assert parse_patterns(given) == patterns


def test_select():
    assert select(SITES, None, ["out/kernel"]) == ["out/kernel"]
    assert select(SITES, "out/kernel,.*/query/kernel") == [
        *(f"layers_{i}/query/kernel" for i in range(3)),
        "out/kernel",
    ]
    roles = with_roles(SITES, [(r".*/query/.*", "q"), (".*", "rest")])
    assert select(roles, ["q"]) == select(SITES, ".*/query/kernel")
    assert roles["out/kernel"].role == "rest"
    assert with_roles(SITES, [("none", "q")])["out/kernel"].role is None


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (
            "query/kernel",
            "the pattern 'query/kernel' matches none of the 8 sites; a pattern is a regular expression that",
        ),
        (".*/querry/kernel", "Nearest paths: layers_2/query/kernel, layers_1/query/kernel, layers_0/query/kernel"),
        (["out/kernel", "w"], "the pattern 'w' matches none"),
        ("(", "the pattern '(' is not a regular expression: "),
        ("", "targets='' holds no pattern; leave it out for the method's own default"),
        ([], "targets=[] holds no pattern"),
        ([3], "targets must be patterns (strings), got [3]"),
    ],
)
def test_mistakes_of_targets(targets, message):
    with pytest.raises(UserError) as caught:
        select(SITES, targets)
    assert message in str(caught.value)


def test_a_missed_pattern_lists_the_roles():
    with pytest.raises(UserError, match="; roles: q, v$"):
        select(with_roles(SITES, [(".*query.*", "q"), (".*value.*", "v")]), "k")


@pytest.mark.parametrize(
    ("layers", "chosen"),
    [("all", None), (" all ", None), ("last:2", {2, 3}), ("first:1", {0}), (1, {1}), ("2", {2}), ([0, 3], {0, 3}),
     ("[0, 3]", {0, 3}), ("(1,)", {1}), (-1, {3}), ((0, -1), {0, 3})],
)  # fmt: skip
def test_layers(layers, chosen):
    assert parse_layers(layers, 4) == chosen


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ("last:5", "layers='last:5', but the model has 4 layers; k must be 1 to 4"),
        ("last:0", "k must be 1 to 4"),
        ("lst:2", "layers must be 'all', 'last:k', 'first:k' or a list of layer indices, got 'lst:2'"),
        ("last:-1", "got 'last:-1'"),
        (4, "layers=4, but the model has layers 0 to 3; 4 is not one of them"),
        ([0, -5], "-5 is not one of them"),
        ([], "got []"),
        ([True], "got [True]"),
        (True, "got True"),
        ([1.0], "got [1.0]"),
        (None, "got None"),
        ({"a": 1}, "got {'a': 1}"),
    ],
)
def test_mistakes_of_layers(layers, message):
    with pytest.raises(UserError) as caught:
        parse_layers(layers, 4)
    assert message in str(caught.value)


def test_layers_of_a_model_without_layers():
    with pytest.raises(
        UserError, match="layers='last:1', but no site of this model has a layer index; use layers='all'"
    ):
        parse_layers("last:1", 0)
    assert count_layers({"w": make("w")}) == 0


def test_in_layers():
    assert count_layers(SITES) == 3 and count_layers(STACK) == 3
    assert in_layers(SITES, list(SITES), "all") == dict.fromkeys(SITES, (True,))
    assert list(in_layers(SITES, list(SITES), "last:1")) == ["layers_2/query/kernel", "layers_2/value/kernel"]
    assert in_layers(STACK, list(STACK), [0, 2]) == {"layers/q": (True, False, True)}, "out is in no layer"
    with pytest.raises(
        UserError, match=r"layers='last:1' leaves none of the 1 selected sites \(the first is 'out/kernel'"
    ):
        in_layers(SITES, ["out/kernel"], "last:1")


def test_rules():
    paths = ["layers_0/query/kernel", "layers_1/query/kernel", "out/kernel"]
    assert parse_rules(4, "rank", SITES, paths) == {p: [4] for p in paths}
    rules = [("layers_1/.*", 1), (".*query.*", 2), (".*", 3)]
    expected = dict(zip(paths, ([2], [1], [3]), strict=True))
    assert parse_rules(rules, "rank", SITES, paths) == expected, "the first rule that matches wins"
    assert parse_rules(dict(rules), "rank", SITES, paths) == expected
    assert parse_rules(str(rules), "rank", SITES, paths) == expected
    assert parse_rules([list(r) for r in rules], "rank", SITES, paths) == expected, "as JSON gives them back"
    assert parse_rules([("layers/q#1", 1), ("layers/q", 2)], "rank", STACK, ["layers/q"]) == {"layers/q": [2, 1, 2]}
    roles = with_roles(SITES, [(".*query.*", "q")])
    assert parse_rules([("q", 2), (".*", 3)], "rank", roles, paths) == dict(zip(paths, ([2], [2], [3]), strict=True))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("eight", "rank must be a number or a list of (pattern, number) rules, got 'eight'"),
        (
            [(".*", 1), ("out/kernel", 2)],
            "the rank rule 'out/kernel' matches none of the 2 selected sites (or an earlier",
        ),
        ([("lay", 1), (".*", 1)], "Nearest paths: layers_0/query/kernel, out/kernel"),
        ([("layers.*", 1)], "no rank rule covers 'out/kernel'; end the list with ('.*', value)"),
        ([("a", "b", "c")], "a rank rule is a (pattern, number) pair, got ('a', 'b', 'c')"),
        ([("*", 1)], "the pattern '*' is not a regular expression"),
    ],
)
def test_mistakes_of_rules(value, message):
    with pytest.raises(UserError) as caught:
        parse_rules(value, "rank", SITES, ["layers_0/query/kernel", "out/kernel"])
    assert message in str(caught.value)


def test_nearest_names():
    assert nearest("quary", ["key", "query", "value"], 1) == ["query"]
    assert len(nearest("zzz", ["key", "query", "value", "out"])) == 3, "something is always nearest"
    assert nearest("x", []) == []
    assert did_you_mean("quary", ["query", "key", "key"]) == "did you mean 'query'? (known: key, query)"
    assert did_you_mean("x", []) == "there are none to choose from"
    assert did_you_mean("n1", [f"n{i}" for i in range(30)]).endswith(", ...)")
