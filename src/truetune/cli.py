"""Names → commands, loaded lazily; a fault → its message and exit code."""

from __future__ import annotations

import difflib
import importlib
import itertools
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from truetune.config import LANGUAGES, Config, language, load_yaml, unknown_key
from truetune.errors import Interrupted, MachineError, ToldElsewhere, TruetuneError, UserError, out_of_memory
from truetune.messages import text

COMMANDS = (
    *("train", "check", "chat", "compare", "eval", "serve", "merge", "export"),
    *("tune", "studio", "runs", "verify", "env", "demo"),
)


class Program(click.Group):
    """The command line in one language; loads the module of a command only when that command is called."""

    def __init__(self, lang: str) -> None:
        settings = {"token_normalize_func": _normalise, "help_option_names": ["-h", "--help"]}
        super().__init__("truetune", help=text("help.program", lang), context_settings=settings)
        self.lang = lang
        choice = click.Choice(["auto", *LANGUAGES])
        self.params.append(click.Option(["--lang"], type=choice, help=text("field.lang", lang), expose_value=False))
        self.params.append(click.Option(["--debug"], is_flag=True, help=text("help.debug", lang), expose_value=False))

    def list_commands(self, _ctx: click.Context) -> list[str]:
        """Return the names in the order of the story, not of the alphabet."""
        return list(COMMANDS)

    def get_command(self, _ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the module of a command and return the command in the program's language."""
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"truetune.commands.{cmd_name}")
        command: click.Command = module.command(self.lang)
        return command

    def format_commands(self, _ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands without importing them."""
        with formatter.section(text("help.commands", self.lang)):
            formatter.write_dl([(name, text(f"command.{name}", self.lang)) for name in COMMANDS])


def _normalise(token: str) -> str:
    """--learning_rate is --learning-rate (click hands the name over without its dashes)."""
    return token.replace("_", "-")


def config_options(lang: str, names: Sequence[str] | None = None) -> list[click.Parameter]:
    """Return --config and an option for every field of Config (or for `names`)."""
    options = [
        click.Option(["--" + name.replace("_", "-"), name], help=text(f"field.{name}", lang), metavar="VALUE")
        for name in Config.model_fields
        if name not in ("data", "lang") and (names is None or name in names)
    ]
    return [*options, click.Option(["--config", "config_file"], metavar="FILE", help=text("help.config", lang))]


def answer_options(lang: str, *, max_new_tokens: int = 512) -> list[click.Parameter]:
    """Return the options of commands that let a model answer."""
    return [
        click.Option(["--no-run-system"], is_flag=True, help=text("help.no_run_system", lang)),
        click.Option(
            ["--max-new-tokens"],
            type=click.IntRange(min=1),
            default=max_new_tokens,
            show_default=True,
            help=text("help.max_new_tokens", lang),
        ),
    ]


def given(values: dict[str, Any], data: Sequence[str]) -> dict[str, Any]:
    """Return the configuration flags that were given, with `data` if any was."""
    flags = {key: value for key, value in values.items() if key in Config.model_fields and value is not None}
    return flags | ({"data": list(data)} if data else {})


def main() -> None:
    """Run the command line and leave the process with its exit code."""
    # Our own lines say what is loaded; bars and notices of the libraries would only cover them. Errors come through.
    for name, value in (
        ("HF_HUB_DISABLE_PROGRESS_BARS", "1"),
        ("TRANSFORMERS_VERBOSITY", "error"),
        ("TQDM_DISABLE", "1"),
    ):
        os.environ.setdefault(name, value)
    if "--debug" not in sys.argv:
        warnings.simplefilter("ignore", FutureWarning)
    code = run(sys.argv[1:])
    if "LOCAL_RANK" in os.environ:
        # All is written. Torch 2.13 aborts now and then where FSDP on gloo is torn down with the interpreter.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def run(words: Sequence[str]) -> int:
    """Run the command line and return its exit code; no traceback unless --debug is given."""
    lang = _lang(words)
    debug = "--debug" in words
    try:
        result = Program(lang).main([*_hoisted(words)], prog_name="truetune", standalone_mode=False, obj=list(words))
        return result if isinstance(result, int) else 0
    except (click.Abort, KeyboardInterrupt):
        return _report(Interrupted(), lang, debug=debug)
    except click.NoSuchOption as error:
        return _report(_unknown_option(error), lang, debug=debug)
    except click.UsageError as error:
        command = _command(words)
        fault = UserError("usage", where=command, fix="usage", problem=error.format_message(), command=command)
        return _report(fault, lang, debug=debug)
    except TruetuneError as error:
        return _report(error, lang, debug=debug)
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and "can't allocate memory" not in str(error):  # torch's words for it
            raise
        return _report(out_of_memory(_command(words)), lang, debug=debug)
    except OSError as error:
        where = str(error.filename or "truetune")
        return _report(MachineError("machine", where=where, fix="machine", problem=error), lang, debug=debug)


def _command(words: Sequence[str]) -> str:
    return " ".join(["truetune", *[word for word in words if word in COMMANDS][:1]])


def _unknown_option(error: click.NoSuchOption) -> UserError:
    """Return the fault, with the nearest of the command's own options."""
    near_ones = difflib.get_close_matches(error.option_name, error.possibilities or (), n=1)
    if near_ones:
        near = near_ones[0]
        return UserError(
            "config_unknown_key", where=error.option_name, fix="config_did_you_mean", name=error.option_name, near=near
        )
    return unknown_key(error.option_name, error.option_name)


def _hoisted(words: Sequence[str]) -> list[str]:
    """Move --debug and --lang to the front, where the program itself takes them, wherever they were written."""
    front, rest = [], []
    pending = iter(words)
    for word in pending:
        if word == "--lang":
            front += [word, next(pending, "")]
        elif word == "--debug" or word.startswith("--lang="):
            front.append(word)
        else:
            rest.append(word)
    return front + rest


def _lang(words: Sequence[str]) -> str:
    """Return the language: --lang, else `lang` in the file after --config, else the locale's.

    >>> _lang(["runs", "--lang", "zh"])
    'zh'
    """
    chosen = _value_of("--lang", words)
    file = _value_of("--config", words)
    if chosen is None and file is not None:
        try:
            chosen = load_yaml(Path(file))[0].get("lang")
        except (TruetuneError, OSError):
            # Reported when the command reads it.
            chosen = None
    return language(chosen) if chosen in LANGUAGES else language()


def _value_of(option: str, words: Sequence[str]) -> str | None:
    """Return the last value given to an option, as `--x value` or `--x=value`."""
    values = [word.partition("=")[2] for word in words if word.startswith(f"{option}=")]
    values += [value for word, value in itertools.pairwise(words) if word == option]
    return values[-1] if values else None


def _report(error: TruetuneError, lang: str, *, debug: bool) -> int:
    from truetune.console import Console

    # Before ranks are connected, each one of a machine meets the same fault.
    if not isinstance(error, ToldElsewhere) and os.environ.get("LOCAL_RANK", "0") == "0":
        Console(lang).error(error)
    if debug:
        raise error
    return error.exit_code
