"""Twenty steps of ours and of PEFT with torch's AdamW, from the same factors on the same batches: the same losses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj
from lora_jax import optim
from lora_jax.step import init_state, make_train_step
from tests.export.peft_models import made, model_of

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
pytestmark = pytest.mark.peers

STEPS, RATE = 20, 1e-2
BATCHES = np.random.default_rng(0).integers(1, 40, (STEPS, 4, 7))
CONFIGS = {
    "lora": lambda: peft.LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "v_proj", "down_proj"]),
    "dora": lambda: peft.LoraConfig(r=3, lora_alpha=6, use_dora=True, target_modules=["q_proj", "v_proj", "down_proj"]),
    "ia3": lambda: peft.IA3Config(
        target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]
    ),
}  # fmt: skip


class Task:
    """Every next token of random rows."""

    @staticmethod
    def inputs(batch):
        return {"tokens": batch[:, :-1]}

    @staticmethod
    def loss(logits, batch):
        nll = -jnp.take_along_axis(jax.nn.log_softmax(logits), batch[:, 1:, None], axis=-1)
        return jnp.sum(nll), jnp.asarray(nll.size, jnp.float32)


def theirs(method, folder):
    """Losses of PEFT; its initial adapter is written into the folder."""
    torch.manual_seed(0)
    model = peft.get_peft_model(model_of("llama"), CONFIGS[method]())
    model.save_pretrained(folder)
    tx = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE, weight_decay=0.0)
    losses = []
    for batch in BATCHES:
        rows = torch.tensor(batch)
        logits = model(rows[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), rows[:, 1:].reshape(-1))
        tx.zero_grad()
        loss.backward()
        tx.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("method", CONFIGS)
def test_the_same_losses(method, tmp_path):
    expected = theirs(method, tmp_path)
    base = made("llama")[2]
    adapter, delta = lj.load_peft(tmp_path, base)
    assert adapter.spec["method"] == method
    mask, tx = adapter.trainable(delta), optim.make_optimizer(RATE)
    step = make_train_step(lj.lift(base.apply), adapter, Task, tx, mask)
    state, losses = init_state(delta, mask, tx), []
    for batch in BATCHES:
        state, found = step(state, base.variables, jnp.asarray(batch, jnp.int32))
        losses.append(float(found["loss_sum"] / found["weight"]))
    np.testing.assert_allclose(losses, expected, rtol=1e-4)
    assert abs(losses[-1] - losses[0]) > 0.1, "the training does something"
