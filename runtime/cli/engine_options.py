"""Engine options of the commands that run a model, shared by `run`, `embed`, `serve` and `bench`.

Those that are arguments of `LLM` as they are come from its record, `SharedOptions`.
Nothing heavy is imported at the top, as in `options.py`.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from sageLLM.runtime.cli.options import Command, Option, as_command, keyword, parameters_of
from sageLLM.runtime.engine.options import LLMOptions, SharedOptions, parse_count

if TYPE_CHECKING:
    from sageLLM.runtime.engine.llm import LLM
    from sageLLM.runtime.scheduler.pd_scheduler import PDSchedulerConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions(SharedOptions):
    """The arguments of `LLM`, and of its scheduler, as options of a command."""

    pd: Annotated[
        Literal["strict", "time_share", "hybrid", "auto"], Option("The mode of the prefill/decode scheduler.")
    ] = "hybrid"
    max_num_seqs: Annotated[int, Option("Requests per step.", parser=parse_count)] = 256
    max_num_batched_tokens: Annotated[int, Option("Tokens per step.", parser=parse_count)] = 4096
    prefill_chunk_size: Annotated[int, Option("Prompt tokens per hybrid step.", parser=parse_count)] = 512
    scheduling_policy: Annotated[
        Literal["fcfs", "priority", "deadline", "fair_share"], Option("Order of the requests.")
    ] = "priority"
    slo_ttft: Annotated[float, Option("Objective of mode auto for the time to first token, in seconds.")] = 1.0
    slo_tpot: Annotated[float, Option("The same for the time per output token after it.")] = 0.1
    kv_events_config: Annotated[
        str | None, Option("JSON with vLLM's fields: publish changes of the prefix cache over ZeroMQ.")
    ] = None
    plugins: Annotated[list[Path] | None, Option("An additional generated folder; can be repeated.", "--plugin")] = None
    disable_passes: Annotated[str, Option("Graph passes to skip, separated by commas.")] = ""

    def scheduler(self) -> "PDSchedulerConfig":
        """The config of the scheduler. Raises ValueError for an invalid option."""
        from sageLLM.runtime.scheduler.pd_scheduler import PDSchedulerConfig

        defaults = PDSchedulerConfig()
        return PDSchedulerConfig(
            mode=self.pd,
            max_prefill_batch_size=min(self.max_num_seqs, defaults.max_prefill_batch_size),
            max_decode_batch_size=self.max_num_seqs,
            max_prefill_tokens=self.max_num_batched_tokens,
            prefill_chunk_size=self.prefill_chunk_size,
            policy=self.scheduling_policy,
        )

    def arguments(self) -> dict[str, Any]:
        """The keyword arguments of `LLM`. Raises SageError for an invalid option."""
        from sageLLM.runtime.engine.combinations import check_combinations
        from sageLLM.runtime.errors import SageError
        from sageLLM.runtime.scheduler.forecast import ServiceObjective

        names = {option.name for option in fields(LLMOptions)}
        own = {option.name: getattr(self, option.name) for option in fields(self) if option.name in names}
        try:
            own["scheduler"] = self.scheduler()
            own["objective"] = ServiceObjective(self.slo_ttft, self.slo_tpot)
        except ValueError as error:
            raise SageError(str(error)) from None
        own["plugins"] = self.plugins or []
        own["disable_passes"] = [name for name in self.disable_passes.split(",") if name]
        check_combinations(LLMOptions(**own), self.pd)  # before torch is imported
        return own

    def load(self, model: Path, **arguments: Any) -> "LLM":
        """The `LLM` of a checkpoint folder; `arguments` take precedence over the options."""
        from sageLLM.runtime.engine.llm import LLM

        return LLM(model, **{**self.arguments(), **arguments})


EMBEDDING_OPTIONS = ("device", "dtype", "kernels", "max_model_len", "plugins", "disable_passes")
"""The options that matter without a KV cache and a scheduler."""


def with_engine_options(*names: str) -> Callable[[Command], Command]:
    """Replaces the parameter `engine: EngineOptions` of a Typer command by an option for each field, or for `names`."""

    def decorate(command: Command) -> Command:
        options = parameters_of(EngineOptions, names, panel="Engine")
        own = [one for one in inspect.signature(command).parameters.values() if one.name != "engine"]

        def run(**values: Any) -> None:
            engine = EngineOptions(**{option.name: values.pop(option.name) for option in options})
            command(**values, engine=engine)

        return as_command(run, command, [*(keyword(one.name, one.annotation, one.default) for one in own), *options])

    return decorate
