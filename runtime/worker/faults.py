"""Failures of one request: the exceptions that count as such, and the reasons in its output."""

import logging

LOG = logging.getLogger("sagellm")
NOT_FINITE_REMEDY = "check the checkpoint's weights, or use a dtype with a larger range"
NOT_FINITE = f"the logits are not finite (NaN or infinity); {NOT_FINITE_REMEDY}"


def reraise_unless_attributable(error: BaseException) -> None:
    """Raises the error again if it is about the process and not about a request.

    Any other error ends a request, also one that is not an `Exception`: the tokenizers library raises its panics as
    BaseException.
    """
    if isinstance(error, KeyboardInterrupt | SystemExit | GeneratorExit):
        raise error


def reason_of(error: BaseException) -> str:
    """The reason in the output of a request that an error has ended."""
    return f"the request failed: {type(error).__name__}: {error}"


def log_end(request_id: str, reason: str, error: BaseException | None = None) -> None:
    """Logs that a request ended early; with the traceback if there is an error."""
    LOG.warning("request %s ended early: %s", request_id, reason, exc_info=error)
