"""Arms: an id that changes with what changes the result and nothing else, a label, and errors that name the arm."""

import functools
import subprocess
import sys
from pathlib import Path

import pytest

from lora_jax import config
from lora_jax.ablation import axis, chain, expand, product, zipped
from lora_jax.errors import UserError
from lora_jax.settings import SHOWN

GRID = product(axis("adapter.rank", [1, 4]), axis("adapter.layers", ["last:1", "all"]))


def make(grid, given=(), **changes):
    cfg = config.default()
    for path, value in changes.items():
        section, _, name = path.rpartition("__")
        parent = cfg
        for part in filter(None, section.split("__")):
            parent = parent[part]
        parent[name] = value
    return expand(grid, functools.partial(config.variant, cfg), given)


def ids(grid, **changes):
    return [arm.id for arm in make(grid, **changes)]


def test_every_arm_has_its_own_id_and_what_it_sets():
    arms = make(GRID)
    assert len({arm.id for arm in arms}) == 4
    assert [arm.label for arm in arms] == [
        "rank=1 layers=last:1", "rank=1 layers=all", "rank=4 layers=last:1", "rank=4 layers=all",
    ]  # fmt: skip
    assert arms[2].overrides == arms[2].axes == {"adapter.rank": 4, "adapter.layers": "last:1"}
    assert arms[2].config.adapter.arguments == {"rank": 4, "layers": "last:1"}


def test_every_field_that_is_computed_with_changes_every_id():
    """Editing any field never finds an old result: each field of the config is changed once."""
    base, defaults = set(ids(GRID)), dict(config._flat(config.default()))
    other = {
        "model.dtype": "bfloat16", "model.dropout": 0.2, "model.remat": True, "quant": "nf4",
        "data.fields": {"text": "sentence"}, "data.limit": 7, "task.name": "language_modeling",
        "task.options": {"template": "{text}"},
        "adapter.method": "dora", "adapter.alpha": 3, "adapter.targets": "q", "adapter.head": "none",
        "adapter.options": {"dropout": 0.1}, "train.epochs": 1.5, "train.warmup": 0.1, "train.schedule": "cosine",
        "train.learning_rate": 0.5,
        "train.b1": 0.5, "train.b2": 0.5, "train.packing": True, "train.share_rows": True, "train.buckets": [8],
        "train.prefix_cache": "off",
    }  # fmt: skip
    for path in config.fields():
        if path in GRID.fields or path.startswith(SHOWN):
            continue
        value = other[path] if path in other else defaults[path] + type(defaults[path])(1)
        assert not base & set(ids(GRID, **{path.replace(".", "__"): value})), path


def test_a_field_that_only_shows_changes_no_id():
    changes = {"train__log_every": 3, "train__keep": 5, "train__checkpoint_every": 7, "generate__show": 1,
               "log__tensorboard": True}  # fmt: skip
    assert ids(GRID, **changes) == ids(GRID)


def test_what_is_added_to_a_grid_leaves_the_old_ids():
    more = product(axis("adapter.rank", [1, 2, 4]), axis("adapter.layers", ["last:1", "all"]), axis("seed", range(3)))
    assert set(ids(GRID)) < set(ids(more)), "the arms of seed 0, the default"
    assert set(ids(GRID)) == set(ids(product(axis("adapter.layers", ["all", "last:1"]), axis("adapter.rank", [4, 1]))))


def test_a_default_written_out_is_the_same_arm():
    assert ids(axis("adapter.rank", [8])) == ids(axis("adapter.rank", ["default"])) == ids(axis("seed", [0]))
    assert ids(axis("adapter.alpha", [16])) == ids(axis("adapter.alpha", [16.0]))
    assert len(make(chain(axis("adapter.rank", [1, 8]), axis("adapter.alpha", [4, 16])))) == 3, "they share the default"


def test_the_order_of_rules_is_part_of_the_id():
    rules = [(".*/query/kernel", 4), (".*", 8)]
    assert ids(axis("adapter.rank", [rules])) != ids(axis("adapter.rank", [rules[::-1]]))


def test_an_id_is_the_same_in_another_process():
    code = (
        "import functools; from lora_jax import config; from lora_jax.ablation import axis, expand;"
        "print(expand(axis('adapter.rank', [3]), functools.partial(config.variant, config.default()))[0].id)"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert [done.stdout.strip()] == ids(axis("adapter.rank", [3]))


def test_axes_are_filled_in_where_a_cell_does_not_set_them():
    grid = chain(product(axis("adapter.rank", [2]), axis("seed", [0, 1])), axis("adapter.method", ["ia3"]))
    arms = make(grid, adapter__rank=6)
    assert [arm.axes for arm in arms] == [
        {"adapter.rank": 2, "seed": 0, "adapter.method": "lora"},
        {"adapter.rank": 2, "seed": 1, "adapter.method": "lora"},
        {"adapter.rank": None, "seed": 0, "adapter.method": "ia3"},
    ]
    assert arms[2].label == "seed=0 method=ia3", "it has no rank"


def test_labels_tell_only_what_differs_and_tell_it_apart():
    grid = zipped(axis("train.learning_rate", [1e-3, 1.0000001e-3]), axis("train.warmup", [0.1, 0.1]))
    assert [arm.label for arm in make(grid)] == ["learning_rate=0.001", "learning_rate=0.0010000001"]
    layers = make(axis("adapter.layers", [[0, 2], "all"]))
    assert [arm.label for arm in layers] == ["layers=[0,2]", "layers=all"]
    alike = make(product(axis("adapter.options.init", ["pissa"]), axis("adapter.layers", ["[0]", [0]])))
    assert len({arm.label for arm in alike}) == 2, "the id tells apart what reads alike"
    assert make(axis("seed", [3]))[0].label == "seed=3", "a lone arm shows all of it"


def test_the_values_of_an_arm_resolve_without_overrides():
    grid = chain(axis("train.epochs", [2.0]), axis("adapter.method", ["ia3"]), axis("adapter.options.dropout", [0.1]))
    arms = make(grid, train__steps=50, adapter__options={"dropout": 0.3, "init": "pissa"})
    for arm in arms:
        again = config.resolve(config.from_dict(arm.values))
        assert again.train == arm.config.train and again.adapter.arguments == arm.config.adapter.arguments
    assert (arms[0].config.train.steps, arms[0].config.train.epochs) == (0, 2.0)
    assert arms[2].config.adapter.arguments == {"dropout": 0.1, "init": "pissa"}


def test_variant_leaves_the_config_alone_and_can_unset():
    cfg = config.default()
    cfg.adapter.rank = 4
    before = cfg.to_json_best_effort()
    values, resolved = config.variant(cfg, {"adapter.rank": None, "adapter.options.dropout": 0.5})
    assert resolved.adapter.arguments == {"dropout": 0.5} and values["adapter"]["rank"] is None
    assert cfg.to_json_best_effort() == before


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("adapter.rnak", 2, ("there is no config field 'adapter.rnak'", "did you mean 'adapter.rank'")),
        ("adapter.rank", 0, ("whole number, 1 or more",)),
        ("train.steps", "many", ("expected an integer",)),
        ("train.steps", None, ("expected an integer",)),
        ("adapter.method", "lroa", ("did you mean 'lora'",)),
        ("adapter.options.dorpout", 0.1, ("has no 'dorpout'", "'dropout'")),
        ("train", 3, ("is a section", "train.accumulate")),
        ("adapter.options", {"dropout": 0.1}, ("is a section", "adapter.options.NAME")),
    ],
)
def test_a_mistake_names_the_arm(field, value, words):
    with pytest.raises(UserError) as raised:
        make(product(axis(field, [value]), axis("seed", [0, 7])))
    for word in (f"in the arm {field}={value!r} seed=0: ", *words):
        assert word in str(raised.value), str(raised.value)


def test_a_field_that_the_method_of_one_arm_lacks_is_an_error_there():
    with pytest.raises(UserError, match=r"in the arm adapter.method='ia3' adapter.rank=4: .*has no 'rank'"):
        make(product(axis("adapter.method", ["lora", "ia3"]), axis("adapter.rank", [4])))


def test_an_axis_that_changes_nothing_or_is_taken_is_an_error():
    with pytest.raises(UserError, match=r"varies 'log.wandb', which changes what is shown"):
        make(axis("log.wandb", [True, False]))
    with pytest.raises(UserError, match=r"--config.seed is set on the command line"):
        make(axis("seed", [0, 1]), given={"seed": 4})
