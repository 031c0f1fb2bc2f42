"""Entry point of the `sagellm` command.

`sagellm generate` without options runs after every edit of a spec. It starts without Typer, because the import takes as
long as a run in which nothing changed.
"""

import gc
import sys


def main() -> None:
    if sys.argv[1:] == ["generate"]:
        raise SystemExit(_generate())
    from sageLLM.runtime.cli.main import main as run_command

    run_command()


def _generate() -> int:
    from sageLLM.codegen.commands import Generate
    from sageLLM.runtime.cli.counting import missed_expectations

    gc.disable()  # a tenth of the time of a short process that frees little
    return Generate([], None, count=missed_expectations).write()


if __name__ == "__main__":
    main()
