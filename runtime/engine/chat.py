"""Renders conversations to prompts, with the checkpoint's chat templates or with one of the caller's."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

from sageLLM.runtime.core.model.hf_config import shown
from sageLLM.runtime.errors import ChatTemplateError, PromptError
from sageLLM.runtime.text.chat_messages import Conversation, as_conversations, check_template_options, normalize
from sageLLM.runtime.text.chat_template import ChatTemplate
from sageLLM.runtime.text.tokenizer import Tokenizer

MAX_TEMPLATES = 4
"""The number of templates with a running process; the least recently used one ends first."""


class ChatOptions(TypedDict, total=False):
    """The options of `LLM.chat`, which documents them."""

    chat_template: str | None
    add_generation_prompt: bool
    continue_final_message: bool
    tools: Sequence[Mapping[str, Any]] | None
    chat_template_kwargs: Mapping[str, Any] | None


class ChatPrompts:
    """Renders and tokenises conversations for one tokenizer. Threads can share it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._lock = threading.Lock()
        self._templates: dict[str, ChatTemplate] = {}

    def render(
        self,
        messages: Conversation | Sequence[Conversation],
        *,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> tuple[list[dict[str, Any]], bool]:
        """The prompts of the conversations with text and ids, and whether `messages` was a list of conversations.

        See `LLM.chat` for the options. Raises ChatTemplateError and RequestError.
        """
        conversations, is_batch = as_conversations(messages)
        check_template_options(tools, chat_template_kwargs)
        if continue_final_message and add_generation_prompt:
            raise PromptError(
                "continue_final_message cannot be combined with add_generation_prompt, which begins another message; "
                "pass add_generation_prompt=False",
                "continue_final_message",
            )
        template = self._template(chat_template, "default" if tools is None else "tool_use")
        prompts = []
        for i, conversation in enumerate(conversations):
            place = f"messages[{i}]" if is_batch else "messages"
            normalized = normalize(conversation, template.content_form, place)
            mark = _mark_end(normalized, f"{place}[{len(normalized) - 1}].content") if continue_final_message else None
            text = template.render(
                normalized,
                tools=tools,
                variables=chat_template_kwargs,
                add_generation_prompt=add_generation_prompt,
            )
            if mark is not None:
                text = _cut_at(text, mark)
            ids = self._tokenizer.encode(text, add_special_tokens=False)
            prompts.append({"prompt": text, "prompt_token_ids": ids})
        return prompts, is_batch

    def close(self) -> None:
        """Ends the processes of all templates."""
        with self._lock:
            templates, self._templates = list(self._templates.values()), {}
        for template in templates:
            template.close()

    def check_template(self, source: str | None = None) -> None:
        """Compiles a template, the checkpoint's by default, and starts its process. Raises ChatTemplateError."""
        assert self._template(source, "default").content_form

    def _template(self, source: str | None, name: str) -> ChatTemplate:
        """The caller's template; else the checkpoint's of that name if it has one, else its default one."""
        if source is None:
            source = self._checkpoint_source(name)
        elif not isinstance(source, str):
            raise PromptError(f"chat_template must be a Jinja template as a text, got {shown(source)}", "chat_template")
        with self._lock:
            # Re-inserting keeps the order of last use. A template that is closed while in use starts a new process.
            template = self._templates.pop(source, None) or ChatTemplate(source, self._tokenizer.special_tokens)
            self._templates[source] = template
            oldest = self._templates.pop(next(iter(self._templates))) if len(self._templates) > MAX_TEMPLATES else None
        if oldest is not None:
            oldest.close()
        return template

    def _checkpoint_source(self, name: str) -> str:
        sources = self._tokenizer.chat_templates
        source = sources.get(name, sources.get("default"))
        if source is None:
            known = ", ".join(sorted(sources)) or "none"
            raise ChatTemplateError(
                f"expected a chat template 'default' in the checkpoint, got {known}; "
                "pass a plain prompt or chat_template, or add chat_template.jinja to the checkpoint"
            )
        return source


def _mark_end(messages: list[dict[str, Any]], place: str) -> str:
    """Appends a mark to the content of the last message, and returns it.

    The mark ends with a space, which tells later whether the template strips the end of contents.
    """
    mark = f"[{secrets.token_hex(16)}] "
    content = messages[-1]["content"]
    if isinstance(content, str) and content:
        messages[-1]["content"] = content + mark
    elif content and isinstance(content, list):
        content[-1] = {**content[-1], "text": content[-1]["text"] + mark}
    else:
        raise PromptError(f"{place} must be a text for continue_final_message, got none", place)
    return mark


def _cut_at(text: str, mark: str) -> str:
    """The rendered text up to the mark. Without the spaces before it if the template strips the end of contents."""
    end = text.rfind(mark.strip())
    if end < 0:
        raise ChatTemplateError(
            "the chat template leaves out the end of the last message, so continue_final_message cannot continue it; "
            "pass a chat_template that renders it"
        )
    continued = text[:end] if text.startswith(mark, end) else text[:end].rstrip()
    return continued.replace(mark, "").replace(mark.strip(), "")  # of a template that renders the message twice
