"""Proves that a copy of a model is that model: its numbers, its predictions and its token ids."""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from weft.errors import UserError
from weft.nn import Model
from weft.spec import ModelSpec
from weft.tokenizer import Tokenizer, load_tokenizer
from weft.weights.gguf import read_gguf
from weft.weights.llama_cpp_check import logits_by_llama_cpp
from weft.weights.load import load_weights, open_checkpoint
from weft.zoo.family import canonical

# How far a rounded copy may be from the original: relative error of each tensor's sampled numbers (root mean square), and mean KL
# divergence of the next-token distributions in nats. Roundings stay a few times below; a wrong layout is far above.
_TENSOR_LIMIT = {"f32": 0.0, "f16": 1e-3, "bf16": 5e-3, "q8_0": 3e-2}
_KL_LIMIT = {"f32": 1e-9, "f16": 1e-2, "bf16": 5e-2, "q8_0": 1e-1}
# llama.cpp keeps keys and values in 16 bits and multiplies Q8_0 in integers.
_LLAMA_CPP_LIMIT = {"f32": 1e-2, "f16": 2e-2, "bf16": 5e-2, "q8_0": 2e-1}
_SAMPLES = 4096

PROBES = (
    "The quick brown fox can't jump over 13 lazy dogs.",
    "  leading and   inner spaces \t tab",
    "line\nbreaks\n\n  and more\r\n",
    "def f(x):\n    return x ** 2  # squared\n",
    "1234567890 3.14159 1,000,000 007",
    "naïve café Ünïcödé ß œ",
    "El veloz murciélago hindú comía feliz cardillo y kiwi",
    "你好，世界。这是一个测试",
    "こんにちは世界",
    "안녕하세요 세계",
    "Привет, мир! Ёлка",
    "مرحبا بالعالم",
    "שלום עולם",
    "नमस्ते दुनिया",
    "🙂👩‍👩‍👧‍👦🏳️‍🌈 emoji",
    "I'LL you're WE'VE don't O'Neil's",
    "a" * 40,
    "<|endoftext|> </s> <s>",
    '{"key": [1, 2.5e-3, null, true]}',
    "\u00a0non\u2009breaking\u3000spaces",
    "x=1;y=2;if(x<y){x+=y;}",
    "https://example.org/a?b=c&d=%20#e",
)


def tokenizer_of(path: Path) -> Tokenizer | None:
    """The tokenizer beside the weights, or None where there is none at all; a damaged one is an error."""
    if path.is_file():
        return load_tokenizer(path) if "tokenizer.ggml.model" in read_gguf(path).metadata else None
    names = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
    return load_tokenizer(path) if any((path / name).is_file() for name in names) else None


@dataclass(frozen=True)
class Distance:
    """How far a copy is from its original: mean KL divergences in nats a token, and the largest difference of a logit.

    llama_cpp is the divergence of llama.cpp's predictions from the copy, or None where llama.cpp was not asked.
    """

    kl: float
    max_logit_difference: float
    llama_cpp: float | None


class Original:
    """What is remembered of a model so that it need not stay in memory beside its copy."""

    def __init__(self, model: Model, kind: str, exact: bool) -> None:
        """`kind` is the type the copy is stored in; `exact` says that it can hold every number of the original."""
        self.kind, self.exact, self.spec = kind, exact, model.spec
        self.samples = _samples(model)
        self.logits = _probe(model)
        if not self.logits.isfinite().all():
            raise UserError("the model's own logits are not finite, so no copy of it can be checked; export a sound checkpoint.")

    def compare(self, path: Path, dtype: torch.dtype, tokenizer: Tokenizer | None) -> "Distance":
        """Load the copy and measure its distance; raises UserError where it is another model."""
        checkpoint = open_checkpoint(path)
        if canonical(checkpoint.spec) != canonical(self.spec):
            raise UserError("the copy was not kept: its description reads back as another model; export it in the other format.")
        copy = load_weights(checkpoint, dtype=dtype)
        tensor_limit, kl_limit = (0.0, 1e-9) if self.exact else (_TENSOR_LIMIT[self.kind], _KL_LIMIT[self.kind])
        for name, given in _samples(copy).items():
            error = float((given - self.samples[name]).norm() / self.samples[name].norm().clamp(min=1e-12))
            if not error <= tensor_limit:
                raise UserError(
                    f"the copy was not kept: {name} differs from the original by {error:.2g} of its size, where {self.kind} allows "
                    f"{tensor_limit:.2g}; try --dtype f32 or bf16."
                )
        logits = _probe(copy)
        kl = _divergence(self.logits, logits)
        if not kl <= kl_limit:
            raise UserError(
                f"the copy was not kept: its predictions diverge from the original's by {kl:.2g} nats a token, where {self.kind} allows "
                f"{kl_limit:.2g}; try --dtype f32 or bf16."
            )
        _compare_tokenizers(tokenizer, tokenizer_of(path))
        return Distance(kl, float((logits - self.logits).abs().max()), self._ask_llama_cpp(path, tokenizer))

    def _ask_llama_cpp(self, path: Path, tokenizer: Tokenizer | None) -> float | None:
        """KL divergence of llama.cpp's predictions from the original's; it loads no file without a vocabulary."""
        given = logits_by_llama_cpp(path, _probe_ids(self.spec)[0]) if path.suffix == ".gguf" and tokenizer is not None else None
        if given is None:
            return None
        kl = _divergence(self.logits[0], given)
        if not kl <= _LLAMA_CPP_LIMIT[self.kind]:
            raise UserError(
                f"the copy was not kept: llama.cpp predicts otherwise from it, by {kl:.2g} nats a token; export with --to hf instead."
            )
        return kl


@torch.no_grad()
def _samples(model: Model) -> dict[str, Tensor]:
    """Up to 4096 numbers of every parameter, float32, at places that depend on its size alone."""
    picked: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        flat = parameter.reshape(-1)
        generator = torch.Generator().manual_seed(flat.numel())
        places = torch.randint(flat.numel(), (min(_SAMPLES, flat.numel()),), generator=generator)
        picked[name] = flat[places].float()
    return picked


@torch.no_grad()
def _probe(model: Model) -> Tensor:
    """Logits [2, T, vocab], float32, of fixed tokens."""
    logits: Tensor = model(_probe_ids(model.spec)).logits.float()
    return logits


def _probe_ids(spec: ModelSpec) -> Tensor:
    return torch.randint(spec.vocab, (2, min(48, spec.context)), generator=torch.Generator().manual_seed(1))


def _divergence(expected: Tensor, given: Tensor) -> float:
    """Mean over positions of KL(expected || given), in nats; NaN where a logit is not finite."""
    p, q = expected.double().log_softmax(-1), given.double().log_softmax(-1)
    value = float((p.exp() * (p - q)).sum(-1).mean())
    return value if math.isnan(value) else max(value, 0.0)


def _compare_tokenizers(original: Tokenizer | None, copy: Tokenizer | None) -> None:
    if original is None:
        return
    if copy is None:
        raise UserError("the copy was not kept: its tokenizer did not come along; put the tokenizer's files beside the weights.")
    for text in PROBES:
        for special in (False, True):
            if original.encode(text, special=special) != copy.encode(text, special=special):
                raise UserError(
                    f"the copy was not kept: its tokenizer gives other ids than the original's for {text!r}; export with --to hf instead."
                )
    if original.bos_id != copy.bos_id or original.eos_id != copy.eos_id:
        raise UserError("the copy was not kept: its tokenizer has other BOS or EOS ids; export with --to hf instead.")
