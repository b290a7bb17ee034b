"""A small model folder to generate with, and the command line run inside the test's process."""

import io
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from weft.cli.main import main
from weft.nn import build
from weft.spec import model_spec
from weft.tokenizer.train import train_tokenizer
from weft.weights.save import save_model

STORY = "".join(f"Line {i}: the quick brown fox jumps over the lazy dog, {i} times in a row.\n" for i in range(60))
MESSAGE = "<{{ message.role }}>{{ message.content }}\n"
TEMPLATE = "{% for message in messages %}" + MESSAGE + "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"


def make_model(folder: Path, chat: bool = True, context: int = 96, vocab: int = 300) -> Path:
    """A Llama-shaped model with random weights, large enough for texts that differ; with `chat`, a chat template."""
    tokenizer = train_tokenizer("bpe", [STORY], vocab)
    if chat:
        tokenizer.settings = replace(tokenizer.settings, chat_templates={"default": TEMPLATE})
    layer = {"repeat": 2, "mixer": {"type": "attention", "heads": 4, "kv_heads": 2, "rope": {}}, "channel": {"type": "gated", "hidden": 64}}
    sizes = {"vocab": tokenizer.vocab_size, "dim": 32, "context": context, "init_std": 0.3, "tie_embeddings": False}
    model = build(model_spec({**sizes, "norm": {"type": "rms"}, "layers": [layer]}), seed=2)
    return save_model(model, folder, tokenizer)


class Weft:
    """Runs `weft` with arguments and bytes on stdin: (exit code, stdout, stderr)."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
        self.monkeypatch, self.capfd = monkeypatch, capfd

    def __call__(self, *arguments: str, stdin: bytes = b"") -> tuple[int, str, str]:
        self.monkeypatch.setattr(sys, "argv", ["weft", *map(str, arguments)])
        self.monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        self.capfd.readouterr()
        code = 0
        try:
            main()
        except SystemExit as end:
            code = int(end.code or 0)
        out, err = self.capfd.readouterr()
        return code, out, err
