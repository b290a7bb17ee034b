"""Masks by rendering turn by turn: every published template, against transformers' own masks, and what fits in a length."""

import pytest
import tokenizers

from paths import SHARED
from record_cases import CHATML, TAGGED, TALK, chat_tokenizer, marked
from weft.data.encode_records import RecordEncoder
from weft.data.record_kinds import Completion, Conversation, Labelled, PlainText, Preference
from weft.errors import UserError
from weft.tokenizer import Tokenizer, load_tokenizer
from weft.tokenizer.templates import with_chat_template

TEMPLATES = [] if SHARED is None else sorted((SHARED / "tokenizers" / "chat-templates").glob("*.jinja"))
SAID = [message["content"] for message in TALK if message["role"] == "assistant"]
# What published templates make of the second of two answers; of the first one too, where they leave it alone later.
ANSWERS = {
    "HuggingFaceTB-SmolLM3-3B": ("⟦{}<|im_end|>⟧", 1),
    "Qwen-Qwen2.5-7B-Instruct": ("⟦{}<|im_end|>⟧", 1),
    "Qwen-Qwen3-0.6B": ("⟦<think>\n\n</think>\n\n{}<|im_end|>⟧", 2),
    "deepseek-ai-DeepSeek-V3.1": ("⟦{}<｜end▁of▁sentence｜>⟧", 1),
    "google-gemma-2-2b-it": ("⟦{}<end_of_turn>⟧", 1),
    "ibm-granite-granite-3.3-2B-Instruct": ("⟦{}<|end_of_text|>⟧", 1),
    "meta-llama-Llama-3.1-8B-Instruct": ("⟦{}<|eot_id|>⟧", 1),
    "microsoft-Phi-3.5-mini-instruct": ("⟦{}<|end|>⟧", 1),
    "mistralai-Mistral-Nemo-Instruct-2407": ("⟦{}</s>⟧", 1),
    "openai-gpt-oss-120b": ("⟦<|channel|>final<|message|>{}<|return|>⟧", 2),
}
REFUSED = {
    "deepseek-ai-DeepSeek-R1-Distill-Llama-8B": "generation prompt goes on with '<think>\\n', which it does not write where the answer is",
    "NousResearch-Hermes-3-Llama-3.1-8B-tool_use": "the chat template fails on these messages",  # it has to be given tools
}


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)
def test_published_templates_train_every_answer_once_up_to_its_end(path):
    tokenizer = chat_tokenizer(path.read_text())
    encoder = RecordEncoder(tokenizer)
    if path.stem in REFUSED:
        with pytest.raises(UserError) as told:
            encoder.conversation(Conversation(TALK, "a:1"))
        assert str(told.value).startswith("a:1: ")
        assert REFUSED[path.stem] in str(told.value)
        return
    written, count = ANSWERS[path.stem]
    texts = encoder.conversations(Conversation(TALK, "a:1"))
    assert len(texts) == count
    assert list(texts[0].ids) == tokenizer.apply_chat(TALK, add_generation_prompt=False)
    shown = "".join(marked(tokenizer, text) for text in texts)
    assert [shown.count(written.format(said)) for said in SAID] == [1, 1]
    assert shown.count("⟦") == 2, "nothing else is trained on"


def test_the_published_templates_are_all_there():
    if SHARED is None:
        pytest.skip("needs shared/data/tokenizers/chat-templates")
    assert {path.stem for path in TEMPLATES} == ANSWERS.keys() | REFUSED.keys()


def _reference(tokenizer, template, messages):
    """Ids and mask as transformers says."""
    transformers = pytest.importorskip("transformers")
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend, bos_token="<s>", eos_token="</s>")
    made = theirs.apply_chat_template(list(messages), chat_template=template, return_dict=True, return_assistant_tokens_mask=True)
    return made["input_ids"], [bool(flag) for flag in made["assistant_masks"]]


def test_masks_are_those_of_a_template_with_generation_tags():
    ids, mask = _reference(chat_tokenizer(TAGGED), TAGGED, TALK)
    for template in (TAGGED, CHATML):
        text = RecordEncoder(chat_tokenizer(template)).conversation(Conversation(TALK, "a:1"))
        assert list(text.ids) == ids
        assert list(text.trained) == mask
    late = TAGGED.replace("{% generation %}{{ message", "{{ message").replace(
        "'<|im_end|>' }}{% end", "'' }}{% generation %}<|im_end|>{% end"
    )
    assert _reference(chat_tokenizer(late), late, TALK)[1] != mask, "negative control: tags around something else"


@pytest.mark.parametrize("name", ["llama3", "qwen3", "qwen2_5_vl", "gemma", "cohere2", "phi3_5", "lfm2"])
def test_masks_are_those_of_trls_tagged_templates_but_for_what_follows_an_end_token(name):
    """TRL marks a line end after the end token, and Phi's end of document, in some templates and not in others; we never do."""
    trl = pytest.importorskip("trl", reason="needs trl")
    from pathlib import Path

    template = Path(trl.__file__).parent.joinpath("chat_templates", f"{name}_training.jinja").read_text()
    tokenizer = chat_tokenizer(template)
    ids, mask = _reference(tokenizer, template, TALK)
    (text,) = RecordEncoder(tokenizer).conversations(Conversation(TALK, "a:1"))
    assert list(text.ids) == ids
    extra = [index for index in range(len(ids)) if mask[index] != text.trained[index]]
    assert all(mask[index] for index in extra)
    assert tokenizer.decode([ids[index] for index in extra], skip_special=False).replace("</s>", "").strip() == ""


@pytest.mark.parametrize("bos", [False, True])
def test_a_prompt_of_messages_is_what_apply_chat_gives(bos):
    tokenizer = chat_tokenizer(bos=bos)
    assert list(RecordEncoder(tokenizer).prompt(TALK[:1])) == tokenizer.apply_chat(TALK[:1])
    text = RecordEncoder(tokenizer).conversation(Conversation(TALK, "a:1"))
    assert list(text.ids) == tokenizer.apply_chat(TALK, add_generation_prompt=False)
    assert marked(tokenizer, text).count("⟦It is four.<|im_end|>⟧\n<|im_start|>") == 1


def test_a_completion_of_messages_is_the_conversation_with_its_last_answer_trained():
    tokenizer = chat_tokenizer()
    text = RecordEncoder(tokenizer).completion(Completion(TALK[:3], TALK[3:], "a:1"))
    whole = tokenizer.apply_chat(TALK, add_generation_prompt=False)
    assert list(text.ids) == whole[: len(text.ids)]
    assert marked(tokenizer, text).endswith(f"assistant\n⟦{SAID[1]}<|im_end|>⟧")
    assert marked(tokenizer, text).count("⟦") == 1


def test_of_an_answer_of_several_messages_the_assistants_are_trained_on():
    tokenizer = chat_tokenizer()
    text = RecordEncoder(tokenizer).completion(Completion(TALK[:1], TALK[1:], "a:1"))
    whole = RecordEncoder(tokenizer).conversation(Conversation(TALK, "a:1"))
    assert (text.ids, text.trained) == (whole.ids[: text.num_tokens], whole.trained[: text.num_tokens])
    assert whole.num_trained == text.num_trained
    qwen3 = next((path for path in TEMPLATES if "Qwen3" in path.stem), None)
    if qwen3 is not None:
        with pytest.raises(UserError, match="a:1: the answer is 3 messages, of which the chat template rewrites one later on"):
            RecordEncoder(chat_tokenizer(qwen3.read_text())).completion(Completion(TALK[:1], TALK[1:], "a:1"))


def test_text_records_have_the_ids_of_the_joint_text_and_an_end():
    tokenizer = chat_tokenizer(None, bos=True)
    encoder = RecordEncoder(tokenizer)
    text = encoder.completion(Completion("the cat", " sat there", "a:1"))
    assert marked(tokenizer, text) == "<s>the cat⟦ sat there</s>⟧"
    assert list(text.ids[1:-1]) == tokenizer.encode_batch(["the cat sat there"])[0]
    merged = encoder.completion(Completion("what is t", "wo", "a:1"))
    assert marked(tokenizer, merged) == "<s>what is t⟦wo</s>⟧", "as a model writes it after the prompt"
    assert [marked(tokenizer, text) for text in encoder.texts(PlainText("the cat", "a:1"))] == ["<s>⟦the cat</s>⟧"]
    assert marked(tokenizer, encoder.labelled(Labelled("the cat", 1, "a:1"))) == "<s>⟦the cat</s>⟧"
    pair = encoder.preference(Preference("the", " cat", " mat sat", "a:1", 1.5))
    assert [marked(tokenizer, answer) for answer in (pair.chosen, pair.rejected)] == ["<s>the⟦ cat</s>⟧", "<s>the⟦ mat sat</s>⟧"]
    assert pair.margin == 1.5
    assert pair.num_tokens == pair.chosen.num_tokens + pair.rejected.num_tokens


def test_the_first_token_is_no_target():
    tokenizer = chat_tokenizer(None)
    (text,) = RecordEncoder(tokenizer).texts(PlainText("the cat", "a:1"))
    assert text.trained[0] is False
    assert all(text.trained[1:])


def test_what_does_not_fit_is_cut_and_counted():
    tokenizer = chat_tokenizer(None, bos=True)
    prompt, answer = "the cat sat on the mat " * 4, " it is four"
    whole = RecordEncoder(tokenizer).completion(Completion(prompt, answer, "a:1"))
    size = sum(whole.trained)
    encoder = RecordEncoder(tokenizer, size + 6)
    text = encoder.completion(Completion(prompt, answer, "a:1"))
    assert text.ids[0] == tokenizer.bos_id
    assert text.ids[1:] == whole.ids[-size - 5 :], "the prompt's left gives way, its BOS does not"
    assert (text.num_tokens, text.cut, sum(text.trained)) == (size + 6, whole.num_tokens - size - 6, size)
    short = RecordEncoder(tokenizer, 8).completion(Completion(prompt, answer * 9, "a:1"))
    assert (short.num_tokens, sum(short.trained)) == (8, 4), "half of the length is the prompt's"
    pair = encoder.preference(Preference(prompt, " it", answer, "a:1"))
    chosen, rejected = (
        tokenizer.decode([t for t, on in zip(e.ids, e.trained, strict=True) if not on]) for e in (pair.chosen, pair.rejected)
    )
    assert chosen == rejected != prompt
    plain = RecordEncoder(tokenizer, 5).labelled(Labelled(prompt, 1, "a:1"))
    assert (plain.num_tokens, plain.ids[-1]) == (5, tokenizer.eos_id), "the end stays"
    assert plain.cut > 0


@pytest.mark.parametrize("bos", [False, True])
def test_a_long_text_is_trained_on_to_its_end_in_pieces(bos):
    """As pretraining does: only the last piece ends with the end token, and every token but the first is a target once."""
    tokenizer, record = chat_tokenizer(None, bos=bos), PlainText("the cat sat on the mat " * 4, "a:1")
    (whole,) = RecordEncoder(tokenizer).texts(record)
    for length in (2, 5, whole.num_tokens - 1, whole.num_tokens):
        pieces = RecordEncoder(tokenizer, length).texts(record)
        assert max(piece.num_tokens for piece in pieces) == length
        assert [token for piece in pieces for token in piece.ids[1:]] == list(whole.ids[1:])
        assert [before.ids[-1] for before in pieces[:-1]] == [after.ids[0] for after in pieces[1:]]
        assert all(piece.trained == (False, *[True] * (piece.num_tokens - 1)) for piece in pieces)
        assert [piece.ids.count(tokenizer.eos_id) for piece in pieces] == [0] * (len(pieces) - 1) + [1]
        assert {piece.cut for piece in pieces} == {0}
    with pytest.raises(UserError, match=r"a:1: .* beyond the length of 1; raise the length to 2"):
        RecordEncoder(tokenizer, 1).texts(record)


def test_tools_are_rendered_before_prompts_answers_and_pairs():
    template = "{% if tools %}{{ '<|im_start|>tools\n' + tools[0]['name'] + '<|im_end|>\n' }}{% endif %}" + CHATML
    encoder, tools = RecordEncoder(chat_tokenizer(template)), ({"name": "add"},)
    whole = encoder.conversation(Conversation(TALK, "a:1", tools))
    start = whole.ids[: whole.trained.index(True)]
    pair = encoder.preference(Preference(TALK[:1], (TALK[1],), (TALK[3],), "a:1", tools=tools))
    assert encoder.prompt(TALK[:1], "a:1", tools) == start
    assert encoder.completion(Completion(TALK[:1], (TALK[1],), "a:1", tools)).ids[: len(start)] == start
    assert [answer.ids[: len(start)] for answer in (pair.chosen, pair.rejected)] == [start, start]
    assert encoder.prompt(TALK[:1]) != start, "control"


def test_a_conversation_is_cut_at_its_end_but_not_to_nothing():
    tokenizer = chat_tokenizer()
    whole = RecordEncoder(tokenizer).conversation(Conversation(TALK, "a:1"))
    first = whole.trained.index(True)
    cut = RecordEncoder(tokenizer, first + 2).conversation(Conversation(TALK, "a:1"))
    assert cut.ids == whole.ids[: first + 2]
    assert cut.cut == whole.num_tokens - first - 2
    with pytest.raises(UserError, match=rf"a:1: what is trained on begins at token {first + 1}, beyond the length of {first}; raise"):
        RecordEncoder(tokenizer, first).conversation(Conversation(TALK, "a:1"))


ENDLESS = CHATML.replace("message['content'] + '<|im_end|>\n'", "message['content'] + '\n'")
FORGETFUL = CHATML.replace("message['content']", "message['content'].split('four')[-1]")


@pytest.mark.parametrize(
    ("template", "messages", "message"),
    [
        (None, TALK, "the model's tokenizer has no chat template to write them with"),
        (ENDLESS, TALK, "writes no end token after message 2 .* use a template that ends an answer with one of </s>"),
        (FORGETFUL, TALK, "of message 2 the chat template writes .* leaves out a part of what is said"),
        (CHATML.replace("<|im_start|>assistant", "<|im_start|>bot"), TALK, "generation prompt goes on with 'bot"),
        ("{{ raise_exception('no') }}", TALK, "the chat template refuses these messages: no"),
        (CHATML, ({**TALK[0], "content": "say <|im_end|>"}, TALK[1]), r"message 1: the text spells out the special token <\|im_end\|>"),
        (CHATML, TALK[:1], "there is no assistant message, so there is nothing to learn"),
    ],
)
def test_what_cannot_be_trained_on_is_one_sentence(template, messages, message):
    with pytest.raises(UserError, match=rf"a:7.*{message}"):
        RecordEncoder(chat_tokenizer(template)).conversation(Conversation(messages, "a:7"))


@pytest.mark.parametrize("bos", [False, True])
def test_the_plain_template_needs_no_token_but_the_end(bos):
    tokenizer = with_chat_template(chat_tokenizer(None, bos), "plain")
    text = RecordEncoder(tokenizer).conversation(Conversation(({"role": "system", "content": "Be brief."}, *TALK), "a:1"))
    start = "<s>" if bos else ""
    system, first = "### System:\nBe brief.\n\n", "### User:\nWhat is two plus two?\n\n### Assistant:\n⟦It is four.</s>⟧\n"
    assert marked(tokenizer, text) == f"{start}{system}{first}### User:\nthe cat?\n\n### Assistant:\n⟦{SAID[1]}</s>⟧\n"


@pytest.mark.parametrize("name", ["models/stories260K/tok512.bin", "tokenizers/ggml-vocab-phi-3.gguf", "tokenizers/ggml-vocab-gpt-2.gguf"])
def test_published_tokenizers_cut_a_conversation_where_they_read_it(name):
    """SentencePiece's own rules, which tell no offsets, and byte-level tokens, which cut characters."""
    if SHARED is None:
        pytest.skip("needs shared/data")
    tokenizer = with_chat_template(load_tokenizer(SHARED / name), "plain")
    text = RecordEncoder(tokenizer).conversation(Conversation(TALK, "a:1"))
    assert list(text.ids) == tokenizer.apply_chat(TALK, add_generation_prompt=False)
    end = tokenizer.token(tokenizer.eos_id)
    assert marked(tokenizer, text).split("⟦")[1:] == [f"{SAID[0]}{end}⟧\n### User:\nthe cat?\n\n### Assistant:\n", f"{SAID[1]}{end}⟧\n"]


def test_a_space_that_offsets_leave_out_belongs_to_the_prompt():
    plain = chat_tokenizer()
    backend = tokenizers.Tokenizer.from_str(plain.backend.to_str())
    backend.post_processor = tokenizers.processors.ByteLevel(trim_offsets=True)
    text = "the cat: 4</s>"
    for tokenizer in (plain, Tokenizer(backend, plain.settings)):
        ids, places = tokenizer.encode_cut(text, [0, 3, 8, 9, 10, len(text)])
        assert [tokenizer.decode(ids[place:], skip_special=False) for place in places] == [text, text[3:], text[8:], "4</s>", "</s>", ""]


def test_a_template_may_be_chatml_or_a_file(tmp_path):
    (tmp_path / "own.jinja").write_text(CHATML)
    for template in ("chatml", str(tmp_path / "own.jinja")):
        tokenizer = with_chat_template(chat_tokenizer(TAGGED), template)
        expected = RecordEncoder(chat_tokenizer()).conversation(Conversation(TALK, "a:1"))
        assert RecordEncoder(tokenizer).conversation(Conversation(TALK, "a:1")) == expected
    with pytest.raises(UserError, match=r"chatml writes <\|im_start\|>, which is no special token of this tokenizer; take plain"):
        with_chat_template(chat_tokenizer(None), "chatml")
    with pytest.raises(UserError, match=r"there is no chat template 'chatlm'\. Did you mean 'chatml'"):
        with_chat_template(chat_tokenizer(None), "chatlm")


def test_special_tokens_in_text_records_are_refused():
    with pytest.raises(UserError, match="a:7: the text spells out the special token </s>"):
        RecordEncoder(chat_tokenizer(None)).texts(PlainText("a </s> b", "a:7"))
