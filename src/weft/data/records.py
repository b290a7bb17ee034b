"""Records with fields as documents: JSON Lines and Parquet."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from weft.data.documents import Document
from weft.data.rows import read_jsonl_rows, read_parquet_rows, text_of
from weft.errors import UserError, nearest


def read_jsonl_documents(path: Path, field: str | None = None) -> Iterator[Document]:
    """Yield the document of every line; blank lines are skipped.

    A record gives `field`, or without one `text`, or else `prompt` and `completion`. Raises UserError with file, row and column
    for bad JSON, bytes that are not UTF-8, a missing field or one that is not a string.
    """
    for row in read_jsonl_rows(path):
        if isinstance(row, UserError):
            raise row
        yield to_document(row.columns, field, row.origin)


def to_document(record: Mapping[str, Any], field: str | None, origin: str) -> Document:
    """The document of one record; raises UserError naming the row and the field that is missing or not a string."""
    if field is not None:
        return Document(_string(record, field, origin), origin)
    if "text" in record:
        return Document(_string(record, "text", origin), origin)
    if "prompt" in record and "completion" in record:
        return Document(_string(record, "completion", origin), origin, prompt=_string(record, "prompt", origin))
    missing = "completion" if "prompt" in record else "prompt" if "completion" in record else "text"
    raise _missing(record, missing, origin)


def _string(record: Mapping[str, Any], field: str, origin: str) -> str:
    if field not in record:
        raise _missing(record, field, origin)
    return text_of(record[field], f"{origin}: field '{field}'", may_be_empty=True)


def _missing(record: Mapping[str, Any], field: str, origin: str) -> UserError:
    names = sorted(str(name) for name in record)
    held = f"it has {', '.join(names)}" if names else "it is empty"
    guess = nearest(field, names)
    chat = next((name for name in ("messages", "conversations", "instruction") if name in names), None)
    tuned = f" Records with `{chat}` are for tuning, which reads them as they are: train on them with objective=sft." if chat else ""
    return UserError(
        f"{origin}: there is no field '{field}' in the record ({held}).{guess} Records need `text`, or `prompt` and `completion`, "
        f"or the field that --field names.{tuned}"
    )


def read_parquet_documents(path: Path, field: str | None = None) -> Iterator[Document]:
    """Yield the document of every row, a few held at once; columns are chosen as in `read_jsonl_documents`.

    Raises UserError where pyarrow is not installed, the file is damaged, or a column is missing or holds no strings.
    """

    def choose(schema: Any) -> Sequence[str]:
        names = _parquet_columns(schema.names, field, path)
        for name in names:
            _check_column(str(schema.field(name).type), name, path)
        return names

    for row in read_parquet_rows(path, choose):
        yield to_document(row.columns, field, row.origin)


def _parquet_columns(names: Sequence[str], field: str | None, path: Path) -> Sequence[str]:
    if field is not None:
        wanted: Sequence[str] = (field,)
    else:
        wanted = ("text",) if "text" in names or not {"prompt", "completion"} & set(names) else ("prompt", "completion")
    for name in wanted:
        if name not in names:
            raise _missing(dict.fromkeys(names), name, f"{path}:1")
    return wanted


def _check_column(kind: str, name: str, path: Path) -> None:
    if "string" not in kind:
        raise UserError(f"{path}: column '{name}' is of type {kind}, not string; convert it, or name another with --field.")
