"""OpenAI's Agents SDK: a run with a tool that the model is forced to call, whole and streamed, over both APIs.

python with_openai_agents.py URL
"""

import asyncio
import sys

from agents import (
    Agent,
    ModelSettings,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    Runner,
    function_tool,
    set_tracing_disabled,
)
from openai import AsyncOpenAI

calls: list[bool] = []


@function_tool
def decide(ok: bool) -> str:
    """Decides."""
    calls.append(ok)
    return "decided"


async def main() -> None:
    set_tracing_disabled(True)
    client = AsyncOpenAI(base_url=f"{sys.argv[1]}/v1", api_key="none", max_retries=0)
    for kind in (OpenAIChatCompletionsModel, OpenAIResponsesModel):
        settings = ModelSettings(tool_choice="required", parallel_tool_calls=False, max_tokens=300)
        agent = Agent(
            "tiny", instructions="import os", tools=[decide], model=kind("tiny", client), model_settings=settings
        )
        before = len(calls)
        result = await Runner.run(agent, "def main(", max_turns=4)
        assert len(calls) > before and isinstance(result.final_output, str)
        streamed = Runner.run_streamed(agent, "def main(", max_turns=4)
        events = [event async for event in streamed.stream_events()]
        assert len(calls) > before + 1 and isinstance(streamed.final_output, str)
        print(kind.__name__, len(calls) - before, "calls,", len(events), "events")


asyncio.run(main())
