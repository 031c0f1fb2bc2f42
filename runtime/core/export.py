"""Execution graphs for other eyes: Mermaid and DOT for documents, JSON for programs, and a web page for people."""

from __future__ import annotations

from sageLLM.runtime.core.json_form import from_json, to_json

__all__ = ["from_json", "to_json"]
