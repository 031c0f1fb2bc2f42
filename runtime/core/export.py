"""Execution graphs for other eyes: Mermaid and DOT for documents, JSON for programs, and a web page for people."""

from __future__ import annotations

from sageLLM.runtime.core.diagrams import to_dot, to_mermaid
from sageLLM.runtime.core.json_form import from_json, to_json
from sageLLM.runtime.core.page import to_html

__all__ = ["from_json", "to_dot", "to_html", "to_json", "to_mermaid"]
