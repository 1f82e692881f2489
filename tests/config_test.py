"""The configuration: defaults, checks with their messages, and the way through flags."""

import dataclasses

import pytest
from absl import flags
from absl.testing import flagsaver

from experiments import launch
from lora_jax import config
from lora_jax.errors import UserError
from lora_jax.train_settings import TrainSettings


def parsed(*arguments: str):
    """The config that a command with these arguments sees, and its overrides."""
    with flagsaver.flagsaver():
        flags.FLAGS.unparse_flags()
        launch.parse(["command", *arguments])
        return launch.config(), launch.overrides()


def resolved(*arguments: str) -> config.Config:
    return config.resolve(*parsed(*arguments))


def failure(capsys, *arguments: str) -> str:
    """The one line on stderr of a command line that is wrong."""
    with pytest.raises(SystemExit) as ended:
        parsed(*arguments)
    assert ended.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1 and "Traceback" not in captured.err
    return captured.err


def test_defaults_resolve():
    got = config.resolve(config.default())
    assert got.adapter.method == "lora" and got.adapter.arguments == {}
    assert got.train.steps == config.DEFAULT_STEPS


@pytest.mark.parametrize(
    ("arguments", "steps", "epochs"),
    [
        (["--config.train.epochs=2"], 0, 2.0),
        (["--config.train.steps=7"], 7, 0.0),
        (["--config=configs/e2e.py", "--config.train.epochs=2"], 0, 2.0),
        (["--config=configs/banking.py", "--config.train.steps=7"], 7, 0.0),
    ],
)
def test_steps_or_epochs(arguments, steps, epochs):
    got = resolved(*arguments).train
    assert (got.steps, got.epochs) == (steps, epochs)


def test_steps_and_epochs_together_are_a_mistake():
    with pytest.raises(UserError, match="train.steps=7 and train.epochs=2"):
        resolved("--config.train.steps=7", "--config.train.epochs=2")


def test_every_train_setting_is_a_field():
    names = {f.name for f in dataclasses.fields(TrainSettings)}
    assert names == set(config.default().train)


def test_flags_of_every_form():
    got = resolved(
        "--config=configs/quickstart.py", "--config.adapter.rank=4", "--config.adapter.layers=last:2",
        "--config.adapter.targets=q,v", "--config.data.fields.prompt=question", "--config.data.limit", "5",
        "--config.train.packing", "--config.adapter.options.dropout=0.1", "--config.train.learning_rate=1",
    )  # fmt: skip
    assert got.adapter.arguments == {"rank": 4, "alpha": 16, "layers": "last:2", "targets": "q,v", "dropout": 0.1}
    assert got.data.fields == {"prompt": "question"} and got.data.limit == 5
    assert got.train.packing is True
    assert got.train.learning_rate == 1.0 and isinstance(got.train.learning_rate, float)


@pytest.mark.parametrize(
    ("text", "value"),
    [("8", 8), ("[('.*q.*', 4), ('.*', 8)]", [(".*q.*", 4), (".*", 8)]), ("default", None)],
)
def test_rank_forms(text, value):
    assert resolved(f"--config.adapter.rank={text}").adapter.arguments == ({} if value is None else {"rank": value})


def test_command_line_beats_the_file_and_the_last_one_counts():
    got = resolved("--config=configs/quickstart.py", "--config.adapter.rank=2", "--config.adapter.rank=3")
    assert got.adapter.arguments["rank"] == 3


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--config.train.stpes=3", "no config field 'train.stpes': did you mean 'train.steps'"),
        ("--config.trian.steps=3", "no config field 'trian.steps': did you mean 'train.steps'"),
        ("--config.train.steps=abc", "--config.train.steps=abc: expected an integer"),
        ("--config.train.steps=1.5", "--config.train.steps=1.5: expected an integer"),
        ("--config.train.learning_rate=fast", "--config.train.learning_rate=fast: expected a number"),
        ("--config.train.packing=maybe", "--config.train.packing=maybe: expected true or false"),
        ("--config.train=3", "--config.train is a section"),
        ("--config.data.fields=text", "--config.data.fields is a section"),
        ("--config=configs/quikstart.py", "did you mean 'configs/quickstart.py'"),
        ("--config", "--config needs a file"),
        ("--wrkdir=x", "Unknown command line flag 'wrkdir'. Did you mean: workdir"),
        ("quickstart", "'quickstart' is no flag"),
        ("--config=configs/quickstart.py:8", "get_config() takes no argument, got '8'"),
        ("--config=configs/minilm.py", "configs/minilm.py: the file has no function get_config()"),
    ],
)
def test_mistakes_in_flags(capsys, argument, message):
    assert message in failure(capsys, argument)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (
            "from lora_jax import config\ndef get_config():\n  cfg = config.default()\n  cfg.train.stpes = 3\n",
            ", line 4: ",
        ),
        ("def get_config():\n  return 1/0\n", ", line 2: ZeroDivisionError: division by zero"),
        ("def get_config(:\n", ", line 1: SyntaxError"),
        ("def get_config():\n  pass\n", "returned NoneType, expected a ConfigDict"),
        ("import nothing_of_this_name\n", ", line 1: ModuleNotFoundError: No module named 'nothing_of_this_name'"),
        ("def get_config(rank):\n  pass\n", "get_config(rank) needs an argument"),
    ],
)
def test_config_files_that_fail(capsys, tmp_path, body, message):
    file = tmp_path / "mine.py"
    file.write_text(body)
    text = failure(capsys, f"--config={file}")
    assert message in text and str(file) in text


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--config.adapter.method=lroa", "no method 'lroa'; did you mean 'lora'"),
        ("--config.task.name=clasification", "no task 'clasification'; did you mean 'classification'"),
        ("--config.task.options.templte=x", "has no such option; did you mean 'template'"),
        ("--config.adapter.rank=0", "rank 0 everywhere leaves nothing to train"),
        ("--config.adapter.rank=[('.*',0)]", "rank 0 everywhere leaves nothing to train"),
        ("--config.adapter.rank=2.5", "adapter.rank=2.5: expected a whole number"),
        ("--config.adapter.rank=True", "adapter.rank=True: expected a whole number"),
        ("--config.adapter.rank=big", "adapter.rank='big': expected a whole number"),
        ("--config.adapter.alpha=-1", "adapter.alpha=-1: expected a number above 0"),
        ("--config.adapter.layers=last:0", "adapter.layers='last:0': expected 'all', 'last:k'"),
        ("--config.adapter.layers=upper", "adapter.layers='upper': expected 'all', 'last:k'"),
        ("--config.adapter.targets=3", "adapter.targets=3: expected patterns"),
        ("--config.adapter.options.dropuot=0.1", "did you mean 'dropout'"),
        ("--config.adapter.head=half", "adapter.head='half': expected full or none"),
        ("--config.model.dtype=float8", "model.dtype='float8' is not known"),
        ("--config.model.dropout=1.5", "model.dropout=1.5: expected 0 <= dropout < 1"),
        ("--config.data.limit=0", "data.limit=0: expected 1 or more"),
        ("--config.data.fields.text=3", "data.fields.text=3: expected the name of a field"),
        ("--config.generate.top_p=0", "generate.top_p=0.0: expected 0 < top_p <= 1"),
        ("--config.seed=-1", "seed=-1: expected 0 or more"),
    ],
)
def test_mistakes_in_values(argument, message):
    with pytest.raises(UserError) as error:
        resolved(argument)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("argument", "members"),
    [
        ("", [{"method": "lora", "targets": "q,k,v,o"}, {"method": "bottleneck", "targets": "down"}]),
        ("lora, layernorm", [{"method": "lora"}, {"method": "layernorm"}]),
        (
            "[{'method': 'lora', 'rank': 4, 'layers': 'default'}, 'bitfit']",
            [{"method": "lora", "rank": 4}, {"method": "bitfit"}],
        ),
    ],
)
def test_a_chain_by_flags(argument, members):
    given = [f"--config.adapter.options.adapters={argument}"] if argument else []
    got = resolved("--config.adapter.method=chain", "--config.adapter.targets=default", *given)
    assert got.adapter.arguments == {"adapters": members}


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("lora,botleneck", "no method 'botleneck'; did you mean 'bottleneck'"),
        ("[{'method': 'lora', 'rnak': 4}]", "the method 'lora' has no 'rnak'; did you mean 'rank'"),
        ("[{'method': 'lora', 'rank': 0}]", "rank 0 everywhere leaves nothing to train"),
        ("[{'rank': 4}]", "expected 'lora,bottleneck', or a list such as"),
        ("[]", "expected 'lora,bottleneck', or a list such as"),
        ("[3]", "adapter.options.adapters=3: expected"),
    ],
)
def test_mistakes_in_a_chain(argument, message):
    with pytest.raises(UserError) as error:
        resolved("--config.adapter.method=chain", f"--config.adapter.options.adapters={argument}")
    assert message in str(error.value)


def test_a_field_for_another_method_is_an_error_on_the_command_line():
    with pytest.raises(UserError, match="adapter.rank=3: the method 'head' has no 'rank'"):
        resolved("--config.adapter.method=head", "--config.adapter.rank=3")


def test_a_field_for_another_method_is_a_note_in_a_file():
    got = resolved("--config=configs/quickstart.py", "--config.adapter.method=full")
    assert got.adapter.arguments == {}
    assert got.adapter.notes == (
        "adapter.rank=8 has no effect: the method 'full' does not have it",
        "adapter.alpha=16 has no effect: the method 'full' does not have it",
    )


def test_an_option_that_the_file_misspells_for_its_own_method_is_an_error():
    cfg = config.default()
    cfg.adapter.options.dropuot = 0.1
    with pytest.raises(UserError, match="did you mean 'dropout'"):
        config.resolve(cfg)


def test_a_config_file_cannot_misspell_a_field():
    cfg = config.default()
    with pytest.raises((AttributeError, KeyError)):
        cfg.train.stpes = 3


def test_from_dict_refuses_what_it_does_not_know():
    with pytest.raises(UserError, match="did you mean 'train.steps'"):
        config.from_dict({"train": {"stpes": 3}})
    with pytest.raises(UserError, match="train.steps='3': expected an integer, got str"):
        config.from_dict({"train": {"steps": "3"}})


def test_a_section_cannot_vanish():
    cfg = config.default()
    cfg.unlock()
    del cfg.train["steps"]
    with pytest.raises(UserError, match="no field 'train.steps'"):
        config.resolve(cfg)


def test_an_unset_learning_rate_is_the_methods_own():
    rates = {}
    for method in ("lora", "full"):
        cfg = config.default()
        cfg.adapter.method = method
        rates[method] = config.resolve(cfg).train.learning_rate
    assert rates == {"lora": 1e-3, "full": 1e-4}
    cfg.train.learning_rate = 0.5
    assert config.resolve(cfg).train.learning_rate == 0.5
