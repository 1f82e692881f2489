"""What the commands share: reading flags and configs, and the exit code of every way to end.

0 done; 2 the user's mistake: one message on stderr, no traceback; 3 training diverged; 128 + the signal after a stop
that saved.
"""

import ast
import gc
import importlib.util
import inspect
import logging
import re
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from absl import app, flags
from ml_collections import ConfigDict, config_flags

from lora_jax import config as config_lib
from lora_jax import kept
from lora_jax.ablation.grid import Grid, from_sweep
from lora_jax.errors import UserError, nearest
from lora_jax.stopping import Diverged, Interrupted

WORKDIR = flags.DEFINE_string("workdir", None, "The directory of the run.")
OUT = flags.DEFINE_string("out", None, "The directory that is written: of an export (empty or absent), of benchmarks.")
flags.DEFINE_bool("huge_pages", True, "Ask for huge pages on a CPU; read in experiments/environment.py.")
_OVERRIDE = re.compile(r"--?(?:no)?config\.([^=]+)(?:=(.*))?", re.DOTALL)
_FILE = re.compile(r"--?config(?:=(.*))?", re.DOTALL)
_given: dict[str, str | None] = {}


def run(main: Callable[[], None], base: Callable[[], ConfigDict] | None = None) -> None:
    """Runs a command on `sys.argv` and exits.

    Args:
      main: the command; it reads its flags, and its config through `config()`.
      base: the config that overrides change where no --config=FILE is given; `lora_jax.config.default` unless told.
    """
    app.run(lambda _: call(main), flags_parser=lambda argv: parse(argv, base or config_lib.default))


def call(main: Callable[[], None]) -> int:
    """Runs a command whose flags are parsed; returns its exit code."""
    logging.getLogger("jax").setLevel(logging.WARNING)  # else every backend that is not there is reported
    kept.use(kept.usual())
    # Tracing makes a million small objects, nearly all of which stay: looking through them again and again is 7 % of
    # the way to the first step.
    gc.freeze()
    gc.set_threshold(100_000)
    try:
        main()
    except UserError as error:
        return _say(f"error: {error}", 2)
    except (Diverged, Interrupted) as error:
        return _say(str(error), error.code)
    except KeyboardInterrupt:
        return _say("stopped before training began; nothing to save", 130)
    return 0


def parse(argv: list[str], base: Callable[[], ConfigDict] = config_lib.default) -> list[str]:
    """Parses flags and config. A mistake in them ends the process with code 2 and one line."""
    try:
        # The first pass reads the plain flags, since the config of a finished run lies in its --workdir.
        rest, spec = _take_file(argv)
        _given["file"] = spec
        plain = [a for i, a in enumerate(rest) if not _OVERRIDE.fullmatch(a)]
        flags.FLAGS(plain, known_only=True)
        cfg = load(spec) if spec is not None else base()
        for name in flags.FLAGS:  # a flag that may be given several times would otherwise hold all values twice
            flags.FLAGS[name].unparse()
        for argument in rest:
            if found := _OVERRIDE.fullmatch(argument):
                _check_override(found.group(1))
        # Unlocked, because a new key may appear in a free section; every other name was checked just now.
        cfg.unlock()
        config_flags.DEFINE_config_dict("config", cfg, lock_config=False, accept_new_attributes=True, sys_argv=rest)
        left = flags.FLAGS(rest)
        if len(left) > 1:
            raise UserError(f"{left[1]!r} is no flag; every option is --name=value")
        return left
    except flags.IllegalFlagValueError as error:
        sys.exit(_say(f"error: {_illegal_value(str(error))}", 2))
    except (UserError, flags.Error) as error:
        sys.exit(_say(f"error: {error}", 2))


def config_file() -> str | None:
    """What --config=FILE was given."""
    return _given.get("file")


def config() -> ConfigDict:
    """The config of this command, overrides applied."""
    return flags.FLAGS["config"].value


def overrides() -> dict[str, Any]:
    """`{dotted name: value}` of what the command line set."""
    return config_flags.get_override_values(flags.FLAGS["config"])


def load(spec: str) -> ConfigDict:
    """Runs `get_config` of a config file.

    Args:
      spec: the file's path, or `path:argument`.

    Raises:
      UserError: no such file, or the file fails; the message has the file and line.
    """
    path, colon, argument = spec.partition(":")
    try:
        get_config = _get_config(_run_file(spec), path, colon, argument)
        cfg = get_config(argument) if colon else get_config()
    except Exception as error:
        raise UserError(_config_failed(path, error)) from error
    if not isinstance(cfg, ConfigDict):
        raise UserError(
            f"--config={spec}: get_config() returned {type(cfg).__name__}, expected a ConfigDict; did you `return cfg`?"
        )
    return cfg


def load_sweep(spec: str, cfg: ConfigDict) -> Grid:
    """Runs `sweep` of an ablation's config file.

    Args:
      spec: as for `load`.
      cfg: the file's config with the command line's changes; goes to a `sweep(cfg)` that takes it.

    Raises:
      UserError: no such file, no grid in it, or the file fails; the message has the file and line.
    """
    path = spec.partition(":")[0]
    try:
        module = _run_file(spec)
        if not hasattr(module, "sweep"):
            raise UserError(
                f"{path}: the file has no function sweep(), so there is nothing to compare; write one (see "
                "configs/ablations/rank.py), or train it alone with experiments.train"
            )
        return from_sweep(module.sweep, cfg)
    except Exception as error:
        raise UserError(_config_failed(path, error)) from error


def docstring(spec: str) -> str:
    """What a config file says of itself."""
    return ast.get_docstring(ast.parse(Path(spec.partition(":")[0]).read_text(encoding="utf-8"))) or ""


def _run_file(spec: str) -> Any:
    """The module of a config file."""
    path = spec.partition(":")[0]
    file = Path(path)
    if not file.is_file():
        around = [str(p) for folder in {file.parent, Path("configs")} if folder.is_dir() for p in folder.rglob("*.py")]
        hint = (
            f"did you mean {nearest(path, around, 1)[0]!r}?" if around else "run the command from the repository's root"
        )
        raise UserError(f"--config={spec}: there is no file {path!r}; {hint}")
    module_spec = importlib.util.spec_from_file_location(f"config_{file.stem}", file)
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    return module


def _get_config(module: Any, path: str, colon: str, argument: str) -> Callable[..., Any]:
    if not hasattr(module, "get_config"):
        raise UserError(f"{path}: the file has no function get_config()")
    parameters = inspect.signature(module.get_config).parameters.values()
    if colon and not parameters:
        raise UserError(f"{path}: get_config() takes no argument, got {argument!r} after the colon")
    if not colon and any(p.default is p.empty for p in parameters):
        raise UserError(
            f"{path}: get_config({', '.join(p.name for p in parameters)}) needs an argument: --config={path}:..."
        )
    return module.get_config


def _config_failed(path: str, error: Exception) -> str:
    if isinstance(error, UserError):
        return str(error)
    frames = [
        f
        for f in traceback.extract_tb(error.__traceback__)
        if f.filename == path or Path(f.filename) == Path(path).resolve()
    ]
    line = error.lineno if isinstance(error, SyntaxError) else (frames[-1].lineno if frames else None)
    message = " ".join(str(error).split())
    return f"{path}{f', line {line}' if line else ''}: {type(error).__name__}: {message}"


def _take_file(argv: list[str]) -> tuple[list[str], str | None]:
    """Splits `--config=FILE` (or `--config FILE`) off the arguments; the last one counts."""
    rest, spec, arguments = [], None, iter(argv)
    for argument in arguments:
        found = _FILE.fullmatch(argument)
        if not found:
            rest.append(argument)
            continue
        spec = found.group(1) if found.group(1) is not None else next(arguments, "")
        if not spec:
            raise UserError("--config needs a file: --config=configs/quickstart.py")
    return rest, spec


def _check_override(path: str) -> None:
    """The name of an override must be a field, and not a whole section."""
    section = path.rpartition(".")[0]
    if section in config_lib.FREE:
        return
    if path not in config_lib.fields():
        inside = [name for name in config_lib.fields() if name.startswith(path + ".")]
        if inside:
            raise UserError(f"--config.{path} is a section; set one of its fields: --config.{inside[0]}=...")
        raise UserError(f"--config.{path}: {config_lib.unknown_field(path)}")
    if path in config_lib.FREE:
        raise UserError(f"--config.{path} is a section; set one of its fields: --config.{path}.NAME=...")


def _illegal_value(message: str) -> str:
    """absl's message about a value of the wrong type, with what was expected."""
    found = re.match(r"flag --config\.([^=]+)=(.*?): ", message, re.DOTALL)
    if not found:
        return message
    path, value = found.groups()
    return f"--config.{path}={value}: expected {config_lib.type_name(config_lib.fields()[path])}"


def _say(message: str, code: int) -> int:
    print(message, file=sys.stderr)
    return code
