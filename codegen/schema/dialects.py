"""Schema of dialect files: how the models of a family mark reasoning and tool calls in their answers."""

from typing import Any, Literal

from pydantic import Field

from sageLLM.codegen.schema.base import Strict


class FormSpec(Strict):
    """One way to write tool calls. Texts outside of braces are marks; whitespace in them matches any, or none."""

    call: str = Field(
        min_length=1,
        description="one call: `{object}`, or `{name}` and `{arguments}`; `{id}` and `{index}`; `{? text}` is optional",
    )
    open: str = Field(default="", description="the mark before the first call")
    separator: str = Field(default="", description="the text between two calls")
    close: str = Field(default="", description="the mark after the last call")
    at: Literal["anywhere", "start"] = Field(
        default="anywhere", description="start: only calls of known functions, at the beginning of the content"
    )


class ObjectKeysSpec(Strict):
    """The keys of `{object}`, a JSON object with a call. Other keys are ignored."""

    name: str = Field(min_length=1, description="the key of the function's name")
    arguments: str = Field(min_length=1, description="the key of the arguments, an object")
    id: str | None = Field(default=None, min_length=1, description="the key of the call's id")


class ArgumentsSpec(Strict):
    """`{arguments}` as a series of patterns instead of a JSON object."""

    each: str = Field(
        min_length=1,
        description="one argument: `{key}`, then `{value}` (a text as it is, other types as JSON) or `{python}`",
    )
    separator: str = Field(default="", description="the text between two arguments")


class CallsSpec(Strict):
    """Tool calls. All forms are read; the first one is written and constrained."""

    detect: list[str] = Field(min_length=1, description="texts that the chat templates of the family contain")
    forms: list[FormSpec] = Field(min_length=1, description="the ways to write calls")
    keys: ObjectKeysSpec | None = Field(default=None, description="the keys of `{object}`")
    arguments: ArgumentsSpec | None = Field(default=None, description="the form of `{arguments}`, if it is not JSON")
    ids: str = Field(
        default="chatcmpl-tool-{hex}",
        min_length=1,
        description="new ids: `{hex}` and `{alnum9}` are random, `{name}` is the function, `{index}` counts calls",
    )


class ReasoningSpec(Strict):
    """Blocks of reasoning."""

    detect: list[str] = Field(min_length=1, description="texts that the chat templates of the family contain")
    block: str = Field(min_length=1, description="the mark before a block, `{text}`, and the mark after it")
    then: str = Field(default="", description="the text between a block and what follows; one of `skip`")


class CallExample(Strict):
    """A call of an example."""

    name: str = Field(description="the function")
    arguments: dict[str, Any] = Field(description="its arguments")
    id: str | None = Field(default=None, description="the id, if the text has one")


class ExampleSpec(Strict):
    """A text, and what is read from it. Tests and docs are made from examples."""

    text: str = Field(description="the answer")
    prompt_opens_reasoning: bool = Field(default=False, description="the prompt ends with the mark before a block")
    content: str = Field(default="", description="its content")
    reasoning: str = Field(default="", description="its reasoning")
    calls: list[CallExample] = Field(default=[], description="its calls")
    parameters: dict[str, Any] = Field(default={}, description="the JSON types of arguments that are written as text")


class DialectFile(Strict):
    """`specs/dialects/NAME.yaml`: one dialect."""

    schema_: Literal["dialects/v1"] = Field(alias="schema", description="kind and version of the file")
    dialect: str = Field(pattern=r"^[a-z][a-z0-9_]*$", description="the name in commands")
    summary: str = Field(min_length=1, description="one sentence")
    source: str = Field(min_length=1, description="the source of the facts")
    aliases: list[str] = Field(
        default=[], description="further names in commands; of dialects with the same alias, the detected one is used"
    )
    calls: CallsSpec | None = Field(default=None, description="tool calls")
    reasoning: ReasoningSpec | None = Field(default=None, description="reasoning")
    skip: list[str] = Field(default=[], description="marks that are left out of the content")
    examples: list[ExampleSpec] = Field(min_length=1, description="texts and what is read from them")
