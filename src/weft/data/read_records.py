"""Records for tuning from files of any format that is known, checked row by row."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from weft.data.record_formats import KNOWN, Format, convert, detect, unrecognised
from weft.data.record_kinds import Completion, Conversation, Labelled, PlainText, Preference, Prompt, Record
from weft.data.rows import ROW_FILES, Row, ending, is_hub_name, read_rows
from weft.errors import UserError

R = TypeVar("R", Conversation, Completion, Preference, Labelled, Prompt, PlainText)
TEXTS = (Conversation, Completion, PlainText)  # what has tokens to learn to write
NAMES = {
    Conversation: "conversations",
    Completion: "prompts with completions",
    Preference: "pairs of a chosen and a rejected answer",
    Labelled: "texts with labels",
    Prompt: "prompts",
    PlainText: "texts",
}


def read_records(paths: str | Path | Sequence[str | Path], kind: type[R] | None = None, dropped: list[UserError] | None = None) -> list[R]:
    """All records of some files, or of datasets of a hub, in order.

    kind     what they have to be: records that say more are cut down to it (prompts of conversations, completions or pairs). None takes
             what the files hold.
    dropped  where given, rows that are wrong are left out and their errors put there.
    Raises UserError for the first row that is wrong, with file, row and column, and for files without a record.
    """
    found: list[Any] = list(iterate_records(paths, () if kind is None else (kind,), dropped))
    if not found:
        why = f": all of {len(dropped)} rows are wrong, the first one being {dropped[0]}" if dropped else "; give a file that is not empty."
        raise UserError(f"there is no record in {', '.join(map(str, list_files(paths)))}{why}")
    return found


def iterate_records(
    paths: str | Path | Sequence[str | Path], kinds: Sequence[type] = (), dropped: list[UserError] | None = None
) -> Iterator[Record]:
    """`read_records` one record at a time; any of several kinds will do."""
    for path in list_files(paths):
        for found in FileRecords(path, kinds):
            if not isinstance(found, UserError):
                yield found
            elif dropped is None:
                raise found
            else:
                dropped.append(found)


@dataclass
class FileRecords:
    """The records of one file; an error stands in the place of a row that is wrong. `format` is known once the first row is read."""

    path: str | Path
    kinds: Sequence[type] = ()
    format: Format | None = field(default=None, init=False)

    def __iter__(self) -> Iterator[Record | UserError]:
        for row in read_rows(self.path, KNOWN, labelled=not self.kinds or Labelled in self.kinds):
            if isinstance(row, UserError):
                yield row
            else:
                yield from self._records(row)

    def _records(self, row: Row) -> Iterator[Record | UserError]:
        try:
            if self.format is None:
                names = [str(name).lower() for name in row.columns]
                self.format = detect(names, self.kinds)
                if self.format is None:
                    raise unrecognised(names, row.origin)
            records = convert(self.format, row.columns, row.origin)
            found: Iterable[Record] = records if not self.kinds else _as_kinds(records, self.kinds, row)
        except UserError as error:
            yield error
            return
        yield from found


def _as_kinds(records: Sequence[Record], kinds: Sequence[type], row: Row) -> list[Record]:
    """The records of a row as one of `kinds`; raises UserError where they say too little for any of them."""
    if type(records[0]) in kinds:
        return list(records)
    record = records[0]
    if Prompt in kinds and isinstance(record, Conversation | Completion | Preference):
        return [_prompt_of(record)]
    if Conversation in kinds and isinstance(record, Prompt) and not isinstance(record.prompt, str):
        answer = record.facts.get("answer")
        if isinstance(answer, str) and answer.strip():
            return [Conversation((*record.prompt, {"role": "assistant", "content": answer}), record.origin, record.tools)]
    raise unrecognised([str(name).lower() for name in row.columns], row.origin, kinds)


def _prompt_of(record: Conversation | Completion | Preference) -> Prompt:
    """What was asked, and what the record has for an answer among the facts."""
    if isinstance(record, Completion):
        return Prompt(record.prompt, record.origin, {"completion": record.completion}, record.tools)
    if isinstance(record, Preference):
        return Prompt(record.prompt, record.origin, {"chosen": record.chosen, "rejected": record.rejected}, record.tools)
    last = max(index for index, message in enumerate(record.messages) if message["role"] == "assistant")
    return Prompt(record.messages[:last], record.origin, {"completion": record.messages[last:]}, record.tools)


def list_files(paths: str | Path | Sequence[str | Path]) -> list[Path | str]:
    """Files one by one, with those of folders in sorted order."""
    found: list[Path | str] = []
    for path in [paths] if isinstance(paths, str | Path) else paths:
        if is_hub_name(path) or not Path(path).is_dir():
            found.append(path)
            continue
        inside = sorted(file for file in Path(path).iterdir() if ending(file) in ROW_FILES and not file.name.startswith("."))
        if not inside:
            raise UserError(f"the folder {path} has no file of records in it ({', '.join(ROW_FILES)}); give one that has, or a file.")
        found += inside
    return found
