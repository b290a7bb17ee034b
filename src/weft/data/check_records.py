"""What a file of tuning records holds, how it encodes, and all that is wrong with it: for `weft data check`."""

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby, islice
from typing import Any

from weft.data.encode_records import Encoded, RecordEncoder
from weft.data.read_records import NAMES, TEXTS, FileRecords, list_files
from weft.data.record_kinds import Completion, Conversation, Labelled, PlainText, Preference, Prompt, Record
from weft.errors import UserError, unknown
from weft.tokenizer import Tokenizer

SHOWN_ERRORS, SHOWN_SAMPLES = 10, 3
# What each objective reads.
READS: dict[str, tuple[type, ...]] = {
    "sft": TEXTS,
    "distill": TEXTS,
    "dpo": (Preference,),
    "reward": (Preference,),
    "classify": (Labelled,),
    "ppo": (Prompt,),
    "grpo": (Prompt,),
    "rejection": (Prompt,),
}


@dataclass(frozen=True)
class Run:
    """Consecutive tokens of a sample that are, or are not, trained on."""

    text: str
    trained: bool


@dataclass(frozen=True)
class Sample:
    """A record as a model reads it; `part` says which of its texts (chosen, rejected) where it has several."""

    origin: str
    part: str
    runs: tuple[Run, ...]


@dataclass
class Findings:
    """What was found.

    files       (path, format, records) of each file; the format is None where no row could be read.
    kinds       how many records there are of each kind.
    lengths     tokens of each text, after truncation; a pair has two texts.
    truncated   texts that were cut, and how many tokens they lost together.
    duplicates  records that say the same as an earlier one.
    labels      how often each class comes.
    errors      the first of them; `num_errors` are all.
    """

    files: list[tuple[str, str | None, int]] = field(default_factory=list)
    kinds: Counter[str] = field(default_factory=Counter)
    lengths: list[int] = field(default_factory=list)
    trained_tokens: int = 0
    truncated: int = 0
    cut_tokens: int = 0
    duplicates: int = 0
    labels: Counter[str] = field(default_factory=Counter)
    samples: list[Sample] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    num_errors: int = 0

    @property
    def num_records(self) -> int:
        return sum(self.kinds.values())

    def quantiles(self) -> dict[str, int]:
        """The shortest and longest length and some between."""
        if not self.lengths:
            return {}
        ordered = sorted(self.lengths)
        at = {"shortest": 0.0, "10%": 0.1, "median": 0.5, "90%": 0.9, "longest": 1.0}
        return {name: ordered[round(share * (len(ordered) - 1))] for name, share in at.items()}

    def histogram(self) -> list[tuple[int, int]]:
        """(upper bound, texts) of each doubling of the length."""
        counts = Counter(max(4, (length - 1).bit_length()) for length in self.lengths)
        return [(1 << power, counts[power]) for power in range(min(counts), max(counts) + 1)] if counts else []

    def to_json(self) -> dict[str, Any]:
        tokens = sum(self.lengths)
        return {
            "files": [{"path": path, "format": known, "records": count} for path, known, count in self.files],
            "records": self.num_records,
            "kinds": dict(self.kinds),
            "texts": len(self.lengths),
            "tokens": tokens,
            "trained_tokens": self.trained_tokens,
            "trained_share": self.trained_tokens / tokens if tokens else None,
            "lengths": self.quantiles(),
            "histogram": self.histogram(),
            "truncated": self.truncated,
            "cut_tokens": self.cut_tokens,
            "duplicates": self.duplicates,
            "labels": dict(self.labels),
            "samples": [
                {"origin": sample.origin, "part": sample.part, "runs": [[run.text, run.trained] for run in sample.runs]}
                for sample in self.samples
            ],
            "errors": self.errors,
            "num_errors": self.num_errors,
        }


def check_records(
    paths: str | Sequence[str], tokenizer: Tokenizer | None = None, objective: str | None = None, length: int | None = None
) -> Findings:
    """Read and encode every record, and go on after each that is wrong.

    tokenizer  None checks what the files say, and encodes nothing.
    objective  what the records are for, as in a recipe; None takes any kind.
    length     tokens of a row, a recipe's `batch.length`. Fine-tuning reads so many and foretells one more.
    """
    if objective is not None and objective not in READS:
        raise unknown("objective", objective, READS)
    found, seen = Findings(), set[int]()
    longest = None if length is None else length + (objective in ("sft", "distill"))
    encoder = None if tokenizer is None else RecordEncoder(tokenizer, longest)
    chance, kept = random.Random(0), list[tuple[str, dict[str, Encoded]]]()
    for path in list_files(paths):
        records = FileRecords(path, () if objective is None else READS[objective])
        before = found.num_records
        for record in records:
            try:
                if isinstance(record, UserError):
                    raise record
                texts = {} if encoder is None else _texts(encoder, record)
            except UserError as error:
                found.num_errors += 1
                found.errors += [str(error)] if len(found.errors) < SHOWN_ERRORS else []
                continue
            _count(found, record, texts, seen)
            if texts:
                shown = dict(islice(texts.items(), SHOWN_SAMPLES)) if isinstance(record, PlainText) else texts  # a book has many pieces
                _keep(kept, (record.origin, shown), found.num_records, chance)
        found.files.append((str(path), records.format.name if records.format else None, found.num_records - before))
    if not found.num_records and not found.num_errors:
        raise UserError(f"there is no record in {', '.join(path for path, _, _ in found.files)}; give a file that is not empty.")
    if tokenizer is not None:
        found.samples = [_sample(tokenizer, origin, part, text) for origin, texts in kept for part, text in texts.items()]
    return found


def _texts(encoder: RecordEncoder, record: Record) -> dict[str, Encoded]:
    """The texts of a record by what they are called; one that stands alone has no name."""
    if isinstance(record, Preference):
        pair = encoder.preference(record)
        return {"chosen": pair.chosen, "rejected": pair.rejected}
    if isinstance(record, Labelled):
        return {f"label {record.label}": encoder.labelled(record)}
    if isinstance(record, Prompt):
        ids = encoder.prompt(record.prompt, record.origin, record.tools)
        return {"prompt": Encoded(ids, (False,) * len(ids))}
    assert isinstance(record, Conversation | Completion | PlainText)
    texts = encoder.encode(record)
    if isinstance(record, PlainText) and len(texts) > 1:
        return {f"piece {number}": text for number, text in enumerate(texts, 1)}
    return {"" if number == 0 else f"earlier answer {number}": text for number, text in enumerate(texts)}


def _count(found: Findings, record: Record, texts: dict[str, Encoded], seen: set[int]) -> None:
    found.kinds[NAMES[type(record)]] += 1
    key = hash(repr(record).replace(repr(record.origin), ""))
    found.duplicates += key in seen
    seen.add(key)
    if isinstance(record, Labelled):
        found.labels[str(record.label)] += 1
    for text in texts.values():
        found.lengths.append(text.num_tokens)
        found.trained_tokens += text.num_trained
        found.truncated += text.cut > 0
        found.cut_tokens += text.cut


def _keep(kept: list[Any], candidate: Any, number: int, chance: random.Random) -> None:
    """The first record, and some of the others, each as likely as any (Vitter 1985, algorithm R)."""
    if len(kept) < SHOWN_SAMPLES:
        kept.append(candidate)
    elif (place := chance.randrange(number - 1)) < SHOWN_SAMPLES - 1:
        kept[place + 1] = candidate


def _sample(tokenizer: Tokenizer, origin: str, part: str, text: Encoded) -> Sample:
    runs = [
        Run(tokenizer.decode([token for token, _ in run], skip_special=False), trained)
        for trained, run in groupby(zip(text.ids, text.trained, strict=True), key=lambda pair: pair[1])
    ]
    return Sample(origin, part, tuple(runs))
