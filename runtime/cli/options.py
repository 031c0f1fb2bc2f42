"""Options of commands from dataclasses: the name, type and default of a field, and an `Option` with the rest.

`main.py` imports this module before it knows which command runs, so nothing heavy is imported at the top; Typer is
imported by the functions, since the dataclasses are also of use without a command line.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import MISSING, Field, fields
from typing import Any, get_type_hints

from sageLLM.runtime.engine.options import Option as Option

Command = Callable[..., None]


def with_request(kind: type[Any]) -> Callable[[Command], Command]:
    """Replaces the parameter `request` of a Typer command by an option for each field of the dataclass `kind`."""

    def decorate(command: Command) -> Command:
        def run(**values: Any) -> None:
            command(request=kind(**values))

        return as_command(run, command, parameters_of(kind))

    return decorate


def as_command(run: Command, command: Command, parameters: Sequence[inspect.Parameter]) -> Command:
    """`run`, as a Typer command with the name and help of `command` and with these parameters."""
    run.__name__, run.__doc__ = command.__name__, command.__doc__
    run.__annotations__ = {one.name: one.annotation for one in parameters}
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return run


def parameters_of(
    kind: type[Any], names: Sequence[str] = (), *, panel: str | None = None, environment: str | None = None
) -> list[inspect.Parameter]:
    """The parameters of a Typer command for all fields of a dataclass, or for `names`, below a heading `panel`.

    With a prefix `environment`, a variable is read too.
    """
    hints = get_type_hints(kind, include_extras=True)
    chosen = [field for field in fields(kind) if not names or field.name in names]
    return [_parameter(field, hints[field.name], panel, environment) for field in chosen]


def _parameter(field: "Field[Any]", hint: Any, panel: str | None, environment: str | None) -> inspect.Parameter:
    import typer

    option: Option = hint.__metadata__[0]
    flags = () if option.flag is None else (option.flag,)
    default = typer.Option(
        _default(field),
        *flags,
        help=option.help,
        parser=option.parser and _reporting(option.parser),
        min=option.min,
        max=option.max,
        rich_help_panel=panel,
        envvar=option.environment if environment is None else environment + field.name.upper(),
        show_envvar=option.environment is not None,
    )
    return keyword(field.name, hint.__origin__, default)


def keyword(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    """A parameter that is passed by name."""
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _default(field: "Field[Any]") -> Any:
    """The default of a field; `...`, which means a required option, without one."""
    if field.default_factory is not MISSING:
        return field.default_factory()
    return ... if field.default is MISSING else field.default


def _reporting(parse: Callable[[str], int]) -> Callable[[Any], int]:
    """The parser, with its message as that of the usage error; Typer also passes it the default, an integer."""
    import typer

    def parse_or_report(value: Any) -> int:
        try:
            return value if isinstance(value, int) else parse(value)
        except ValueError as error:
            raise typer.BadParameter(str(error)) from None

    return parse_or_report
