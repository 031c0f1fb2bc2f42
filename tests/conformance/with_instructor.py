"""Instructor: typed answers by a JSON schema and by a forced tool call, without retries.

python with_instructor.py URL
"""

import sys
from typing import Literal

import instructor
import openai
from pydantic import BaseModel, Field


class Ticket(BaseModel):
    """A support ticket."""

    kind: Literal["bug", "question"]
    urgent: bool
    score: int = Field(ge=0, le=9)


client = openai.OpenAI(base_url=f"{sys.argv[1]}/v1", api_key="none", max_retries=0)
for mode in (instructor.Mode.JSON_SCHEMA, instructor.Mode.TOOLS):
    found = instructor.from_openai(client, mode=mode).chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "x = "}],
        response_model=Ticket,
        max_retries=0,
        max_tokens=400,
        seed=1,
    )
    assert isinstance(found, Ticket)
    print(mode, found)
