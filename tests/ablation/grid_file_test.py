"""grid.json: what was written is read, what is absent is no error, what is wrong is named."""

import json

import pytest

from lora_jax.ablation import grid_file
from lora_jax.ablation.grid_file import GridFile
from lora_jax.errors import UserError


def test_what_was_written_is_read(tmp_path):
    told = GridFile(question="Which?", command="x", metric="dev.loss", better="min", axes=["seed"], base={"a.b": [1]},
                    arms=[{"id": "a", "label": "b", "axes": {}}], examples={"dev": 4}, seconds=2.5,
                    versions={"jax": "1"}, other={"mine": 3})  # fmt: skip
    grid_file.write(tmp_path, told)
    assert grid_file.read(tmp_path) == told
    assert json.loads((tmp_path / "grid.json").read_text())["mine"] == 3


def test_nothing_need_be_there(tmp_path):
    assert grid_file.read(tmp_path) == GridFile()
    (tmp_path / "grid.json").write_text('{"question": null}')
    assert grid_file.read(tmp_path) == GridFile()


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "grid.json is damaged: .*; start the grid again"),
        ("[]", "must hold one JSON object, got list"),
        ('{"arms": {}}', "'arms' must be a list, got {}"),
        ('{"seconds": "3"}', "'seconds' must be a number, got '3'"),
        ('{"base": [1]}', "'base' must be an object"),
        ('{"metric": 3}', "'metric' must be a text, got 3"),
    ],
)
def test_a_wrong_file_is_named(tmp_path, text, message):
    (tmp_path / "grid.json").write_text(text)
    with pytest.raises(UserError, match=message):
        grid_file.read(tmp_path)
