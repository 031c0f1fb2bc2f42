"""Trains the model of `examples/tiny_python_model`, tokenizer and weights, from scratch on two CPU cores.

The text is the standard library of the Python that runs this script. The model is a Llama: RMSNorm, rotary positions,
grouped-query attention and a gated feed-forward. Its modules have the names of a Hugging Face checkpoint, so
`state_dict()` needs no renaming.

    python examples/train_tiny_model.py --out examples/tiny_python_model
"""

import argparse
import json
import math
import platform
import sysconfig
import time
import zlib
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn import functional

END_OF_TEXT = "<|endoftext|>"  # ends every file; the only special token, with id 0
END_OF_TEXT_ID = 0

# Tables, generated settings and tests: text that teaches little about how Python is written.
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data"}
SKIPPED_PREFIXES = ("_sysconfigdata", "config-")

# A line break never shares a token with the text after it, nor a bracket or a dot with the name next to it, so that a
# prompt may end at any of them.
TOKEN_PATTERN = r"\n+| {2,}| ?[A-Za-z_]+| ?[0-9]| ?[^\sA-Za-z0-9_]+|\s"

# A chat is read as one Python file: the messages one after the other, a line break between them.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['content'] }}{% if not loop.last %}{{ '\\n' }}{% endif %}{% endfor %}"
)


@dataclass(frozen=True, slots=True)
class ModelShape:
    """The sizes of a Llama with tied embeddings."""

    vocab_size: int = 2048
    hidden_size: int = 192
    intermediate_size: int = 448
    num_layers: int = 4
    num_heads: int = 6
    num_kv_heads: int = 2
    context_len: int = 512
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-5

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads


@dataclass(frozen=True, slots=True)
class TrainingPlan:
    """Length and learning rate of the training.

    Windows hold `seq_len` tokens up to the share `long_from` of the schedule, then as many as the model's context.
    `max_minutes` shortens the schedule on a machine that is slower than planned.
    """

    steps: int = 4000
    batch_tokens: int = 2048
    seq_len: int = 256
    long_from: float = 0.7
    peak_lr: float = 4e-3
    warmup_steps: int = 40
    weight_decay: float = 0.1
    max_minutes: float = 1e9
    seed: int = 0


# --- text
def source_files(root: Path) -> list[Path]:
    """The `.py` files below `root` that are worth learning from, in sorted order."""

    def is_wanted(relative: Path) -> bool:
        return not any(part in SKIPPED_FOLDERS or part.startswith(SKIPPED_PREFIXES) for part in relative.parts)

    return sorted(path for path in root.rglob("*.py") if is_wanted(path.relative_to(root)))


def is_held_out(path: Path, root: Path) -> bool:
    """Whether a file is kept for measuring: one in twenty, by its name alone, so that Python versions agree."""
    return zlib.crc32(path.relative_to(root).as_posix().encode()) % 20 == 0


def read_split(root: Path) -> tuple[list[str], list[str]]:
    """The texts to learn from and the texts to measure on."""
    split: tuple[list[str], list[str]] = ([], [])
    for path in source_files(root):
        split[is_held_out(path, root)].append(path.read_text(encoding="utf-8", errors="replace"))
    return split


def train_tokenizer(texts: Sequence[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE: any text can be encoded, and decoding restores it exactly."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(TOKEN_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encode_texts(tokenizer: Tokenizer, texts: Sequence[str]) -> Tensor:
    """All texts as one row of token ids, an end-of-text token before each one and after the last."""
    ids = [END_OF_TEXT_ID]
    for encoding in tokenizer.encode_batch(list(texts)):
        ids.extend(encoding.ids)
        ids.append(END_OF_TEXT_ID)
    return torch.tensor(ids)


@dataclass(frozen=True, slots=True)
class Corpus:
    """The text as the model sees it. Token rows are [num_tokens]; the byte counts are those of the UTF-8 text."""

    tokenizer: Tokenizer
    train: Tensor
    held_out: Tensor
    train_bytes: int
    held_out_bytes: int


def read_corpus(root: Path, vocab_size: int) -> Corpus:
    """Reads the files below `root` and trains the tokenizer on those that are not held out."""
    train, held_out = read_split(root)
    if not train or not held_out:
        raise SystemExit(
            f"{root}: needs at least one .py file to learn from and one to hold out; point --source elsewhere"
        )
    tokenizer = train_tokenizer(train, vocab_size)
    return Corpus(
        tokenizer=tokenizer,
        train=encode_texts(tokenizer, train),
        held_out=encode_texts(tokenizer, held_out),
        train_bytes=sum(len(text.encode()) for text in train),
        held_out_bytes=sum(len(text.encode()) for text in held_out),
    )


# --- model
class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight (Zhang and Sennrich, 2019)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return functional.rms_norm(x, self.weight.shape, self.weight, self.eps)


def rotary_tables(shape: ModelShape, seq_len: int) -> tuple[Tensor, Tensor]:
    """cos and sin of position * theta^(-2i/head_dim), each [seq_len, head_dim], the two halves equal.

    Su et al., RoFormer, 2021.
    """
    inverse_frequency = shape.rope_theta ** (-torch.arange(0, shape.head_dim, 2) / shape.head_dim)
    angle = torch.outer(torch.arange(seq_len), inverse_frequency).repeat(1, 2)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates element i of each head together with element i + head_dim/2, the pairing of Hugging Face checkpoints."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class Attention(nn.Module):
    """Causal attention in which each key-value head serves `group_size` query heads (GQA; Ainslie et al., 2023)."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.head_dim = shape.head_dim
        self.group_size = shape.num_heads // shape.num_kv_heads
        self.q_proj = nn.Linear(shape.hidden_size, shape.num_heads * shape.head_dim, bias=False)
        self.k_proj = nn.Linear(shape.hidden_size, shape.num_kv_heads * shape.head_dim, bias=False)
        self.v_proj = nn.Linear(shape.hidden_size, shape.num_kv_heads * shape.head_dim, bias=False)
        self.o_proj = nn.Linear(shape.num_heads * shape.head_dim, shape.hidden_size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q = rotate(self.split_heads(self.q_proj(x)), cos, sin)
        k = rotate(self.split_heads(self.k_proj(x)), cos, sin).repeat_interleave(self.group_size, dim=1)
        v = self.split_heads(self.v_proj(x)).repeat_interleave(self.group_size, dim=1)
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        out: Tensor = self.o_proj(y.transpose(1, 2).flatten(2))
        return out

    def split_heads(self, x: Tensor) -> Tensor:
        """[batch, seq, heads * head_dim] -> [batch, heads, seq, head_dim]"""
        return x.reshape(x.shape[0], x.shape[1], -1, self.head_dim).transpose(1, 2)


class MLP(nn.Module):
    """SwiGLU (Shazeer, 2020): down(silu(gate(x)) * up(x))."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.up_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.down_proj = nn.Linear(shape.intermediate_size, shape.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))
        return y


class Block(nn.Module):
    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        self.self_attn = Attention(shape)
        self.post_attention_layernorm = RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        self.mlp = MLP(shape)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class Decoder(nn.Module):
    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.shape = shape
        self.embed_tokens = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.layers = nn.ModuleList(Block(shape) for _ in range(shape.num_layers))
        self.norm = RMSNorm(shape.hidden_size, shape.rms_norm_eps)

    def forward(self, ids: Tensor) -> Tensor:
        cos, sin = rotary_tables(self.shape, ids.shape[1])
        x: Tensor = self.embed_tokens(ids)
        for layer in self.layers:
            x = layer(x, cos, sin)
        normed: Tensor = self.norm(x)
        return normed


class Llama(nn.Module):
    """The decoder with tied embeddings; `forward` returns the mean loss in nats per token."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.model = Decoder(shape)
        small = 0.02 / math.sqrt(2 * shape.num_layers)  # keeps the residual stream's variance independent of depth
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=small if name.endswith(("o_proj.weight", "down_proj.weight")) else 0.02)

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        logits = functional.linear(self.model(ids), self.model.embed_tokens.weight)
        return functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


# --- training
def draw_batches(tokens: Tensor, plan: TrainingPlan, seq_len: int) -> Iterator[Tensor]:
    """Endless batches [batch_tokens / seq_len, seq_len + 1].

    Each epoch cuts the text at a new offset and shuffles the pieces.
    """
    generator = torch.Generator().manual_seed(plan.seed + seq_len)
    batch_size = plan.batch_tokens // seq_len
    while True:
        offset = int(torch.randint(seq_len, (1,), generator=generator))
        starts = torch.arange(offset, len(tokens) - seq_len, seq_len)
        starts = starts[torch.randperm(len(starts), generator=generator)]
        for first in range(0, len(starts) - batch_size + 1, batch_size):
            yield tokens[starts[first : first + batch_size, None] + torch.arange(seq_len + 1)]


def learning_rate(plan: TrainingPlan, step: int, progress: float) -> float:
    """A linear warm-up, then a cosine that reaches zero at the end."""
    warmup = min(1.0, (step + 1) / plan.warmup_steps)
    return plan.peak_lr * warmup * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def make_optimizers(model: Llama, plan: TrainingPlan) -> list[torch.optim.Optimizer]:
    """Muon (Jordan, 2024) for the matrices of the layers, AdamW for the embedding and the norms.

    In a budget of a few million tokens Muon gets markedly further than AdamW alone. Its updates are scaled to the size
    of AdamW's (Liu et al., 2025), so one learning rate serves both.
    """
    matrices = [p for name, p in model.named_parameters() if p.dim() == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.dim() != 2 or "embed" in name]
    return [
        torch.optim.Muon(matrices, lr=plan.peak_lr, weight_decay=plan.weight_decay, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=plan.peak_lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]


def take_step(model: Llama, optimizers: Sequence[torch.optim.Optimizer], batch: Tensor, lr: float) -> float:
    """One update; returns the loss before it."""
    loss: Tensor = model(batch[:, :-1], batch[:, 1:])
    model.zero_grad()
    torch.autograd.backward(loss)
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
    return loss.item()


def train(model: Llama, tokens: Tensor, plan: TrainingPlan, context_len: int) -> int:
    """Trains in place and returns the number of steps done."""
    optimizers = make_optimizers(model, plan)
    short, long = draw_batches(tokens, plan, plan.seq_len), draw_batches(tokens, plan, context_len)
    start = time.monotonic()
    recent: deque[float] = deque(maxlen=50)
    for step in range(plan.steps):
        minutes = (time.monotonic() - start) / 60
        progress = max(step / plan.steps, minutes / plan.max_minutes)
        if progress >= 1:
            return step
        batch = next(short if progress < plan.long_from else long)
        recent.append(take_step(model, optimizers, batch, learning_rate(plan, step, progress)))
        if step % 50 == 0:
            print(
                f"step {step:5d}  loss {sum(recent) / len(recent):.3f}  {progress:4.0%}  {minutes:5.1f} min", flush=True
            )
    return plan.steps


@torch.no_grad()
def total_loss(model: Llama, tokens: Tensor, seq_len: int) -> float:
    """The summed loss in nats of predicting tokens[1:], in windows of `seq_len` that do not overlap."""
    total = 0.0
    for first in range(0, len(tokens) - 1, seq_len):
        window = tokens[first : first + seq_len + 1]
        total += model(window[None, :-1], window[None, 1:]).item() * (len(window) - 1)
    return total


def unigram_loss(tokens: Tensor, held_out: Tensor, vocab_size: int) -> float:
    """Nats per token of a model that knows only how often each token occurs: what any use of context must beat."""
    counts = torch.bincount(tokens, minlength=vocab_size) + 1
    return -(counts / counts.sum()).log()[held_out[1:]].mean().item()


@torch.no_grad()
def round_to_bfloat16(model: Llama) -> None:
    """Gives the weights the values that the checkpoint will hold, so that what is measured is what is stored."""
    for parameter in model.parameters():
        parameter.copy_(parameter.to(torch.bfloat16))


# --- the folder
def hf_config(shape: ModelShape) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "rms_norm_eps": shape.rms_norm_eps,
        "rope_theta": shape.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": shape.rope_theta},
        "max_position_embeddings": shape.context_len,
        "tie_word_embeddings": True,
        "initializer_range": 0.02,
        "use_cache": True,
        "bos_token_id": END_OF_TEXT_ID,
        "eos_token_id": END_OF_TEXT_ID,
        "pad_token_id": None,
    }


def tokenizer_config(shape: ModelShape) -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "add_bos_token": False,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": shape.context_len,
        "chat_template": CHAT_TEMPLATE,
    }


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def save_checkpoint(out: Path, model: Llama, shape: ModelShape, tokenizer: Tokenizer) -> None:
    """Writes the files of a Hugging Face checkpoint. The tied output matrix is not stored a second time."""
    out.mkdir(parents=True, exist_ok=True)
    weights = {name: weight.to(torch.bfloat16) for name, weight in model.state_dict().items()}
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save(str(out / "tokenizer.json"))
    write_json(out / "config.json", hf_config(shape))
    write_json(out / "tokenizer_config.json", tokenizer_config(shape))
    write_json(out / "generation_config.json", {"bos_token_id": END_OF_TEXT_ID, "eos_token_id": END_OF_TEXT_ID})


def model_card(record: dict[str, Any]) -> str:
    """The README of the folder, every figure in it taken from the run that made the model."""
    return f"""# tiny_python_model

A Llama of {record["parameters"]:,} parameters that completes Python, trained from scratch, tokenizer included, by
`examples/train_tiny_model.py` on the standard library of Python {record["python"]}. It exists so that an engine
can be tried on real weights without a download. It has learnt how Python looks, not what a program should do.

| figure | value |
|---|---|
| text to learn from | {record["train_bytes"]:,} bytes, {record["train_tokens"]:,} tokens |
| text held out, one file in twenty | {record["held_out_bytes"]:,} bytes, {record["held_out_tokens"]:,} tokens |
| training | {record["steps"]:,} steps, {record["tokens_seen"]:,} tokens |
| time | {record["minutes"]:.0f} minutes on {record["threads"]} shared cores, {record["processor"]} |
| held-out loss, nats per token | {record["held_out_nats_per_token"]:.3f} |
| held-out loss, bits per byte | {record["held_out_bits_per_byte"]:.3f} |
| the same from token frequencies alone, nats per token | {record["unigram_nats_per_token"]:.3f} |

The loss is that of the stored bfloat16 weights. All settings are in `training.json`. The text is the work of the Python
Software Foundation and its contributors, under https://docs.python.org/3/license.html.
"""


def processor_name() -> str:
    """The processor's name where the system tells it, else its kind."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


# --- the command line
def add_flags(parser: argparse.ArgumentParser, defaults: ModelShape | TrainingPlan) -> None:
    """One flag for each field: `--hidden-size 192`."""
    for name, default in asdict(defaults).items():
        flag = "--" + name.replace("_", "-")
        parser.add_argument(flag, type=type(default), default=default, help=f"default: {default}")


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    parser = argparse.ArgumentParser(
        description="Train the tiny Python-writing model on the standard library's sources."
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write the checkpoint to")
    parser.add_argument(
        "--source", type=Path, default=stdlib, help="folder of .py files; default: the standard library"
    )
    parser.add_argument("--threads", type=int, default=2, help="default: 2")
    add_flags(parser, ModelShape())
    add_flags(parser, TrainingPlan())
    return parser.parse_args(arguments)


def main(command_line: Sequence[str] | None = None) -> None:
    """Trains and saves the model; without a command line, that of the process."""
    arguments = parse_arguments(command_line)
    shape = ModelShape(**{field.name: getattr(arguments, field.name) for field in fields(ModelShape)})
    plan = TrainingPlan(**{field.name: getattr(arguments, field.name) for field in fields(TrainingPlan)})
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(plan.seed)

    corpus = read_corpus(arguments.source, shape.vocab_size)
    model = Llama(shape)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{len(corpus.train):,} tokens to learn from, {len(corpus.held_out):,} held out, {parameters:,} parameters")

    start = time.monotonic()
    steps = train(model, corpus.train, plan, shape.context_len)
    minutes = (time.monotonic() - start) / 60

    round_to_bfloat16(model)
    nats = total_loss(model, corpus.held_out, shape.context_len)
    record = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "processor": processor_name(),
        "threads": arguments.threads,
        "parameters": parameters,
        "train_bytes": corpus.train_bytes,
        "train_tokens": len(corpus.train),
        "held_out_bytes": corpus.held_out_bytes,
        "held_out_tokens": len(corpus.held_out) - 1,
        "steps": steps,
        "tokens_seen": steps * plan.batch_tokens,
        "minutes": round(minutes, 1),
        "held_out_nats_per_token": round(nats / (len(corpus.held_out) - 1), 4),
        "held_out_bits_per_byte": round(nats / math.log(2) / corpus.held_out_bytes, 4),
        "unigram_nats_per_token": round(unigram_loss(corpus.train, corpus.held_out, shape.vocab_size), 4),
        "shape": asdict(shape),
        "plan": asdict(plan),
    }
    save_checkpoint(arguments.out, model, shape, corpus.tokenizer)
    write_json(arguments.out / "training.json", record)
    (arguments.out / "README.md").write_text(model_card(record), encoding="utf-8")
    print(f"held-out loss {record['held_out_nats_per_token']} nats per token; wrote {arguments.out}")


if __name__ == "__main__":
    main()
