"""SmolLM2-135M continues 20 prompts as transformers does, from the same dequantised weights, in float32."""

from pathlib import Path

import pytest
import torch

from weft.engine import Engine, Request, SamplingParams
from weft.errors import UserError
from weft.tokenizer import load_tokenizer
from weft.weights.hub import find_model
from weft.weights.load import load_model
from weft.weights.save import save_model

TOKENS = 64
GAP = 1e-4
PROMPTS = [
    "The capital of France is",
    "Once upon a time, there was a little girl named Lily.",
    "def fibonacci(n):\n    ",
    "Water boils at",
    "The three laws of thermodynamics are",
    "In the beginning",
    "To be, or not to be,",
    "import numpy as np\n\n",
    "Dear Sir or Madam,\n\nI am writing to",
    "Q: What is 17 + 25?\nA:",
    "El gato está",
    "1, 1, 2, 3, 5, 8,",
    "The best way to learn a language is",
    "Photosynthesis is the process by which",
    "<|im_start|>user\nName three colours.<|im_end|>\n<|im_start|>assistant\n",
    "A",
    "   indented text\n\n\n",
    "Ünïcödé → ∑ 🙂",
    "She opened the letter, and read it twice. " * 12,
    "SELECT name FROM users WHERE",
]


@pytest.fixture(scope="module")
def pulled() -> Path:
    try:
        return find_model("smollm2-135m")
    except UserError:
        pytest.skip("smollm2-135m has not been pulled: weft pull smollm2-135m")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_greedy_ids_equal_transformers(pulled, tmp_path):
    hf = pytest.importorskip("transformers")
    loaded, tokenizer = load_model(pulled, dtype=torch.float32), load_tokenizer(pulled)
    theirs = hf.AutoModelForCausalLM.from_pretrained(save_model(loaded.model, tmp_path / "hf"), dtype=torch.float32).eval()
    prompts = [tokenizer.encode(text, special=True) for text in PROMPTS]
    params = SamplingParams(max_tokens=TOKENS, ignore_eos=True, top_logprobs=2)
    results = Engine(loaded.model, tokenizer, rows=10).generate([Request(prompt, params) for prompt in prompts])
    equal = 0
    for text, prompt, result in zip(PROMPTS, prompts, results, strict=True):
        options = {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        with torch.no_grad():
            want = theirs.generate(torch.tensor([prompt]), **options)[0, len(prompt) :].tolist()
        ids = list(result.ids)
        equal += ids == want
        if ids != want:
            at = next(place for place in range(TOKENS) if ids[place] != want[place])
            (_, first), (_, second) = result.logprobs[at].top
            assert first - second < GAP, f"{text!r} differs at token {at}, where the two likeliest are {first - second:.6f} apart"
    print(f"{equal} of {len(PROMPTS)} equal for {TOKENS} tokens")
    assert equal == len(PROMPTS)
    assert len({result.ids for result in results}) > 15, "control: the texts differ from one another"
