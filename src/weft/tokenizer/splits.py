"""Where text is cut before byte-level BPE: the regular expressions of published tokenizers, by the name GGUF files give them."""

from collections.abc import Sequence
from dataclasses import dataclass

from tokenizers import Regex, decoders, normalizers, pre_tokenizers

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"

# Radford et al. 2019, section 2.2.
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# GPT-4's cl100k_base, and Llama 3: contractions in any case, digits in threes, punctuation with the line breaks after it.
CL100K = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + _SPACES
# Qwen 2: as above with every digit by itself.
QWEN2 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + _SPACES
_QWEN35 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|" + _SPACES
_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
_CASED = (rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]*[{_LOWER}]+", rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]+[{_LOWER}]*")
# GPT-4o's o200k_base: a capital begins a new piece.
O200K = "|".join([*(f"{part}{_CONTRACTIONS}?" for part in _CASED), r"\p{N}{1,3}", r" ?[^\s\p{L}\p{N}]+[\r\n/]*", _SPACES])
_TEKKEN = "|".join([*_CASED, r"\p{N}", r" ?[^\s\p{L}\p{N}]+[\r\n/]*", _SPACES])

_DIGIT = r"\p{N}"
_CJK = r"[一-龥ࠀ-一가-퟿]+"
# The letters of DeepSeek's first vocabulary, in hexadecimal: some of them have a canonical form that an editor might put in their place.
_DEEPSEEK_LETTERS = (
    "41-5A 61-7A B5 C0-D6 D8-F6 F8-1BA 1BC-1BF 1C4-293 295-2AF 370-373 376 377 37B-37D 37F 386 388-38A 38C 38E-3A1 3A3-3F5 "
    "3F7-481 48A-52F 531-556 10A0-10C5 13A0-13F5 13F8-13FD 1C90-1CBA 1CBD-1CBF 1D00-1D2B 1D6B-1D77 1D79-1D9A 1E00-1F15 1F18-1F1D "
    "1F20-1F45 1F48-1F4D 1F50-1F57 1F59 1F5B 1F5D 1F5F-1F7D 1F80-1FB4 1FB6-1FBC 1FBE 1FC2-1FC4 1FC6-1FCC 1FD0-1FD3 1FD6-1FDB "
    "1FE0-1FEC 1FF2-1FF4 1FF6-1FFC 2102 2107 210A-2113 2115 2119-211D 2124 2126 2128 212A-212D 212F-2134 2139 213C-213F "
    "2145-2149 214E 2183 2184 2C00-2C7B 2C7E-2CE4 2CEB-2CEE 2CF2 2CF3 A640-A66D A680-A69B A722-A76F A771-A787 A78B-A78E "
    "AB70-ABBF FB00-FB06 FB13-FB17 FF21-FF3A FF41-FF5A 10400-1044F 104B0-104D3 104D8-104FB 10C80-10CB2 10CC0-10CF2 118A0-118DF "
    "1E900-1E943"
)


def _character_class(ranges: str) -> str:
    ends = [[chr(int(end, 16)) for end in part.split("-")] for part in ranges.split()]
    return "[" + "".join("-".join(pair) for pair in ends) + "]"


_ASCII_PUNCTUATION = r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~]"


_TRAINING = {"gpt2": (GPT2, r" ?\p{N}+"), "llama3": (CL100K, r"\p{N}{1,3}"), "qwen2": (QWEN2, r"\p{N}")}
TRAINING_SPLITS = tuple(_TRAINING)


def training_pattern(split: str, digits: int | None = None) -> str:
    """The expression that a new vocabulary cuts with.

    split    `gpt2`, `llama3` or `qwen2` (one of `TRAINING_SPLITS`).
    digits   digits that stay together at most, 0 for any number; None for what the split does: any number with a space before them
             in `gpt2`, three in `llama3`, one in `qwen2`.
    """
    pattern, numbers = _TRAINING[split]
    if digits is None:
        return pattern
    return pattern.replace(f"|{numbers}|", r"|\p{N}+|" if digits == 0 else rf"|\p{{N}}{{1,{digits}}}|")


@dataclass(frozen=True)
class Split:
    """Expressions applied one after the other, each cutting its matches out of the pieces that the one before left.

    whole_words   a piece that is a token is taken as it is, merges or not (Llama 3's `ignore_merges`).
    adds_bos      the vocabularies of this name begin a text with BOS unless the file says otherwise.
    nfc           text is composed (Unicode NFC) first.
    """

    patterns: tuple[str, ...]
    whole_words: bool = False
    adds_bos: bool = False
    nfc: bool = False

    def pre_tokenizer(self) -> pre_tokenizers.PreTokenizer:
        return byte_level_split(self.patterns)

    def normalizer(self) -> normalizers.Normalizer | None:
        return normalizers.NFC() if self.nfc else None


def byte_level_split(patterns: Sequence[str]) -> pre_tokenizers.PreTokenizer:
    """Cut at the matches of each expression in turn, then write bytes in GPT-2's alphabet."""
    cuts = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
    return pre_tokenizers.Sequence([*cuts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def byte_level_decoder() -> decoders.Decoder:
    return decoders.ByteLevel()


_GPT2, _DIGITS_GPT2 = Split((GPT2,)), Split((_DIGIT, GPT2))
_LLAMA3 = Split((CL100K,), whole_words=True, adds_bos=True)
_QWEN2 = Split((QWEN2,), nfc=True)

# `tokenizer.ggml.pre` -> how that vocabulary cuts. Names that share a vocabulary share a row.
GGUF_SPLITS: dict[str, Split] = {
    "default": Split((r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
    **dict.fromkeys(("gpt-2", "phi-2", "gigachat", "jina-es", "jina-de", "jina-v2-es", "jina-v2-de", "mellum", "modern-bert"), _GPT2),
    **dict.fromkeys(("jina-v1-en", "jina-v2-code", "roberta-bpe", "jais", "exaone4", "trillion", "a.x-4.0"), _GPT2),
    # GPT-NeoX's vocabulary
    **dict.fromkeys(("mpt", "olmo"), Split((GPT2,), nfc=True)),
    **dict.fromkeys(("starcoder", "refact", "command-r", "smollm", "codeshell", "exaone", "minerva-7b"), _DIGITS_GPT2),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "lfm2"), _LLAMA3),
    **dict.fromkeys(("dbrx", "smaug-bpe", "chatglm-bpe"), Split((CL100K,))),
    **dict.fromkeys(("glm4",), Split((CL100K,), whole_words=True)),
    **dict.fromkeys(("qwen2", "megrez"), _QWEN2),
    **dict.fromkeys(("stablelm2", "deepseek-r1-qwen", "hunyuan", "grok-2"), Split((QWEN2,))),
    "qwen35": Split((_QWEN35,), nfc=True),
    **dict.fromkeys(("gpt-4o", "llama4"), Split((O200K,))),
    "tekken": Split((_TEKKEN,), whole_words=True, adds_bos=True),
    "falcon": Split((r"[\p{P}\$\+<=>\^~\|`]+", GPT2, "[0-9][0-9][0-9]")),
    **dict.fromkeys(("poro-chat", "bloom", "gpt3-finnish"), Split((r" ?[^(\s|.,!?…。，、।۔،)]+",))),
    "viking": Split((r" ?[^(\s|.,!?…。，、।۔،)]+", _DIGIT)),
    "deepseek-coder": Split((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CJK, _DIGIT)),
    "deepseek-llm": Split(
        (r"[\r\n]", r"\s?" + _character_class(_DEEPSEEK_LETTERS) + "+", r"\s?[!-/:-~！-／：-～‘-‟　-。]+", r"\s+$", _CJK, _DIGIT)
    ),
    "deepseek-v3": Split(
        (
            r"\p{N}{1,3}",
            "[一-龥぀-ゟ゠-ヿ]+",
            _ASCII_PUNCTUATION + r"[A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|" + _SPACES,
        )
    ),
}
