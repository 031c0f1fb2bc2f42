"""Pydantic AI: typed output by a JSON schema and by an output tool, and a streamed text.

python with_pydantic_ai.py URL
"""

import asyncio
import sys
from typing import Literal

from pydantic import BaseModel
from pydantic_ai import Agent, NativeOutput, ToolOutput
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider


class Answer(BaseModel):
    """An answer."""

    kind: Literal["a", "b"]
    ok: bool


model = OpenAIChatModel("tiny", provider=OpenAIProvider(base_url=f"{sys.argv[1]}/v1", api_key="none"))
settings = {"max_tokens": 200, "temperature": 0}


async def main() -> None:
    for output in (NativeOutput(Answer), ToolOutput(Answer)):
        agent = Agent(model, output_type=output, model_settings=settings, retries=0)
        found = await agent.run("def main(")
        assert isinstance(found.output, Answer)
        print(type(output).__name__, found.output)
    async with Agent(model, model_settings=settings).run_stream("def main(") as result:
        texts = [text async for text in result.stream_text(delta=True)]
    assert "".join(texts)
    print("stream of", len(texts), "pieces")


asyncio.run(main())
