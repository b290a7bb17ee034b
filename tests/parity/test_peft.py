"""Adapters as PEFT computes, writes and reads them: logits of its adapters in Weft and of Weft's in PEFT, in float32."""

import json
import warnings

import pytest
import safetensors.torch
import torch
from hf_cases import deepseek

from weft.errors import UserError
from weft.nn import add_score
from weft.nn.adapters import adapter_parameters, adapters_off
from weft.spec.adapters import IA3, LoRA, Prefix, Prompt
from weft.weights.adapter_files import adapt, put_adapter, read_adapter
from weft.weights.export import export
from weft.weights.load import load_model, load_weights, open_checkpoint
from weft.weights.save import save_model
from weft.zoo import FAMILIES

peft = pytest.importorskip("peft", reason="peft is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

TOLERANCE = 1e-5
SIZES = {"vocab_size": 67, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**SIZES, num_key_value_heads=2, max_position_embeddings=64, bos_token_id=1, eos_token_id=2),
    "qwen2": lambda: transformers.Qwen2Config(**SIZES, num_key_value_heads=2, max_position_embeddings=64, bos_token_id=1, eos_token_id=2),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=67,
        n_embd=32,
        n_layer=3,
        n_head=4,
        n_positions=64,
        bos_token_id=1,
        eos_token_id=2,
        embd_pdrop=0,
        attn_pdrop=0,
        resid_pdrop=0,
    ),
}
SOME = {"llama": ["q_proj", "v_proj", "down_proj"], "qwen2": ["k_proj", "up_proj", "o_proj"], "gpt2": ["c_attn", "mlp.c_proj"]}
THEIRS = {
    "lora": lambda family: peft.LoraConfig(r=3, lora_alpha=7, target_modules=SOME[family], task_type="CAUSAL_LM"),
    "rslora": lambda family: peft.LoraConfig(r=4, lora_alpha=3, use_rslora=True, target_modules=SOME[family], task_type="CAUSAL_LM"),
    "dora": lambda family: peft.LoraConfig(r=3, lora_alpha=7, use_dora=True, target_modules=SOME[family], task_type="CAUSAL_LM"),
    "ia3": lambda family: peft.IA3Config(task_type="CAUSAL_LM"),
    "prompt": lambda family: peft.PromptTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM"),
    "prefix": lambda family: peft.PrefixTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM"),
}
OURS = {
    "lora": lambda family: LoRA(rank=3, alpha=7),
    "rslora": lambda family: LoRA(rank=4, alpha=3, rslora=True, targets=tuple(SOME[family])),
    "dora": lambda family: LoRA(rank=3, alpha=7, dora=True),
    "ia3": lambda family: IA3(),
    "prompt": lambda family: Prompt(tokens=5),
    "prefix": lambda family: Prefix(tokens=5),
}
TOKENS = torch.randint(3, 67, (2, 13), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model of each family as transformers saves it, its biases too drawn at random."""
    made = {}
    for family, config in CONFIGS.items():
        torch.manual_seed(7)
        model = transformers.AutoModelForCausalLM.from_config(config())
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
        made[family] = tmp_path_factory.mktemp(family)
        model.save_pretrained(made[family])
    return made


def disturbed(parameters):
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in parameters:
            parameter += torch.randn(parameter.shape, generator=generator) * 0.2


def their_adapter(folder, form, family, out):
    """An adapter made by PEFT, and what it computes with it."""
    model = peft.get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(folder), THEIRS[form](family)).eval()
    disturbed(parameter for parameter in model.parameters() if parameter.requires_grad)
    logits = their_logits(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(out)
    return logits


def our_logits(model, virtual=True):
    """Logits of the text, virtual tokens standing before it where the model has some."""
    before = torch.tensor(model.virtual_ids if virtual else ()).long().expand(len(TOKENS), -1)
    with torch.no_grad():
        return model(torch.cat([before, TOKENS], 1)).logits[:, before.shape[1] :]


def their_logits(model):
    with torch.no_grad():
        return model(TOKENS).logits[:, -TOKENS.shape[1] :]


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("form", THEIRS)
def test_weft_reads_what_peft_wrote(family, form, folder, tmp_path):
    expected = their_adapter(folder[family], form, family, tmp_path)
    loaded = load_model(tmp_path)  # by its adapter_config.json, which names the base
    torch.testing.assert_close(our_logits(loaded.model), expected, rtol=0, atol=TOLERANCE)
    with adapters_off(loaded.model):
        assert float((our_logits(loaded.model, virtual=False) - expected).abs().max()) > 1e-2
    # And back: what Weft writes of it, PEFT reads as the same numbers.
    again = save_model(loaded.model, tmp_path / "again")
    theirs = peft.PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(folder[family]), again).eval()
    torch.testing.assert_close(their_logits(theirs), expected, rtol=0, atol=1e-7)
    first, second = (read_adapter(path).files for path in (tmp_path, again))
    assert set(first.names) == set(second.names)
    for name in first.names:
        assert torch.equal(first.read(name), second.read(name)), name


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("form", OURS)
def test_peft_reads_what_weft_wrote(family, form, folder, tmp_path):
    model = load_model(folder[family]).model
    adapt(model, OURS[form](family), FAMILIES[family], str(folder[family]), seed=2)
    disturbed(adapter_parameters(model).values())
    save_model(model, tmp_path)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*missing")  # PEFT warns of keys that it does not find
        theirs = peft.PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(folder[family]), tmp_path).eval()
    expected = their_logits(theirs)
    with theirs.disable_adapter():
        assert float((their_logits(theirs) - expected).abs().max()) > 1e-2
    torch.testing.assert_close(our_logits(model), expected, rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(our_logits(load_model(tmp_path).model), expected, rtol=0, atol=TOLERANCE)
    auto = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path).eval()  # the base by its name in the config
    torch.testing.assert_close(their_logits(auto), expected, rtol=0, atol=1e-6)


def test_an_adapter_for_another_model_is_refused(folder, tmp_path):
    model = load_model(folder["llama"]).model
    adapt(model, LoRA(rank=2), FAMILIES["llama"], str(folder["llama"]))
    save_model(model, tmp_path / "ours")
    their_adapter(folder["gpt2"], "lora", "gpt2", tmp_path / "gpt2")
    their_adapter(folder["llama"], "lora", "llama", tmp_path / "theirs")
    with pytest.raises(UserError, match=r"gpt2 is an adapter for another model .*: it changes transformer\.h\.0\.attn\.c_attn, and this"):
        load_adapted(folder["llama"], tmp_path / "gpt2")
    wider = transformers.LlamaConfig(**{**SIZES, "intermediate_size": 64}, num_key_value_heads=2, max_position_embeddings=64)
    transformers.AutoModelForCausalLM.from_config(wider).save_pretrained(tmp_path / "wider")
    with pytest.raises(UserError, match=r"another model, or damaged: .*down_proj\.lora_A\.weight is 3x48, and this model needs 3x64 there"):
        load_adapted(tmp_path / "wider", tmp_path / "theirs")
    torch.manual_seed(8)
    twin = transformers.AutoModelForCausalLM.from_config(CONFIGS["llama"]())
    with torch.no_grad():
        twin.model.norm.weight += 0.1
    twin.save_pretrained(tmp_path / "twin")
    with pytest.raises(UserError, match=r"an adapter for another model .*: the weights of this one are not those it was trained upon"):
        load_adapted(tmp_path / "twin", tmp_path / "ours")
    load_adapted(tmp_path / "twin", tmp_path / "theirs")  # PEFT writes nothing that could tell


def load_adapted(base, adapter):
    checkpoint = open_checkpoint(base, adapter)
    loaded = load_model(base)
    return put_adapter(loaded.model, checkpoint.adapter, checkpoint.family)


def test_what_weft_does_not_compute_and_what_is_damaged_are_refused(folder, tmp_path):
    their_adapter(folder["llama"], "lora", "llama", tmp_path)
    path, whole = tmp_path / "adapter_config.json", (tmp_path / "adapter_model.safetensors").read_bytes()
    config = json.loads(path.read_text())
    for change, message in {
        "bias": ("all", "has bias 'all', which Weft does not compute"),
        "rank_pattern": ({"q_proj": 4}, "has rank_pattern"),
        "init_lora_weights": ("pissa_niter_4", "has init_lora_weights 'pissa_niter_4', with which PEFT changes the base too"),
        "modules_to_save": (["lm_head"], "has modules_to_save"),
        "r": (0, "r is 0|rank is 0"),
        "lora_alpha": (-1, "alpha is -1"),
        "peft_type": ("OFT", "has peft_type 'OFT'; Weft reads LORA"),
        "base_model_name_or_path": (None, "names no base. Name the base yourself"),
    }.items():
        path.write_text(json.dumps({**config, change: message[0]}))
        with pytest.raises(UserError, match=message[1]):
            load_model(tmp_path)
    path.write_text(json.dumps({**config, "base_model_name_or_path": "nobody/nothing"}))
    with pytest.raises(UserError, match="is an adapter for nobody/nothing, which is no path and has not been pulled"):
        load_model(tmp_path)
    path.write_text(json.dumps({**config, "base_model_name_or_path": 5}))
    with pytest.raises(UserError, match="has base_model_name_or_path 5; write the name"):
        load_model(tmp_path)
    path.write_text(json.dumps(config)[:-9])
    with pytest.raises(UserError, match="is not valid JSON"):
        load_model(tmp_path)
    path.write_text(json.dumps(config))
    (tmp_path / "adapter_model.safetensors").write_bytes(whole[:-100])
    with pytest.raises(UserError, match=r"adapter_model\.safetensors"):
        load_model(tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match=r"has no adapter_model\.safetensors"):
        load_model(tmp_path)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_score_head_goes_with_the_adapter_that_was_trained_with_it(family, folder, tmp_path):
    loaded = load_model(folder[family])
    model = adapt(loaded.model, LoRA(rank=3, alpha=7), FAMILIES[family], str(folder[family]), seed=2)
    add_score(model, 3, seed=5, labels=("bad", "fair", "good"))
    disturbed(adapter_parameters(model).values())
    save_model(model, tmp_path)
    base = transformers.AutoModelForSequenceClassification.from_pretrained(folder[family], num_labels=3, pad_token_id=0)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    with torch.no_grad():
        expected = theirs(TOKENS).logits
        again = load_model(tmp_path)
        for ours in (model, again.model):
            torch.testing.assert_close(ours.score(ours(TOKENS).hidden[:, -1]), expected, rtol=0, atol=TOLERANCE)
        with adapters_off(again.model):
            assert float((again.model.score(again.model(TOKENS).hidden[:, -1]) - expected).abs().max()) > 1e-2
    assert again.spec.score == 3
    assert again.model.spec.labels == again.spec.labels == ("bad", "fair", "good")
    tensors = safetensors.torch.load_file(tmp_path / "adapter_model.safetensors")
    tensors.pop(next(name for name in tensors if name.endswith("lora_A.weight")))
    safetensors.torch.save_file(tensors, tmp_path / "adapter_model.safetensors")
    plain = load_model(folder[family]).model
    with pytest.raises(UserError, match=r"or damaged: its file lacks .*lora_A"):
        put_adapter(plain, read_adapter(tmp_path), FAMILIES[family])
    assert (plain.adapters, plain.score, plain.spec.score) == (None, None, None)


def test_an_adapter_made_on_files_of_one_kind_fits_the_model_in_another(folder, tmp_path):
    """The same model as a GGUF file has the same names, and the same fingerprint though its matrices are rounded."""
    wide = transformers.LlamaConfig(
        **{**SIZES, "hidden_size": 64, "intermediate_size": 96}, num_key_value_heads=2, max_position_embeddings=64
    )
    torch.manual_seed(1)
    transformers.AutoModelForCausalLM.from_config(wide).to(torch.bfloat16).save_pretrained(tmp_path / "hf")
    for kind in ("f32", "q8_0"):
        export(tmp_path / "hf", "gguf", tmp_path / f"{kind}.gguf", kind)
    loaded = load_model(tmp_path / "hf", dtype=torch.float32)
    model = adapt(loaded.model, LoRA(rank=2, alpha=8), FAMILIES["llama"], str(tmp_path / "hf"))
    disturbed(adapter_parameters(model).values())
    save_model(model, tmp_path / "adapter")
    expected = our_logits(model)
    for kind, tolerance in (("f32", 1e-5), ("q8_0", 0.1)):
        checkpoint = open_checkpoint(tmp_path / f"{kind}.gguf", tmp_path / "adapter")
        for packed in (False, True):
            given = our_logits(load_weights(checkpoint, dtype=torch.float32, packed=packed))
            assert float((given - expected).abs().max()) < tolerance, kind
            bare = our_logits(load_weights(checkpoint.base, dtype=torch.float32, packed=packed))
            assert float((bare - expected).abs().max()) > 3 * tolerance


@pytest.mark.parametrize("dora", [False, True])
def test_rows_that_files_order_otherwise_are_put_in_order(dora, tmp_path):
    """DeepSeek's files have a rotated pair's channels side by side, and Weft half a head apart: so has an adapter's second factor."""
    config = deepseek("DeepseekV3", q_lora_rank=15, n_group=4, topk_group=2)()
    torch.manual_seed(3)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    targets = ["q_b_proj", "kv_a_proj_with_mqa", "o_proj"]
    model = peft.get_peft_model(
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base"),
        peft.LoraConfig(r=3, lora_alpha=7, target_modules=targets, use_dora=dora, task_type="CAUSAL_LM"),
    ).eval()
    disturbed(parameter for parameter in model.parameters() if parameter.requires_grad)
    model.save_pretrained(tmp_path / "theirs")
    loaded = load_model(tmp_path / "theirs")
    ids = TOKENS % config.vocab_size
    with torch.no_grad():
        expected = model(ids).logits
        torch.testing.assert_close(loaded.model(ids).logits, expected, rtol=0, atol=TOLERANCE)
        again = save_model(loaded.model, tmp_path / "ours")
        first, second = (read_adapter(path).files for path in (tmp_path / "theirs", again))
        for name in first.names:
            assert torch.equal(first.read(name), second.read(name)), name
        change = loaded.model.blocks[0].mixer.q_up.adapter.changes[0].b
        change.copy_(change.flip(0))  # the order matters
        assert float((loaded.model(ids).logits - expected).abs().max()) > 1e-3
