"""Sequence length limits: the longest sequence, requests that can never run, and tokens reserved on admission."""

from sageLLM.runtime.scheduler.request import Request


class SequenceLimits:
    """Bounds on prompt + output in tokens: the model's and the KV pool's; None means unbounded.

    `max_seq_len` is the tighter of the two. The KV of a sequence of more than `switch_len` tokens differs at every
    position from that of a shorter one (long rope factors), so a request that outgrows the length is recomputed.

    With `reserve_output` a request reserves room for its whole output on admission (it then never needs a preemption),
    otherwise only for its known tokens.
    """

    def __init__(
        self,
        max_model_len: int | None,
        max_kv_tokens: int | None,
        block_size: int,
        reserve_output: bool = False,
        switch_len: int | None = None,
    ) -> None:
        self.max_model_len = max_model_len
        self.max_kv_tokens = max_kv_tokens
        self.block_size = block_size
        self.reserve_output = reserve_output
        self.switch_len = switch_len
        bounds = [bound for bound in (max_model_len, max_kv_tokens) if bound is not None]
        self.max_seq_len: int | None = min(bounds, default=None)

    def why_too_long(self, request: Request) -> str | None:
        """The reason why the request can never yield a token, or None: its tokens and one more must fit the bounds."""
        num_tokens = request.total_tokens
        if self.max_model_len is not None and num_tokens >= self.max_model_len:
            return (
                f"request {request.request_id!r} has {num_tokens} prompt tokens; "
                f"with max_model_len={self.max_model_len} "
                f"at most {self.max_model_len - 1} leave room for an output token"
            )
        if self.max_kv_tokens is not None and num_tokens >= self.max_kv_tokens:
            num_needed, num_blocks = -(-(num_tokens + 1) // self.block_size), self.max_kv_tokens // self.block_size
            return (
                f"request {request.request_id!r} needs {num_needed} KV blocks for {num_tokens} prompt tokens "
                f"and one output token; "
                f"the pool has {num_blocks} blocks of {self.block_size} tokens"
            )
        return None

    def is_complete(self, request: Request) -> bool:
        """Whether the request has all the output it asked for, or has reached the longest sequence."""
        num_output_tokens = len(request.output_token_ids)
        if num_output_tokens >= request.max_new_tokens:
            return True
        return self.max_seq_len is not None and len(request.prompt_token_ids) + num_output_tokens >= self.max_seq_len

    def num_outputs_left(self, request: Request) -> int:
        """Output tokens that the request may still get; 0 or less when it is complete."""
        num_left = request.max_new_tokens - len(request.output_token_ids)
        return num_left if self.max_seq_len is None else min(num_left, self.max_seq_len - request.total_tokens)

    def num_decodes_left(self, request: Request) -> int:
        """Output tokens that the request may get until it is complete or has outgrown its KV."""
        num_left = self.num_outputs_left(request)
        if request.is_long is False and self.switch_len is not None:
            return min(num_left, self.switch_len + 1 - request.total_tokens)
        return num_left

    def is_long(self, request: Request) -> bool | None:
        """Whether the request has more than `switch_len` tokens; None without that length."""
        return None if self.switch_len is None else request.total_tokens > self.switch_len

    def has_outgrown_kv(self, request: Request) -> bool:
        """Whether the request is longer than `switch_len`, but its KV is that of a shorter sequence."""
        return request.is_long is False and self.is_long(request) is True

    def num_tokens_reserved(self, request: Request) -> int:
        """Tokens to reserve blocks for on admission."""
        num_tokens = request.total_tokens
        if self.reserve_output:
            num_tokens = max(num_tokens, request.num_prompt_tokens + request.max_new_tokens)
        return num_tokens if self.max_seq_len is None else min(num_tokens, self.max_seq_len)
