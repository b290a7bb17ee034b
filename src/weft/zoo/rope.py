"""Rotary positions in config.json: `rope_theta` with `rope_scaling` (transformers 4) or `rope_parameters` (transformers 5)."""

import math
from typing import Any

from weft.errors import UserError, nearest
from weft.spec import LinearScaling, Llama3Scaling, Rope, YarnScaling
from weft.zoo.config import ConfigReader

_KINDS = ("default", "linear", "llama3", "yarn")
_SUBKEYS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": (
        "factor",
        "original_max_position_embeddings",
        "beta_fast",
        "beta_slow",
        "attention_factor",
        "mscale",
        "mscale_all_dim",
    ),
}


def read_rope(reader: ConfigReader, context: int, sharpens: bool = False) -> Rope:
    """The rotation that a config describes; `context` stands in where a scaling does not name the original length.

    sharpens  the family scales scores by YaRN's mscale_all_dim (DeepSeek); others use it for the factor on cosines and sines alone.

    Raises UserError for a scaling that Weft does not compute (dynamic, longrope and others) and for keys it does not know.
    """
    key, given = _parameters(reader)
    base = reader.number("rope_theta", 10000.0)
    original = reader.get("original_max_position_embeddings")
    kinds = {str(given.pop(word)) for word in ("rope_type", "type") if given.get(word) is not None}
    kind = kinds.pop() if kinds else "default"
    if kinds:
        raise reader.refuse(key, "type and rope_type differ; keep one of them.")
    if kind not in _KINDS:
        raise reader.refuse(key, f"Weft scales rotary positions by {', '.join(_KINDS)}; '{kind}' is none of these.")
    if given.pop("partial_rotary_factor", 1) not in (1, None):
        raise reader.refuse(key, "Weft rotates whole heads; partial_rotary_factor must be 1.")
    if given.pop("truncate", True) not in (True, None):
        raise reader.refuse(key, "Weft computes YaRN with truncate: true only.")
    if original is not None and kind in ("llama3", "yarn"):
        given["original_max_position_embeddings"] = original
    given = {name: value for name, value in given.items() if value is not None}
    for name, value in given.items():
        if name not in (*_SUBKEYS[kind], "rope_theta"):
            raise reader.refuse(
                key, f"{name} is not a key of {kind} scaling.{nearest(name, _SUBKEYS[kind])} Remove it if it changes nothing."
            )
        if not _is_positive(value):
            raise reader.refuse(key, f"{name} must be a positive number.")
    base = given.pop("rope_theta", base)
    scaling = _scaling(reader, key, kind, given, context)
    if sharpens and isinstance(scaling, YarnScaling):
        scaling = YarnScaling(**{**scaling.model_dump(), "mscale_all_dim": given.get("mscale_all_dim")})
    return Rope(base=base, scaling=scaling)


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value > 0


def _parameters(reader: ConfigReader) -> tuple[str, dict[str, Any]]:
    """The scaling's own dictionary and the key it stands under; both styles in one file must agree."""
    new, old = reader.get("rope_parameters"), reader.get("rope_scaling")
    for key, value in (("rope_parameters", new), ("rope_scaling", old)):
        if value is not None and not isinstance(value, dict):
            raise reader.refuse(key, "it must be a mapping or null.")
    if any(isinstance(value, dict) for value in (new or {}).values()):
        raise reader.refuse("rope_parameters", "Weft has one rotation for all layers; a rotation a layer type is not supported.")
    if new is not None and old is not None and any(new.get(key) != value for key, value in old.items() if key != "type"):
        raise reader.refuse("rope_scaling", f"rope_parameters says {new!r}; keep one of them.")
    return ("rope_parameters", dict(new)) if new is not None else ("rope_scaling", dict(old or {}))


def _scaling(
    reader: ConfigReader, key: str, kind: str, given: dict[str, Any], context: int
) -> LinearScaling | Llama3Scaling | YarnScaling | None:
    if kind == "default":
        return None
    original = given.get("original_max_position_embeddings") or context
    factor = given.get("factor")
    if kind == "yarn" and factor is None:
        factor = context / original
    if factor is None:
        raise reader.refuse(key, f"{kind} scaling needs a factor; add it.")
    if kind == "linear":
        return LinearScaling(factor=factor)
    if kind == "llama3":
        for name in ("low_freq_factor", "high_freq_factor"):
            if given.get(name) is None:
                raise reader.refuse(key, f"llama3 scaling needs {name}; add it.")
        return Llama3Scaling(
            factor=factor,
            low_freq_factor=given["low_freq_factor"],
            high_freq_factor=given["high_freq_factor"],
            original_context=original,
        )
    return YarnScaling(
        factor=factor,
        original_context=original,
        beta_fast=given.get("beta_fast") or 32.0,
        beta_slow=given.get("beta_slow") or 1.0,
        attention_factor=_yarn_attention(given, factor),
    )


def _yarn_attention(given: dict[str, Any], factor: float) -> float | None:
    """The factor on cosines and sines; None is the paper's own."""
    if given.get("attention_factor") is not None:
        return float(given["attention_factor"])
    numerator, denominator = given.get("mscale"), given.get("mscale_all_dim")
    if not (numerator and denominator):
        return None
    return yarn_attention(factor, numerator) / yarn_attention(factor, denominator)


def yarn_attention(factor: float, scale: float = 1.0) -> float:
    """0.1 scale ln(factor) + 1 (Peng et al. 2023, equation 22); 1 where nothing is stretched."""
    return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0


def write_rope(rope: Rope) -> dict[str, Any]:
    """The config keys of a rotation, in the style that transformers 4 and 5 and other tools all read."""
    return {"rope_theta": rope.base, "rope_scaling": _written_scaling(rope)}


def _written_scaling(rope: Rope) -> dict[str, Any] | None:
    scaling = rope.scaling
    if scaling is None:
        return None
    if isinstance(scaling, LinearScaling):
        return {"rope_type": "linear", "factor": scaling.factor}
    if isinstance(scaling, Llama3Scaling):
        return {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_context,
        }
    if not isinstance(scaling, YarnScaling):
        raise UserError(f"a rotary scaling of type '{scaling.type}' has no word in config.json; save with another one.")
    written = {
        "rope_type": "yarn",
        "factor": scaling.factor,
        "original_max_position_embeddings": scaling.original_context,
        "beta_fast": scaling.beta_fast,
        "beta_slow": scaling.beta_slow,
    }
    return written | _written_attention(scaling)


def _written_attention(scaling: YarnScaling) -> dict[str, float]:
    """YaRN's factors. Where scores are scaled, `mscale` says of the rotation what `attention_factor` says, for tools that know it alone."""
    given, all_dim = scaling.attention_factor, scaling.mscale_all_dim
    exact = {} if given is None or (given == 1.0 and all_dim is not None) else {"attention_factor": given}
    if all_dim is None:
        return exact
    sharpness = yarn_attention(scaling.factor, all_dim)
    if given is None or sharpness == 1.0:
        return {**exact, "mscale_all_dim": all_dim}
    mscale = all_dim if given == 1.0 else (given * sharpness - 1.0) / (0.1 * math.log(scaling.factor))
    return {**exact, "mscale": mscale, "mscale_all_dim": all_dim} if mscale > 0 else {**exact, "mscale_all_dim": all_dim}
