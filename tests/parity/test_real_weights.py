"""SmolLM2-135M as pulled: the same logits as transformers on the same dequantised weights, and through an export."""

from pathlib import Path

import pytest
import torch
import transformers as hf
from hf_cases import logits_of
from test_gguf import read_by_transformers

from weft.errors import UserError
from weft.weights.export import export
from weft.weights.hub import find_model
from weft.weights.load import load_model
from weft.zoo import ENTRIES
from weft.zoo.family import canonical


@pytest.fixture(scope="module")
def pulled() -> Path:
    try:
        path = find_model("smollm2-135m")
    except UserError:
        pytest.skip("smollm2-135m has not been pulled: weft pull smollm2-135m")
    return path


@pytest.mark.slow
def test_smollm2_equals_transformers(pulled: Path, tmp_path: Path) -> None:
    loaded = load_model(pulled, dtype=torch.float32)
    assert canonical(loaded.spec) == canonical(ENTRIES["smollm2-135m"].spec)
    ids = torch.randint(49152, (2, 33), generator=torch.Generator().manual_seed(0))
    if pulled.is_file():
        theirs = read_by_transformers(pulled)
    else:
        theirs = hf.AutoModelForCausalLM.from_pretrained(pulled, dtype=torch.float32, attn_implementation="eager").eval()
    expected = logits_of(theirs, ids)
    with torch.no_grad():
        given = loaded.model(ids).logits
    # 30 layers and logits up to 34: float32 itself leaves 1e-4 here, and the nearest competitor of a top token is far beyond
    assert (given - expected).abs().max() < 1e-5 * expected.abs().max()
    assert torch.equal(given.argmax(-1), expected.argmax(-1))
    done = export(pulled, "hf", tmp_path / "hf")
    assert (done.kl, done.max_logit_difference, done.tokenizer) == (0, 0, True)
