"""Exports of execution graphs: Mermaid and DOT for documents, JSON for programs, traces for Perfetto, web pages."""

from __future__ import annotations

from sageLLM.runtime.core.ir.json_form import from_json, to_json
from sageLLM.runtime.inspect.chrome_trace import to_chrome_trace
from sageLLM.runtime.inspect.diagrams import to_dot, to_mermaid
from sageLLM.runtime.inspect.page import Step, to_html, to_page

__all__ = ["Step", "from_json", "to_chrome_trace", "to_dot", "to_html", "to_json", "to_mermaid", "to_page"]
