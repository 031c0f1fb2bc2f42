"""How long a sequence may be, who can therefore never run, and how much room a request reserves."""

from sageLLM.runtime.scheduler.base import Request


class SequenceLimits:
    """Bounds on prompt + output, in tokens: the model's and the KV pool's; None is no bound.

    `max_seq_len` is the tighter of the two.
    """

    def __init__(self, max_model_len: int | None, max_kv_tokens: int | None, block_size: int) -> None:
        self.max_model_len = max_model_len
        self.max_kv_tokens = max_kv_tokens
        self.block_size = block_size
        bounds = [bound for bound in (max_model_len, max_kv_tokens) if bound is not None]
        self.max_seq_len: int | None = min(bounds, default=None)

    def why_too_long(self, request: Request) -> str | None:
        """The reason why the request can never yield a token, or None: the bounds must hold its tokens and one more."""
        num_tokens = request.total_tokens
        name = f"request {request.request_id!r}"
        if self.max_model_len is not None and num_tokens >= self.max_model_len:
            return (
                f"{name} has {num_tokens} prompt tokens; with max_model_len={self.max_model_len} "
                f"at most {self.max_model_len - 1} leave room for an output token"
            )
        if self.max_kv_tokens is not None and num_tokens >= self.max_kv_tokens:
            num_needed, num_blocks = -(-(num_tokens + 1) // self.block_size), self.max_kv_tokens // self.block_size
            return (
                f"{name} needs {num_needed} KV blocks for {num_tokens} prompt tokens and one output token; "
                f"the pool has {num_blocks} blocks of {self.block_size} tokens"
            )
        return None

    def is_full(self, request: Request) -> bool:
        """Whether the request has all the output it asked for, or is as long as a sequence may be."""
        num_output_tokens = len(request.output_token_ids)
        if num_output_tokens >= request.max_new_tokens:
            return True
        return self.max_seq_len is not None and len(request.prompt_token_ids) + num_output_tokens >= self.max_seq_len

    def num_outputs_left(self, request: Request) -> int:
        """Output tokens that the request may still get; not above 0 when it is full."""
        num_left = request.max_new_tokens - len(request.output_token_ids)
        return num_left if self.max_seq_len is None else min(num_left, self.max_seq_len - request.total_tokens)

    def num_tokens_reserved(self, request: Request, can_preempt: bool) -> int:
        """Tokens to reserve on admission: those known, or, without preemption, all there may be."""
        num_tokens = request.total_tokens
        if not can_preempt:
            num_tokens = max(num_tokens, request.num_prompt_tokens + request.max_new_tokens)
        return num_tokens if self.max_seq_len is None else min(num_tokens, self.max_seq_len)
