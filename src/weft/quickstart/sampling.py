"""Text from the model: held-out functions for the judge, and three samples to look at."""

import hashlib
import string
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from weft.device import pick_device
from weft.engine import Engine, Request, SamplingParams
from weft.quickstart.judge import judge
from weft.quickstart.options import Options
from weft.quickstart.pairs import Pair
from weft.quickstart.preparing import Material
from weft.quickstart.report import share_facts
from weft.quickstart.reporter import Reporter
from weft.quickstart.settings import Settings
from weft.rewards.python import take_body
from weft.tokenizer import load_tokenizer
from weft.weights.load import load_model

SAMPLES = (
    'def is_even(number):\n    """Return True if number is even."""',
    'def read_lines(path, encoding="utf-8"):\n    """Read a text file and return a list of its lines."""',
    'def get_name(self):\n    """Return the name of this object."""',
)
NUM_SAMPLES = 3
PROMPT_WORDS = 8
ROWS = 64  # sequences generated at a time
DEDENTS = tuple("\n" + character for character in string.printable if not character.isspace())  # a line that begins at the left margin


def choose_prompts(pairs: Sequence[Pair], settings: Settings) -> list[str]:
    """Signatures and docstrings of at most `samples` held-out functions, drawn by hash, in the order of their hashes."""
    fitting = sorted({pair.prompt for pair in pairs if len(pair.prompt) <= settings.judging.max_prompt})
    return sorted(fitting, key=lambda prompt: hashlib.sha256(prompt.encode()).digest())[: settings.judging.samples]


def judge_model(
    heldout: Sequence[Pair], folder: Path, options: Options, settings: Settings, reporter: Reporter, note: str
) -> dict[str, Any] | None:
    """Sample the body of every chosen function and parse it; None where there is no function to ask for."""
    prompts = choose_prompts(heldout, settings)
    if not prompts:
        return None
    texts = continue_texts(folder, prompts, options, settings, reporter, note)
    return share_facts(judge(prompts, [text for text, _ in texts], [ended for _, ended in texts]))


def sample_texts(material: Material, folder: Path, options: Options, settings: Settings, reporter: Reporter) -> list[str]:
    """Three samples, prompt and continuation: functions, or for other corpora what follows the beginning of held-out files."""
    if material.corpus.kind == "python":
        texts = continue_texts(folder, SAMPLES, options, settings, reporter, "three samples")
        return [prompt + take_body(text)[0] for prompt, (text, _) in zip(SAMPLES, texts, strict=True)]
    beginnings = take_beginnings("".join(file.text for file in material.split.heldout))
    texts = continue_texts(folder, beginnings, options, settings, reporter, "samples", stop=())
    return [beginning + text for beginning, (text, _) in zip(beginnings, texts, strict=True)]


def take_beginnings(text: str) -> list[str]:
    """The first words of the lines that stand at the beginning and at each third of a text, as many as there are."""
    found = []
    for part in range(NUM_SAMPLES):
        start = text.find("\n", part * len(text) // NUM_SAMPLES) + 1 if part else 0
        words = text[start : start + 400].split()[:PROMPT_WORDS]
        if words:
            found.append(" ".join(words))
    return found


def continue_texts(
    folder: Path,
    prompts: Sequence[str],
    options: Options,
    settings: Settings,
    reporter: Reporter,
    note: str,
    stop: Sequence[str] = DEDENTS,
) -> list[tuple[str, bool]]:
    """A continuation of each prompt, and whether it ended by itself: at an end token, or before one of the `stop` texts.

    Prompt number i is sampled with seed + i, whatever is sampled beside it: the same prompts draw the same numbers from every model.
    """
    chosen, device = settings.judging, pick_device(options.device)
    requests = [
        Request(
            prompt,
            SamplingParams(chosen.max_tokens, chosen.temperature, top_p=chosen.top_p, seed=options.seed + number, stop=tuple(stop)),
        )
        for number, prompt in enumerate(prompts)
    ]
    engine = Engine(load_model(folder, device).model, load_tokenizer(folder), rows=min(len(prompts), ROWS))
    results: dict[int, tuple[str, bool]] = {}
    for event in engine.stream(requests):
        if event.result is not None:
            results[event.request] = (event.result.text, event.result.finish_reason == "stop")
            reporter.advance(len(results), len(prompts), note)
    return [results[number] for number in sorted(results)]
