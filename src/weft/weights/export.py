"""Writes a model in another format and proves the copy: nothing is left on disk that would compute or tokenise differently."""

import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from weft.errors import UserError, unknown
from weft.files import atomic_folder
from weft.nn import Model
from weft.tokenizer import Tokenizer
from weft.weights.fidelity import Original, tokenizer_of
from weft.weights.gguf import read_gguf
from weft.weights.gguf_tokenizer import tokenizer_metadata
from weft.weights.gguf_write import TypedValue, write_gguf
from weft.weights.load import Checkpoint, load_weights, open_checkpoint, stored_dtype
from weft.weights.map import stored_tensors
from weft.weights.save import check_replaceable, write_folder
from weft.zoo import llama_gguf
from weft.zoo.native import NATIVE

Progress = Callable[[int, int], None]
DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16, "q8_0": None}
_FILE_TYPES = {"f32": 0, "f16": 1, "q8_0": 7, "bf16": 32}
_TOKENIZER_FILES = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "chat_template*", "vocab.*", "merges.txt", "*.tiktoken",
    "generation_config.json", "additional_chat_templates", "LICENSE*",
)  # fmt: skip


@dataclass(frozen=True)
class Exported:
    """What was written, and how far it is from the original.

    kl            mean KL divergence, in nats, of the copy's next-token distributions from the original's on a fixed probe.
    max_logit_difference  on the same probe.
    llama_cpp     the KL divergence of llama.cpp's predictions from the copy; None where it is not installed or was not asked.
    tokenizer     whether a tokenizer went along (its ids were compared).
    fallbacks     tensors kept in F16 because their rows do not fit Q8_0's blocks.
    """

    path: str
    format: str
    dtype: str
    parameters: int
    bytes: int
    kl: float
    max_logit_difference: float
    llama_cpp: float | None
    tokenizer: bool
    fallbacks: int

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def export(
    source: str | Path, to: Literal["hf", "gguf"], out: str | Path, dtype: str | None = None, progress: Progress | None = None
) -> Exported:
    """Write the model at `source` as a Hugging Face folder or a GGUF file.

    to     "hf" or "gguf" (the Llama family).
    dtype  f32, f16, bf16, or q8_0 for GGUF; None keeps what the weights are stored in (f32 for a GGUF source).

    The copy is written beside `out`, loaded again, and compared with the original: sampled numbers of every tensor, logits on a
    probe, token ids of a set of texts. Only then does it take its place. Raises UserError where it cannot be written or differs.
    """
    if to not in ("hf", "gguf"):
        raise unknown("format", str(to), ("hf", "gguf"))
    checkpoint = open_checkpoint(source)
    if checkpoint.adapter is not None:
        raise UserError(f"{source} is an adapter and no model; work it into its base first: weft merge adapter {source} -o OUT")
    if checkpoint.spec.quant is not None:
        raise UserError(f"{source} is quantised to {checkpoint.spec.quant.type} in Weft's own format; export the model it was made from.")
    kind = _kind(checkpoint, to, dtype)
    if to == "hf" and checkpoint.family is NATIVE:
        raise UserError(
            f"no Hugging Face family holds the model at {checkpoint.path}: it mixes parts as none of them does. Use it with weft as it is."
        )
    out = Path(out)
    tokenizer = tokenizer_of(checkpoint.path)
    compute = stored_dtype(checkpoint)
    exact = DTYPES[kind] == compute or (kind == "f32" and compute != torch.float64)
    compute = torch.float32 if compute == torch.float16 else compute
    model = load_weights(checkpoint, dtype=compute)
    if to == "hf":
        check_replaceable(out)
        with atomic_folder(out) as partial:
            _write_hf(checkpoint, model, partial, tokenizer, kind)
            seen = Original(model, kind, exact)
            del model
            report = seen.compare(partial, compute, tokenizer)
        num_bytes = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
        fallbacks = 0
    else:
        partial = _beside(out)
        try:
            fallbacks = _write_gguf(checkpoint, model, partial, tokenizer, kind, progress)
            seen = Original(model, kind, exact)
            del model
            report = seen.compare(partial, compute, tokenizer)
            os.replace(partial, out)
        finally:
            partial.unlink(missing_ok=True)
        num_bytes = out.stat().st_size
    return Exported(
        path=str(out),
        format=to,
        dtype=kind,
        parameters=checkpoint.spec.num_params(),
        bytes=num_bytes,
        kl=report.kl,
        max_logit_difference=report.max_logit_difference,
        llama_cpp=report.llama_cpp,
        tokenizer=tokenizer is not None,
        fallbacks=fallbacks,
    )


def _kind(checkpoint: Checkpoint, to: str, dtype: str | None) -> str:
    if dtype is None:
        names = {value: name for name, value in DTYPES.items()}
        return names.get(stored_dtype(checkpoint), "f32")
    if dtype not in DTYPES:
        raise unknown("export dtype", dtype, DTYPES)
    if to == "hf" and DTYPES[dtype] is None:
        raise UserError(f"a Hugging Face folder holds f32, f16 or bf16, not {dtype}; give one of these, or --to gguf.")
    return dtype


def _beside(out: Path) -> Path:
    if out.suffix != ".gguf":
        raise UserError(f"{out} does not end in .gguf; give the name of a .gguf file.")
    if out.is_dir():
        raise UserError(f"{out} is a folder; give the name of a .gguf file.")
    return out.with_name(f".{out.stem}.partial.gguf")


def _write_hf(checkpoint: Checkpoint, model: Model, folder: Path, tokenizer: Tokenizer | None, kind: str) -> None:
    write_folder(model, folder, tokenizer, DTYPES[kind], family=checkpoint.family)
    bring_tokenizer(checkpoint, folder)


def bring_tokenizer(checkpoint: Checkpoint, folder: Path) -> None:
    """Copy the tokenizer's own files, where there are any: they say more than we would write."""
    for path in sorted(checkpoint.path.iterdir()) if checkpoint.path.is_dir() else ():
        if any(fnmatchcase(path.name, pattern) for pattern in _TOKENIZER_FILES):
            if path.is_dir():
                shutil.copytree(path, folder / path.name, dirs_exist_ok=True)
            else:
                shutil.copyfile(path, folder / path.name)


def _write_gguf(checkpoint: Checkpoint, model: Model, path: Path, tokenizer: Tokenizer | None, kind: str, progress: Progress | None) -> int:
    """Write the file; returns how many tensors did not fit the type and were kept in F16."""
    spec = checkpoint.spec
    metadata: dict[str, Any] = {
        "general.architecture": "llama",
        "general.name": checkpoint.config.get("general.name") or checkpoint.path.stem,
        **llama_gguf.to_gguf(spec),
        "general.file_type": _FILE_TYPES[kind],
    }
    if kind == "q8_0":
        metadata["general.quantization_version"] = 2
    if checkpoint.is_gguf:
        original = read_gguf(checkpoint.path)
        kept = {key: value for key, value in original.metadata.items() if key.startswith("tokenizer.")}
        metadata |= {key: TypedValue(original.value_types[key], value) for key, value in kept.items()}
    elif tokenizer is not None:
        metadata |= tokenizer_metadata(tokenizer, spec.vocab)
    tensors, fallbacks = [], 0
    for name, tensor in stored_tensors(dict(model.named_parameters()), llama_gguf.rules(spec)):
        matrix = tensor.dim() > 1
        fits = kind != "q8_0" or tensor.shape[-1] % 32 == 0
        fallbacks += matrix and not fits
        tensors.append((name, tuple(tensor.shape), (kind.upper() if fits else "F16") if matrix else "F32", _returning(tensor)))
    factors = llama_gguf.rope_factors(spec)
    if factors is not None:
        tensors.append((llama_gguf.ROPE_FACTORS, (len(factors),), "F32", _returning(torch.tensor(factors))))
    write_gguf(path, metadata, tensors, progress)
    return fallbacks


def _returning(tensor: Tensor) -> Callable[[], Tensor]:
    return lambda: tensor
