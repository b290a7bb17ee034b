"""One call for every kind of tokenizer file."""

from collections.abc import Callable
from pathlib import Path

from weft.errors import UserError
from weft.tokenizer.gguf_vocab import tokenizer_from_gguf
from weft.tokenizer.huggingface import from_tokenizer_json, from_vocab_and_merges, from_vocab_txt, read_json
from weft.tokenizer.llama2c import from_llama2c
from weft.tokenizer.sentencepiece import from_sentencepiece
from weft.tokenizer.tiktoken import from_tiktoken, looks_like_ranks
from weft.tokenizer.tokenizer import Tokenizer

_ALLOWED = (
    "a folder with tokenizer.json, tokenizer.model, vocab.json and merges.txt, or vocab.txt; or a tokenizer.json, .tiktoken, "
    "SentencePiece .model, llama2.c .bin, vocab.txt or .gguf file"
)
_SUFFIXES = (".json", ".tiktoken", ".model", ".bin", ".txt", ".gguf")


def load_tokenizer(path: str | Path, pattern: str | None = None) -> Tokenizer:
    """Load a tokenizer from a folder or a file of any of the formats in use, or from a pulled model.

    path      the name of a pulled model, a folder in Hugging Face's layout, or a tokenizer.json, vocab.json (with its merges.txt),
              vocab.txt, .tiktoken, SentencePiece .model, llama2.c tokenizer.bin or .gguf file. What exists as a path is taken as one.
    pattern   the regular expression that a tiktoken vocabulary of one's own cuts text with.
    Raises UserError where there is nothing, or nothing whole, to load.
    """
    name = str(path)
    path = Path(path).expanduser()
    if not path.exists():
        if path.is_absolute() or name.startswith(".") or path.suffix in _SUFFIXES:
            raise UserError(f"there is no tokenizer at {path}; give {_ALLOWED}.")
        from weft.weights.hub import find_model

        path = find_model(name)
    return _load_folder(path, pattern) if path.is_dir() else _load_file(path, pattern)


def _load_folder(folder: Path, pattern: str | None) -> Tokenizer:
    for name in ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt"):
        if (folder / name).is_file():
            return _load_file(folder / name, pattern)
    for ending in ("*.tiktoken", "*.model", "*.gguf"):
        found = sorted(folder.glob(ending))
        if len(found) == 1:
            return _load_file(found[0], pattern)
    raise UserError(f"{folder} has no tokenizer in it; give {_ALLOWED}.")


def _load_file(path: Path, pattern: str | None) -> Tokenizer:
    with open(path, "rb") as file:
        head = file.read(512)
    if head.startswith(b"GGUF"):
        return _from_gguf(path)
    if path.suffix == ".tiktoken" or (path.suffix == ".model" and looks_like_ranks(head)):
        return from_tiktoken(path, pattern)
    loaders: dict[str, Callable[[Path], Tokenizer]] = {
        ".model": from_sentencepiece,
        ".bin": from_llama2c,
        ".txt": from_vocab_txt,
        ".json": _from_json,
        ".gguf": _from_gguf,
    }
    if path.suffix not in loaders:
        raise UserError(f"{path} is no tokenizer file that can be told by its name; give {_ALLOWED}.")
    return loaders[path.suffix](path)


def _from_json(path: Path) -> Tokenizer:
    if "vocab" in path.stem and not isinstance(read_json(path, "vocabulary").get("model"), dict):
        merges = path.with_name(path.name.replace("vocab", "merges")).with_suffix(".txt")
        if not merges.is_file():
            raise UserError(f"{path} is a vocabulary without its merges; put {merges.name} beside it, or give a tokenizer.json.")
        return from_vocab_and_merges(path, merges)
    return from_tokenizer_json(path)


def _from_gguf(path: Path) -> Tokenizer:
    from weft.weights.gguf import read_gguf

    return tokenizer_from_gguf(read_gguf(path).metadata)
