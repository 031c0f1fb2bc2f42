"""Messages between the server's front and its engine process, in msgpack. They carry token ids, never text."""

from __future__ import annotations

from typing import Literal

import msgspec

from sageLLM.runtime.sampling.sampling_params import SamplingParams
from sageLLM.runtime.scheduler.plan import Role

ScoredToken = tuple[int, float, int]
"""A token id, its log-probability and its rank."""


# --- to the engine ---


class Submit(msgspec.Struct, tag="submit", frozen=True):
    """Queue a request. `deadline` is in seconds after the arrival; `cache_salt` separates cached KV.

    With `kv_ticket` the KV of the prompt is first fetched from the engine that has it.
    """

    request_id: str
    token_ids: list[int]
    params: SamplingParams
    priority: int = 0
    deadline: float | None = None
    tenant: str = ""
    cache_salt: str = ""
    kv_ticket: str = ""


class Abort(msgspec.Struct, tag="abort", frozen=True):
    """End a request, or the answer `index` of it. No reply follows."""

    request_id: str
    index: int | None = None


class Embed(msgspec.Struct, tag="embed", frozen=True):
    """Embed prompts between two steps."""

    request_id: str
    prompts: list[list[int]]
    pooling: str | None = None
    normalize: bool | None = None


class SetRole(msgspec.Struct, tag="set_role", frozen=True):
    """Let the prefill or decode worker `number` take another role."""

    request_id: str
    number: int
    role: Role


class SetTokenizer(msgspec.Struct, tag="set_tokenizer", frozen=True):
    """Facts of the tokenizer: ids that end an answer, besides those of the configs; for grammars, its text."""

    eos_ids: list[int]
    json: str | None = None
    num_tokens: int = 0


class Arrived(msgspec.Struct, tag="arrived", frozen=True):
    """The KV of a prompt is here, for the first `num_tokens`; it is sent by a thread of the engine's process.

    `name` is that of the copy. Without KV there is a `reason`.
    """

    name: str
    num_tokens: int
    reason: str = ""


Command = Submit | Abort | Embed | SetRole | SetTokenizer | Arrived


class HandoffSpec(msgspec.Struct, frozen=True):
    """The role of an engine that hands prompts over, the address on which it copies KV, and the policy without KV."""

    role: Role
    host: str = "127.0.0.1"
    policy: Literal["recompute", "fail"] = "recompute"


# --- to the front ---


class Ready(msgspec.Struct, tag="ready", frozen=True):
    """The engine is built. Lengths are in tokens; `max_kv_tokens` None means no limit.

    `choices` are sentences about what was chosen and why.
    """

    layout: str
    vocab_size: int
    generates: bool
    max_model_len: int
    max_seq_len: int = 0
    max_kv_tokens: int | None = None
    num_kv_blocks: int = 0
    block_size: int = 16
    max_num_seqs: int = 0
    mode: str = ""
    policy: str = ""
    eos_ids: list[int] = []
    choices: list[str] = []


class Refused(msgspec.Struct, tag="refused", frozen=True):
    """The engine cannot be built, because of an input of the user."""

    message: str


class Crashed(msgspec.Struct, tag="crashed", frozen=True):
    """The engine cannot be built or continue, because of a defect or of the machine."""

    message: str


class Delta(msgspec.Struct, array_like=True, frozen=True):
    """The new tokens of one answer. The sampled token is the first entry of each list in `logprobs`.

    `finish_reason` and `num_preemptions` are set with the last delta of an answer, and from a prefill engine
    `kv_ticket`, with which another engine can fetch the KV of the prompt. A request's first delta has the facts about
    its prompt: the number of cached tokens, the seconds in the queue, and the scores of its tokens from the second on.
    """

    request_id: str
    index: int
    token_ids: list[int]
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    logprobs: list[list[ScoredToken]] | None = None
    num_cached_tokens: int | None = None
    queue_seconds: float | None = None
    prompt_logprobs: list[list[ScoredToken]] | None = None
    num_preemptions: int | None = None
    kv_ticket: str | None = None


class WorkerLoad(msgspec.Struct, array_like=True, frozen=True):
    """A prefill or decode worker: its state is "running", "restarting" or "draining", and `epoch` counts its starts."""

    number: int
    role: str
    state: str
    epoch: int
    num_requests: int


class Load(msgspec.Struct, array_like=True, frozen=True):
    """Sizes of the queues and of the KV pool now, and counters since the start of the engine."""

    num_running: int
    num_waiting: int
    num_preempted: int
    kv_blocks_total: int
    kv_blocks_used: int
    kv_blocks_cached: int
    prefix_cache_queries: int
    prefix_cache_hits: int
    num_preemptions: int
    num_prefill_tokens: int
    num_decode_tokens: int
    num_steps: int
    transfers: int = 0
    workers: list[WorkerLoad] = []


class Step(msgspec.Struct, tag="step", frozen=True):
    """The answers that one step has changed; `load` comes with some steps only."""

    deltas: list[Delta]
    load: Load | None = None


class Rejected(msgspec.Struct, tag="rejected", frozen=True):
    """A command is invalid (`param` names the field), or an embedding has failed; nothing was queued or changed."""

    request_id: str
    message: str
    param: str | None = None


class Embedded(msgspec.Struct, tag="embedded", frozen=True):
    """The embeddings of a command, one f32 array per prompt."""

    request_id: str
    vectors: list[bytes]


class RoleAccepted(msgspec.Struct, tag="role_accepted", frozen=True):
    """The worker has the role, or drains for it; a load with its state was sent before."""

    request_id: str


class StepFailed(msgspec.Struct, tag="step_failed", frozen=True):
    """A step failed for a reason that belongs to no single request: all that the engine had by then have ended."""

    request_ids: list[str]
    message: str


Event = Ready | Refused | Crashed | Step | Rejected | Embedded | RoleAccepted | StepFailed
