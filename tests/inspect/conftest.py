"""Shares the hand-declared ops of tests/core."""

from ..core.conftest import lib

__all__ = ["lib"]
