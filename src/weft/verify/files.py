"""Checks on what is written and read: a saved model is the model, and no text begins twice."""

import shutil
import tempfile
from pathlib import Path

import torch

from weft.errors import UserError
from weft.tokenizer import Tokenizer
from weft.verify.check import Outcome
from weft.verify.passes import gap_of
from weft.verify.prompts import CODE, NON_ASCII, PROSE, QUESTION
from weft.verify.subject import Subject
from weft.weights.fidelity import tokenizer_of
from weft.weights.load import load_model
from weft.weights.map import stored_state
from weft.weights.save import save_model


@torch.inference_mode()
def save_then_load(subject: Subject) -> Outcome:
    """Logits, bit for bit, and token ids of the model that comes back from a temporary folder."""
    needed = sum(tensor.nbytes for tensor in stored_state(subject.model).values())
    with tempfile.TemporaryDirectory(prefix="weft-verify-") as folder:
        free = shutil.disk_usage(folder).free
        if needed * 1.1 > free:
            return Outcome.skipped(f"a copy takes {needed / 1e9:.1f} GB and {folder} has {free / 1e9:.1f} GB left; set TMPDIR.")
        saved = save_model(subject.model, Path(folder) / "model", subject.tokenizer, family=subject.checkpoint.family)
        again = load_model(saved, subject.device, subject.dtype)
        figure, detail, compared = 0.0, "", 0
        for prompt in subject.longest(3):
            tokens = torch.tensor([prompt.ids], device=subject.device)
            gap = gap_of([(again.model(tokens).logits[0], subject.model(tokens).logits[0])])
            compared += len(gap.by_place)
            place = gap.first_above(0)
            if place is not None and not detail:
                detail = f"logits after token {place + 1} of {prompt} differ by {gap.by_place[place]:.2g} of the largest logit"
            figure = max(figure, gap.worst)
        wrong = _tokenizer_mistake(subject.tokenizer, tokenizer_of(saved))
    if wrong:
        return Outcome("fail", figure, 0.0, "of the largest logit", wrong)
    return Outcome.measured(figure, 0.0, "of the largest logit", detail or f"logits of {compared} tokens, bit for bit")


def _tokenizer_mistake(ours: Tokenizer | None, again: Tokenizer | None) -> str:
    if ours is None:
        return ""
    if again is None:
        return "the tokenizer did not come back"
    for text in (PROSE, CODE, NON_ASCII):
        if ours.encode(text) != again.encode(text):
            return f"the tokenizer that came back gives other ids for {text!r}"
    if ours.eos_ids != again.eos_ids or ours.chat_template != again.chat_template:
        return "the tokenizer that came back has other end tokens or another chat template"
    return ""


def one_bos(subject: Subject) -> Outcome:
    """How many BOS a text begins with: as it is, asked for, already there, and through the chat template."""
    tokenizer = subject.tokenizer
    if tokenizer is None or tokenizer.bos_id is None:
        return Outcome.skipped("there is no tokenizer beside the weights" if tokenizer is None else "this tokenizer has no BOS")
    bos = tokenizer.token(tokenizer.bos_id) or ""
    own = int(tokenizer.adds_bos)
    cases = [
        ("a text", tokenizer.encode(PROSE), own),
        ("a text with bos=True", tokenizer.encode(PROSE, bos=True), 1),
        ("a text with bos=False", tokenizer.encode(PROSE, bos=False), 0),
        ("a text that begins with the BOS", tokenizer.encode(bos + PROSE, special=True), 1),
        ("a text that begins with the BOS, with bos=True", tokenizer.encode(bos + PROSE, special=True, bos=True), 1),
    ]
    cases += [(what, ids, max(own, written)) for what, ids, written in _chats(tokenizer, bos)]
    wrong = [(what, begins, want) for what, ids, want in cases if (begins := _leading(ids, tokenizer.bos_id)) != want]
    if wrong:
        what, begins, want = wrong[0]
        detail = f"{what} begins with {begins} BOS ({bos!r}), where {want} is right"
    else:
        detail = f"{len(cases)} ways to begin a text with {bos!r}"
    return Outcome.measured(len(wrong), 0, "wrong beginnings", detail)


def _chats(tokenizer: Tokenizer, bos: str) -> list[tuple[str, list[int], int]]:
    """Conversations in tokens, and whether the template itself writes a BOS; none where it refuses them."""
    if tokenizer.chat_template is None:
        return []
    question = {"role": "user", "content": QUESTION}
    turns = [question, {"role": "assistant", "content": "The Rhine."}, {"role": "user", "content": PROSE}]
    try:
        chats = {"a chat": [question], "a chat of three turns": turns}
        return [(what, tokenizer.apply_chat(said), int(tokenizer.render_chat(said).startswith(bos))) for what, said in chats.items()]
    except UserError:
        return []


def _leading(ids: list[int], bos: int) -> int:
    """How many BOS come before anything else."""
    return next((place for place, index in enumerate(ids) if index != bos), len(ids))
