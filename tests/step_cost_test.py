"""What a whole training step costs, as ratios that hold on any machine: FLOPs, temporary memory, compilations.

Of a small Llama through the library's own task, adapter, optimizer and step, at three widths and a fixed number of
tokens. A forward pass and the gradient of its inputs cost two forward passes; gradients of frozen weights would make it
three. Rows are so short that attention scores, which nothing can freeze, do not count.
"""

import re

import jax
import pytest
import standin

import lora_jax as lj
from experiments.benchmarks import llama, measure
from experiments.benchmarks.rows import flops
from lora_jax import train
from lora_jax.feed import make_batches
from lora_jax.train import TrainSettings, fit

WIDTHS = (64, 128, 256)
LAYERS, VOCAB = 2, 64
MODEL = {**llama.TOY, "num_hidden_layers": LAYERS, "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96}
LARGEST = 4 * 1.5  # bytes of gate, up and down for every n^2
SETTINGS = {"batch": 48, "length": 8, "rank": 1, "dtype": "float32"}


def of_width(width):
    """{what a model of that width is made from}."""
    return {**SETTINGS, "model": flops.sized(MODEL, width)}


@pytest.fixture(scope="module")
def programs():
    """{width: (forward pass, step, work)}, compiled."""
    return {n: flops.programs(of_width(n)) for n in WIDTHS}


@pytest.mark.parametrize("width", WIDTHS)
def test_a_step_costs_two_forward_passes(programs, width):
    forward, step, work = programs[width]
    # Less than 1.6 would mean that the compiler's count misses products (the first layer's inputs need no gradient).
    assert 1.6 < measure.flops(step) / measure.flops(forward) <= 2.10
    least = 2 * work.matrix_params * work.tokens
    assert measure.flops(forward) == pytest.approx(least, rel=0.25), "the forward pass is mostly its matrix products"


def with_gradients_of_frozen_weights(work):
    """Plain autodiff through merged weights forms them."""
    adapter, delta = llama.starts(work)

    def loss(delta, variables, batch):
        outputs = work.base.apply(adapter.merge(variables, delta), **work.task.inputs(batch))
        return work.task.loss(outputs, batch)[0]

    return jax.jit(jax.value_and_grad(loss)).lower(delta, work.base.variables, work.batches[0]).compile()


def test_the_measures_see_gradients_of_frozen_weights(programs):
    width = WIDTHS[-1]
    forward, step, work = programs[width]
    wrong = with_gradients_of_frozen_weights(work)
    assert measure.flops(wrong) / measure.flops(forward) > 2.4
    assert measure.flops(wrong) > 1.2 * measure.flops(step)
    assert shaped_as_weights(work, wrong)
    twice = llama.work({**of_width(width), "batch": 2 * SETTINGS["batch"]})
    both = (measure.temporaries(program) for program in (wrong, with_gradients_of_frozen_weights(twice)))
    assert flops.held(*both) > 2 * LARGEST * width**2


def test_temporaries_do_not_grow_with_the_frozen_weights(programs):
    """At a fixed batch activations grow with the width, weights with its square: at most one of them may be copied."""
    small, middle, large = (measure.temporaries(programs[n][1]) for n in WIDTHS)
    # Of t(n) = a + b n + c n^2 at n, 2n, 4n only 6 c n^2 is left.
    quadratic = (large - 3 * middle + 2 * small) / 6 / WIDTHS[0] ** 2
    assert quadratic < 1.1 * LARGEST, f"{quadratic:.1f} bytes for every n^2; the largest weight has {LARGEST}"


def test_a_factored_step_makes_nothing_of_a_weights_shape():
    work = llama.work({**of_width(WIDTHS[-1]), "batch": 40})  # 320 tokens: no side of a weight is as long
    programs = {}
    for form in flops.FORMS:
        step, state = llama.stepper(work, form=form)
        programs[form] = step.lower(state, work.base.variables, work.batches[0]).compile()
    assert shaped_as_weights(work, programs["merged"])
    assert not shaped_as_weights(work, programs["factored"])


def shaped_as_weights(work, program):
    """The operations, arguments aside, whose result has the shape of a weight that is adapted, or of its transpose."""
    sides = {site.shape for site in work.base.sites.values() if site.fan_in and site.layer is not None}
    shapes = {",".join(map(str, shape)) for side in sides for shape in (side, side[::-1])}
    results = re.findall(r"= f32\[([\d,]+)\]\S* ([\w-]+)\(", program.as_text())
    return {(shape, name) for shape, name in results if shape in shapes} - {(shape, "parameter") for shape in shapes}


def test_the_frozen_weights_enter_once_and_do_not_come_out(programs):
    """Arguments: base, delta with two slots of AdamW, batch. Results: the new state alone."""
    _, step, work = programs[WIDTHS[-1]]
    memory = step.memory_analysis()
    delta = sum(4 * leaf.size for leaf in jax.tree.leaves(llama.starts(work)[1]))
    batch = sum(array.nbytes for array in work.batches[0].values())
    taken = memory.argument_size_in_bytes - work.weight_bytes - 3 * delta
    assert 0 <= taken < 1.1 * batch + 4096
    assert memory.output_size_in_bytes < 3 * delta + 4096
    assert memory.alias_size_in_bytes > 0.9 * 3 * delta, "the state is given away, so it exists once"


def test_a_run_compiles_its_step_once_for_every_bucket(tmp_path, monkeypatch):
    made, make = [], train.make_train_step
    monkeypatch.setattr(train, "make_train_step", lambda *a, **k: made.append(make(*a, **k)) or made[-1])
    settings = TrainSettings(steps=16, batch_size=2, learning_rate=1e-2, buckets=[4, 6], prefix_cache="off")
    splits, task, adapter = standin.make_splits(24, 4, 4), standin.make_task(), lj.lora(rank=2)
    batches = make_batches(task, splits["train"], settings, seed=3, adapter=adapter, training=True)
    lengths = {batches[i]["tokens"].shape[1] for i in range(settings.steps)}
    assert lengths == {4, 6}, "the run meets both buckets"
    fit(standin.make_base(), adapter, task, splits, settings, tmp_path, seed=3, echo=None)
    assert len(made) == 1 and made[0]._cache_size() == len(lengths)
