"""GGUF against transformers' own reader of it, and the export that proves its copy before it keeps it."""

import json
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import transformers as hf
from hf_cases import CASES, LLAMA3, Case, decoder, logits_of, oracle, tokens
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from paths import SHARED
from weft.errors import UserError
from weft.tokenizer import load_tokenizer, tokenizer_from_gguf
from weft.weights import export as export_module
from weft.weights.export import export
from weft.weights.gguf import read_gguf
from weft.weights.gguf_write import write_gguf
from weft.weights.load import load_model
from weft.zoo.family import canonical

TOLERANCE = 3e-5
BY_NAME = {case.name: case for case in CASES}
LLAMAS = ["llama", "llama-tied", "llama-biased", "llama-mqa-wide-heads", "llama-linear", "llama-llama3", "llama-yarn"]


def ours(path: Path) -> torch.Tensor:
    with torch.no_grad():
        return load_model(path).model(tokens()).logits


def saved(name: str, folder: Path) -> torch.Tensor:
    model = oracle(BY_NAME[name])
    model.save_pretrained(folder)
    return logits_of(model, tokens())


def read_by_transformers(path: Path) -> Any:
    """The model as transformers' own GGUF reader makes it, in float32."""
    config = hf.LlamaConfig(**load_gguf_checkpoint(str(path))["config"], attn_implementation="eager")
    model = hf.LlamaForCausalLM(config).eval()
    tensors = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=model)["tensors"]
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}
    return model


@pytest.mark.parametrize("name", LLAMAS)
def test_a_llama_through_gguf_and_back(name: str, tmp_path: Path) -> None:
    expected = saved(name, tmp_path / "a")
    done = export(tmp_path / "a", "gguf", tmp_path / "b.gguf", "f32")
    assert (done.kl, done.max_logit_difference) == (0, 0)
    assert (ours(tmp_path / "b.gguf") - expected).abs().max() < TOLERANCE
    export(tmp_path / "b.gguf", "hf", tmp_path / "c")
    first, last = load_model(tmp_path / "a"), load_model(tmp_path / "c")
    assert canonical(first.spec) == canonical(last.spec)
    assert all(torch.equal(a, b) for a, b in zip(first.model.parameters(), last.model.parameters(), strict=True))
    again = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "c", attn_implementation="eager").eval()
    assert (logits_of(again, tokens()) - expected).abs().max() < TOLERANCE


def test_transformers_reads_the_same_logits_from_our_file(tmp_path: Path) -> None:
    """transformers undoes the interleaving of query and key rows by its own code; a file with plain rows must differ there."""
    expected = saved("llama", tmp_path / "a")
    export(tmp_path / "a", "gguf", tmp_path / "b.gguf", "f32")
    theirs = read_by_transformers(tmp_path / "b.gguf")
    assert (logits_of(theirs, tokens()) - expected).abs().max() < TOLERANCE

    file = read_gguf(tmp_path / "b.gguf")
    plain = load_model(tmp_path / "a").model.blocks[0].mixer.qkv.weight[:48]
    tensors = [
        (name, info.shape, info.type, lambda name=name: plain if name == "blk.0.attn_q.weight" else file.read(name))
        for name, info in file.tensors.items()
    ]
    write_gguf(tmp_path / "wrong.gguf", file.metadata, tensors)
    wrong = read_by_transformers(tmp_path / "wrong.gguf")
    assert (logits_of(wrong, tokens()) - expected).abs().max() > 1e-2
    assert (ours(tmp_path / "wrong.gguf") - expected).abs().max() > 1e-2


@pytest.mark.parametrize(("kind", "loose"), [("bf16", 0.2), ("f16", 0.03), ("q8_0", 0.6)])
def test_rounded_exports_stay_close(kind: str, loose: float, tmp_path: Path) -> None:
    case = decoder("Llama", hidden_size=64, intermediate_size=96, num_attention_heads=4)
    model = oracle(Case("wide", "llama", case))
    model.save_pretrained(tmp_path / "a")
    expected = logits_of(model, tokens())
    done = export(tmp_path / "a", "gguf", tmp_path / "b.gguf", kind)
    assert 0 < done.kl < 0.05
    assert done.fallbacks == 0
    info = read_gguf(tmp_path / "b.gguf").tensors
    assert {entry.type for entry in info.values() if len(entry.shape) == 2} == {kind.upper()}
    assert {entry.type for entry in info.values() if len(entry.shape) == 1} == {"F32"}
    assert TOLERANCE < (ours(tmp_path / "b.gguf") - expected).abs().max() < loose
    theirs = read_by_transformers(tmp_path / "b.gguf")
    assert (logits_of(theirs, tokens()) - ours(tmp_path / "b.gguf")).abs().max() < TOLERANCE


def test_rows_that_do_not_fit_the_blocks_are_counted(tmp_path: Path) -> None:
    saved("llama", tmp_path / "a")
    assert export(tmp_path / "a", "gguf", tmp_path / "b.gguf", "q8_0").fallbacks == 2 + 3 * 7
    assert {entry.type for entry in read_gguf(tmp_path / "b.gguf").tensors.values()} == {"F16", "F32"}


@pytest.mark.parametrize("name", ["gpt2", "qwen3", "gemma2", "mamba", "mistral"])
def test_gguf_refuses_what_is_no_llama(name: str, tmp_path: Path) -> None:
    saved(name, tmp_path / "a")
    with pytest.raises(UserError, match="Llama family"):
        export(tmp_path / "a", "gguf", tmp_path / "b.gguf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]


@pytest.mark.parametrize("name", ["gpt2-untied", "qwen2-windows", "gemma2", "mamba-biased-untied"])
def test_hf_export_of_every_kind(name: str, tmp_path: Path) -> None:
    expected = saved(name, tmp_path / "a")
    done = export(tmp_path / "a", "hf", tmp_path / "b")
    assert (done.kl, done.dtype, done.format) == (0, "f32", "hf")
    assert (ours(tmp_path / "b") - expected).abs().max() < TOLERANCE
    half = export(tmp_path / "a", "hf", tmp_path / "c", "bf16")
    assert half.kl > 0
    assert json.loads((tmp_path / "c/config.json").read_text())["torch_dtype"] == "bfloat16"


def test_a_wrong_copy_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Control of the proof: rows left uninterleaved, a swapped tensor and a rounding too many are each noticed."""
    saved("llama", tmp_path / "a")
    real = export_module.stored_tensors

    def plain_rows(tensors: Any, rules: Any) -> Any:
        for name, tensor in real(tensors, rules):
            yield name, tensors["blocks.0.mixer.qkv.weight"].detach()[:48] if name == "blk.0.attn_q.weight" else tensor

    def swapped(tensors: Any, rules: Any) -> Any:
        held = dict(real(tensors, rules))
        held["blk.1.ffn_up.weight"], held["blk.1.ffn_gate.weight"] = held["blk.1.ffn_gate.weight"], held["blk.1.ffn_up.weight"]
        yield from held.items()

    def rounded(tensors: Any, rules: Any) -> Any:
        for name, tensor in real(tensors, rules):
            yield name, tensor.half().float() if name == "output.weight" else tensor

    real_metadata = export_module.llama_gguf.to_gguf
    with monkeypatch.context() as patch:
        patch.setattr(export_module.llama_gguf, "to_gguf", lambda spec: {**real_metadata(spec), "llama.rope.freq_base": 10001.0})
        with pytest.raises(UserError, match="another model"):
            export(tmp_path / "a", "gguf", tmp_path / "b.gguf", "f32")
    for broken in (plain_rows, swapped, rounded):
        monkeypatch.setattr(export_module, "stored_tensors", broken)
        with pytest.raises(UserError, match="the copy was not kept"):
            export(tmp_path / "a", "gguf", tmp_path / "b.gguf", "f32")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]


def test_exports_that_cannot_be_asked_for(tmp_path: Path) -> None:
    saved("llama", tmp_path / "a")
    with pytest.raises(UserError, match="Did you mean 'bf16'"):
        export(tmp_path / "a", "gguf", tmp_path / "b.gguf", "bf6")
    with pytest.raises(UserError, match="not q8_0"):
        export(tmp_path / "a", "hf", tmp_path / "b", "q8_0")
    with pytest.raises(UserError, match=r"does not end in \.gguf"):
        export(tmp_path / "a", "gguf", tmp_path / "b")
    with pytest.raises(UserError, match="unknown format"):
        export(tmp_path / "a", cast(Any, "onnx"), tmp_path / "b")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"general.architecture": "gpt2"}, ["architecture 'gpt2'"]),
        ({"llama.expert_count": 8}, ["expert_count", "8"]),
        ({"llama.attention.sliding_window": 64}, ["sliding_window"]),
        ({"llama.rope.dimension_count": 4}, ["rope.dimension_count"]),
        ({"llama.attention.head_count": [6, 6, 3]}, ["head_count", "layer to layer"]),
        ({"llama.attention.head_count": 0}, ["head_count", "integer from 1"]),
        ({"llama.rope.scaling.type": "longrope", "llama.rope.scaling.factor": 2.0}, ["longrope"]),
        ({"llama.vocab_size": 9}, ["vocab_size", "61"]),
        ({"llama.block_count": 2}, ["no place for", "blk.2."]),
        ({"llama.block_count": 4}, ["lacks", "blk.3."]),
        ({"llama.context_length": "long"}, ["context", "long"]),
        ({"llama.embedding_length": None}, ["embedding_length"]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_gguf_files_that_are_refused(change: dict[str, Any], words: list[str], tmp_path: Path) -> None:
    saved("llama", tmp_path / "a")
    export(tmp_path / "a", "gguf", tmp_path / "b.gguf")
    file = read_gguf(tmp_path / "b.gguf")
    metadata = {key: value for key, value in {**file.metadata, **change}.items() if value is not None}
    tensors = [(name, info.shape, info.type, lambda name=name: file.read(name)) for name, info in file.tensors.items()]
    write_gguf(tmp_path / "c.gguf", metadata, tensors)
    with pytest.raises(UserError) as caught:
        load_model(tmp_path / "c.gguf")
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_llama3_factors_alone_give_the_scaling_back(tmp_path: Path) -> None:
    """Other writers store only the factors; with the released numbers they are recognised, with others refused."""
    scaling = {**LLAMA3, "original_max_position_embeddings": 8192, "rope_theta": 500000.0}
    wide = decoder("Llama", hidden_size=64, num_attention_heads=2, num_key_value_heads=1, rope_parameters=scaling, intermediate_size=40)
    oracle(Case("wide", "llama", wide)).save_pretrained(tmp_path / "a")
    export(tmp_path / "a", "gguf", tmp_path / "b.gguf")
    file = read_gguf(tmp_path / "b.gguf")
    metadata = {key: value for key, value in file.metadata.items() if not key.startswith("weft.")}
    for name, bend in (("c", 1.0), ("d", 1.01)):
        tensors = [
            (key, info.shape, info.type, lambda key=key, bend=bend: file.read(key) * (bend if key == "rope_freqs.weight" else 1))
            for key, info in file.tensors.items()
        ]
        write_gguf(tmp_path / f"{name}.gguf", metadata, tensors)
    assert load_model(tmp_path / "c.gguf").spec == load_model(tmp_path / "b.gguf").spec
    with pytest.raises(UserError, match=r"rope_freqs\.weight"):
        load_model(tmp_path / "d.gguf")


@pytest.mark.skipif(SHARED is None, reason="needs the data pack")
@pytest.mark.parametrize("vocabulary", ["gpt-2", "deepseek-coder", "phi-3"])
def test_tokenizers_travel_into_gguf(vocabulary: str, tmp_path: Path) -> None:
    """A published vocabulary as tokenizer.json, written into GGUF and read again, gives the same ids; so does the way back."""
    assert SHARED is not None
    metadata = read_gguf(SHARED / f"tokenizers/ggml-vocab-{vocabulary}.gguf").metadata
    original = tokenizer_from_gguf({**metadata, "general.name": "a name that no rule of white space hangs on"})
    rows = original.vocab_size + 3
    model = decoder("Llama", vocab_size=rows, hidden_size=4, intermediate_size=4, num_attention_heads=1, num_key_value_heads=1)
    oracle(Case("v", "llama", model)).save_pretrained(tmp_path / "a")
    original.save(tmp_path / "a")
    assert export(tmp_path / "a", "gguf", tmp_path / "b.gguf").tokenizer
    assert export(tmp_path / "b.gguf", "hf", tmp_path / "c").tokenizer
    strings = (SHARED / f"tokenizers/ggml-vocab-{vocabulary}.gguf.inp").read_text().split("\n__ggml_vocab_test__\n")
    expected = [
        [int(word) for word in line.split()] for line in (SHARED / f"tokenizers/ggml-vocab-{vocabulary}.gguf.out").read_text().split("\n")
    ]
    for place in ("b.gguf", "c"):
        copy = load_tokenizer(tmp_path / place)
        assert [copy.encode(text, bos=False) for text in strings] == expected[: len(strings)]
    assert (copy.bos_id, copy.eos_id, copy.eos_ids) == (original.bos_id, original.eos_id, original.eos_ids)


@pytest.mark.skipif(SHARED is None, reason="needs the data pack")
def test_a_tokenizer_whose_ids_would_change_is_refused(tmp_path: Path) -> None:
    """Phi-3's special tokens take the white space after them, for which GGUF has no field: the copy's ids differ, and it is not kept."""
    assert SHARED is not None
    original = load_tokenizer(SHARED / "tokenizers/ggml-vocab-phi-3.gguf")
    model = decoder(
        "Llama", vocab_size=original.vocab_size, hidden_size=4, intermediate_size=4, num_attention_heads=1, num_key_value_heads=1
    )
    oracle(Case("v", "llama", model)).save_pretrained(tmp_path / "a")
    original.save(tmp_path / "a")
    with pytest.raises(UserError, match="gives other ids"):
        export(tmp_path / "a", "gguf", tmp_path / "b.gguf")
    assert not (tmp_path / "b.gguf").exists()


def test_tokenizers_that_gguf_cannot_hold(tmp_path: Path) -> None:
    import tokenizers as library
    from tokenizers import models, pre_tokenizers

    from weft.tokenizer import Tokenizer

    saved("llama", tmp_path / "a")
    odd = library.Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")]))
    odd.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Punctuation(), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    Tokenizer(odd).save(tmp_path / "a")
    with pytest.raises(UserError, match="GGUF has no name for"):
        export(tmp_path / "a", "gguf", tmp_path / "b.gguf")
    unigram = library.Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0)], 0, False))
    Tokenizer(unigram).save(tmp_path / "a")
    with pytest.raises(UserError, match="is Unigram"):
        export(tmp_path / "a", "gguf", tmp_path / "b.gguf")
    large = library.Tokenizer(models.BPE({chr(0x4E00 + index): index for index in range(70)}, []))
    Tokenizer(large).save(tmp_path / "a")
    with pytest.raises(UserError, match="70 tokens but the model only 61"):
        export(tmp_path / "a", "gguf", tmp_path / "b.gguf")
    assert export(tmp_path / "a", "hf", tmp_path / "c").tokenizer
