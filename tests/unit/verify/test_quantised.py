"""Quantised models pass too, with their drift measured; and the drift is noticed where products are wrong."""

from pathlib import Path

import pytest
import torch
from verify_cases import checks, folder, run, tokenizer

from weft.nn.packed import TiledWeight
from weft.quant import quantize
from weft.spec import Quant
from weft.weights.load import load_model
from weft.weights.save import save_model


@pytest.fixture(scope="module")
def quantised(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    parent = tmp_path_factory.mktemp("quantised")
    made = {}
    for name in ("llama", "ring", "hybrid"):
        model = load_model(folder(name, parent), dtype=torch.float32).model
        for kind in ("int8", "int4"):
            quant = Quant(type="int8") if kind == "int8" else Quant(type="int4", minimum=True)
            made[f"{name}-{kind}"] = save_model(quantize(model, quant), parent / f"{name}-{kind}", tokenizer())
    return made


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("name", ["llama", "ring", "hybrid"])
def test_quantised_models_pass(name: str, kind: str, quantised: dict[str, Path]) -> None:
    report = run(quantised[f"{name}-{kind}"], "auto")
    assert report.passed, [check.as_dict() for check in report.checks]
    drift = {check.name: check.outcome for check in report.checks}["quantised drift"]
    assert drift.status == "pass"
    assert kind in drift.detail


def test_wrong_products_are_noticed(quantised: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    sound = TiledWeight.multiply

    def wrong(self: TiledWeight, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return sound(self, x, bias) * 1.1

    monkeypatch.setattr(TiledWeight, "multiply", wrong)
    assert checks(quantised["hybrid-int8"])["quantised drift"].outcome.status == "fail"
