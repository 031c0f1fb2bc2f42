"""Options of `sagellm serve`: those of the server and of the engine, from the command line, the environment or a file.

The command line has precedence over the environment (`SAGELLM_PORT` for `--port`), and that over the file of
`--config`. Typer is imported by the functions, as in `options.py`.
"""

from __future__ import annotations

import difflib
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any, get_type_hints

from sageLLM.runtime.cli.engine_options import EngineOptions
from sageLLM.runtime.cli.options import Command, as_command, keyword, parameters_of
from sageLLM.runtime.server.settings import ServerSettings

PREFIX = "SAGELLM_"


def with_serve_options(command: Command) -> Command:
    """A Typer command with all options, for `command(settings=..., engine=...)`."""
    import typer

    engine = parameters_of(EngineOptions, panel="Engine", environment=PREFIX)
    hints = get_type_hints(ServerSettings, include_extras=True)
    own = [one for one in fields(ServerSettings) if one.name != "model"]
    model = typer.Argument(help="A Hugging Face checkpoint folder.", envvar=f"{PREFIX}MODEL")
    config = typer.Option(
        None, "--config", help="A YAML file with options by name.", is_eager=True, callback=read_config
    )
    parameters = [
        keyword("model", Path, model),
        *(keyword(one.name, _plain(hints[one.name]), _option(one, hints[one.name])) for one in own),
        keyword("config", Path | None, config),
        *engine,
    ]

    def run(**values: Any) -> None:
        values.pop("config")
        options = EngineOptions(**{one.name: values.pop(one.name) for one in fields(EngineOptions)})
        model = str(values.pop("model"))
        given = {name: _listed(name, value) for name, value in values.items() if value is not None}
        command(settings=ServerSettings(model=model, **given), engine=options)

    return as_command(run, command, parameters)


def _plain(hint: Any) -> Any:
    kind = hint.__origin__
    return list[str] | None if kind == list[str] else kind


def _option(field: Field[Any], hint: Any) -> Any:
    import typer

    flag = hint.__metadata__[0]
    flags = () if flag.flag is None else (flag.flag,)
    default = None if field.default is MISSING else field.default
    return typer.Option(
        default, *flags, help=flag.help, rich_help_panel="Server", envvar=PREFIX + field.name.upper(), show_envvar=False
    )


def _listed(name: str, value: Any) -> Any:
    """A list from repeated flags; one that is a JSON list, as vLLM takes it, is taken apart."""
    if isinstance(value, list) and len(value) == 1 and value[0].startswith("["):
        import json

        import typer

        try:
            parsed = json.loads(value[0])
        except ValueError:
            raise typer.BadParameter(f"{name} must be a text or a JSON list, got {value[0]!r}") from None
        return [str(one) for one in parsed]
    return value


def read_config(context: Any, path: Path | None) -> Path | None:
    """Makes the values of the file the defaults of the options. A usage error for an unknown name."""
    if path is None:
        return None
    import typer
    import yaml

    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise typer.BadParameter(f"expected a YAML file: {error}") from None
    if not isinstance(values, dict):
        raise typer.BadParameter(f"{path} must hold a mapping of options")
    known = _names(context.command)
    defaults = {}
    for key, value in values.items():
        name = known.get(str(key).lstrip("-").replace("-", "_"))
        if name is None:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"; did you mean '{near[0]}'?" if near else ""
            raise typer.BadParameter(f"{path} has the unknown option '{key}'{hint}")
        defaults[name] = value
    context.default_map = {**(context.default_map or {}), **defaults}
    return path


def _names(command: Any) -> dict[str, str]:
    """The parameters of a command by name and by flag, without dashes."""
    names = {}
    for parameter in command.params:
        names[parameter.name] = parameter.name
        for flag in parameter.opts:
            if flag.startswith("--"):
                names[flag.removeprefix("--").replace("-", "_")] = parameter.name
    names.pop("config", None)
    return names
