"""Text to ids and back: training, loading every format in use, chat templates. Nothing here needs torch."""

from weft.tokenizer.gguf_vocab import tokenizer_from_gguf
from weft.tokenizer.load import load_tokenizer
from weft.tokenizer.stream import StreamDecoder
from weft.tokenizer.tokenizer import Settings, Tokenizer

__all__ = ["Settings", "StreamDecoder", "Tokenizer", "load_tokenizer", "tokenizer_from_gguf"]
