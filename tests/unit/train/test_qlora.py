"""Adapters upon weights in few bits: trained, saved, resumed; and what cannot be is refused."""

import pytest
import torch
import train_cases as cases
from safetensors.torch import load_file

from weft.errors import UserError
from weft.nn import build
from weft.nn.packed import PackedWeight
from weft.nn.packed_nf4 import DoubleNF4Weight
from weft.quant import quantize
from weft.spec import Quant
from weft.tokenizer import load_tokenizer
from weft.train.assemble import open_job, run_recipe
from weft.train.history import read_metrics
from weft.train.objective import POLICY
from weft.train.parallel import World
from weft.train.plan import make_plan
from weft.train.recipe import override, recipe
from weft.weights.save import save_model

SIZES = {"dim": 64, "vocab": 258, "layers": [{**cases.LLAMA["layers"][0], "channel": {"type": "gated", "hidden": 128}}]}


@pytest.fixture
def inputs(tmp_path):
    (tmp_path / "a.txt").write_text("one two three four five\n\n" * 120)
    tokenizer = load_tokenizer(cases.save_tokenizer(tmp_path / "tok"))
    save_model(build(cases.spec_of(**SIZES), seed=1), tmp_path / "base", tokenizer)
    return tmp_path


def qlora(inputs, out, *overrides):
    data = {
        "model": str(inputs / "base"),
        "data": str(inputs / "a.txt"),
        "out": str(inputs / out),
        "steps": 20,
        "adapter": {"type": "lora", "rank": 4},
        "quantize": "nf4",
        "batch": {"rows": 4},
        "optim": {"lr": 1e-2, "warmup": 2},
        "log": {"plot": False},
    }
    return recipe(override(data, overrides))


def test_formats_by_name():
    least = {"model": "gpt2", "data": "x", "out": "y", "steps": 1, "adapter": "lora"}
    assert recipe({**least, "quantize": "nf4"}).quantize == Quant(type="nf4", double=True)
    assert recipe({**least, "quantize": "int4"}).quantize == Quant(type="int4", minimum=True)
    assert recipe({**least, "quantize": {"type": "nf4"}}).quantize == Quant(type="nf4")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_adapter_learns_upon_packed_weights(inputs, dtype):
    card = run_recipe(qlora(inputs, "run", f"dtype={dtype}"))
    rows = [row["loss"] for row in read_metrics(inputs / "run/metrics.jsonl") if "loss" in row]
    assert rows[-1] < rows[0] - 0.3
    assert card["model"]["spec"]["quant"] == {"type": "nf4", "double": True}
    assert (inputs / "run/last/adapter_model.safetensors").is_file()
    assert not (inputs / "run/last/model.safetensors").exists()


def test_only_the_adapter_has_gradients_and_the_base_its_codes(inputs):
    job = open_job(make_plan(qlora(inputs, "run")), None, World())
    model = job.models[POLICY]
    packed = [module for module in model.modules() if isinstance(module, PackedWeight)]
    assert sum(isinstance(module, DoubleNF4Weight) for module in packed) == len(packed) - 1 == 8
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained
    assert all(".adapter." in name for name in trained)


def test_a_run_goes_on_exactly_with_compile_off_and_checkpointing_on(inputs, monkeypatch):
    run_recipe(qlora(inputs, "straight"))
    from weft.train.trainer import Trainer

    train = Trainer._train

    def killed(self, feed):
        if self.state.step == 9:
            raise KeyError
        done = train(self, feed)
        self._save()
        return done

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_train", killed)
        with pytest.raises(KeyError):
            run_recipe(qlora(inputs, "killed"))
    run_recipe(qlora(inputs, "killed", "gradient_checkpointing=true"))
    one, other = (load_file(inputs / out / "last/adapter_model.safetensors") for out in ("straight", "killed"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    control = run_recipe(qlora(inputs, "control", "quantize=null"))
    assert control["loss"] != read_metrics(inputs / "straight/metrics.jsonl")[-1].get("loss")


def test_a_base_that_is_quantised_already_is_trained_upon_as_it_is(inputs):
    model = quantize(build(cases.spec_of(**SIZES), seed=1), Quant(type="nf4", double=True))
    save_model(model, inputs / "small", load_tokenizer(inputs / "tok"))
    with pytest.raises(UserError, match=r"quantize is given but .*small is quantised already"):
        make_plan(qlora(inputs, "run", f"model={inputs / 'small'}"))
    own, made = (run_recipe(qlora(inputs, out, *more)) for out, more in (("a", (f"model={inputs / 'small'}", "quantize=null")), ("b", ())))
    assert own["loss"] == pytest.approx(made["loss"], abs=1e-5)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["adapter=null"], "quantize is nf4 but there is no adapter"),
        (["adapter={type: bitfit}"], "quantize is nf4 but adapter is bitfit"),
        (["quantize=nf5"], "'nf5' is not known at quantize.type.*Did you mean 'nf4'"),
        (["quantize={type: int8, double: true}"], "only nf4"),
        (["average={count: 2}"], "average is given with an adapter"),
    ],
)
def test_what_cannot_be_is_refused(inputs, overrides, words):
    with pytest.raises(UserError, match=words):
        qlora(inputs, "run", *overrides)
