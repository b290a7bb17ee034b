"""Every size, rate and share of the job, in one place. Importable without torch."""

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class ModelSettings:
    """A small Llama (Touvron et al. 2023): RMSNorm, rotary positions, SwiGLU, no biases, embedding and head tied."""

    dim: int = 256
    layers: int = 6
    heads: int = 4
    kv_heads: int = 4
    hidden: int = 704
    context: int = 512

    def spec(self, vocab: int) -> dict[str, Any]:
        """The model spec as a mapping."""
        mixer = {"type": "attention", "heads": self.heads, "kv_heads": self.kv_heads, "rope": {"base": 10000.0}}
        channel = {"type": "gated", "hidden": self.hidden, "activation": "silu"}
        return {
            "vocab": vocab,
            "dim": self.dim,
            "context": self.context,
            "norm": {"type": "rms"},
            "tie_embeddings": True,
            "layers": [{"repeat": self.layers, "mixer": mixer, "channel": channel}],
        }


@dataclass(frozen=True)
class Tokens:
    """The vocabulary: at most `vocab` entries, fewer for a corpus of under `bytes_per_entry` bytes an entry, never under `least`."""

    vocab: int = 4096
    bytes_per_entry: int = 400
    least: int = 512
    split: str = "gpt2"

    def vocab_for(self, train_bytes: int) -> int:
        return max(self.least, min(self.vocab, train_bytes // self.bytes_per_entry // 64 * 64))


@dataclass(frozen=True)
class Pretraining:
    """Rows of `length` tokens that run on over file ends; Muon for matrices, AdamW for the embedding, a rate that falls to zero."""

    rows: int = 16
    length: int = 256
    optim: str = "muon"
    lr: float = 4e-3
    matrix_lr: float = 5e-3
    weight_decay: float = 0.1
    schedule: str = "linear"
    final: float = 0.0
    warmup: int = 20


@dataclass(frozen=True)
class FineTuning:
    """Pairs in rows of whole pairs, each seeing itself alone.

    share       of the pretraining minutes.      max_prompt, max_body   characters of a pair's halves.
    fewest      pairs below which there is nothing to learn from.
    """

    share: float = 0.25
    rows: int = 16
    length: int = 256
    lr: float = 1e-3
    matrix_lr: float = 1e-3
    max_prompt: int = 600
    max_body: int = 1000
    fewest: int = 50


@dataclass(frozen=True)
class Reinforcing:
    """GRPO with the parser as judge, on prompts of the training side whose function has parameters to read.

    share    of the pretraining minutes.      rows, samples   prompts of a step, and answers to each.
    least_seconds   below which there is no time for the few steps that would be timed.     fewest   prompts, likewise.
    parses   what a body is worth that parses and reads no parameter.      beta   price of a nat of divergence from the fine-tuned model.
    """

    share: float = 0.6
    rows: int = 8
    samples: int = 16
    length: int = 256
    max_tokens: int = 128
    lr: float = 2e-4
    beta: float = 0.04
    parses: float = 0.05
    fewest: int = 50
    least_seconds: float = 20.0


@dataclass(frozen=True)
class Judging:
    """Sampling of held-out functions, the same before and after fine-tuning and reinforcement."""

    samples: int = 128
    max_prompt: int = 300  # characters
    max_tokens: int = 160
    temperature: float = 0.7
    top_p: float = 0.95


@dataclass(frozen=True)
class Settings:
    """The job. `steps` in place of minutes makes a run of fixed length, for tests."""

    heldout: float = 0.06
    tokens: Tokens = Tokens()
    model: ModelSettings = ModelSettings()
    pretraining: Pretraining = Pretraining()
    fine_tuning: FineTuning = FineTuning()
    reinforcing: Reinforcing = Reinforcing()
    judging: Judging = Judging()
    eval_batches: int = 2
    save_minutes: float = 0.5
    steps: int | None = None
    compile: bool = True

    def facts(self) -> dict[str, Any]:
        return asdict(self)
