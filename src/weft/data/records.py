"""Records with fields as documents: JSON Lines and Parquet."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from weft.data.documents import Document, decode, open_binary
from weft.errors import UserError, nearest

KINDS = {dict: "an object", list: "a list", str: "a string", bool: "true or false", int: "a number", float: "a number", type(None): "null"}
PARQUET_ROWS = 1024  # rows held at once


def read_jsonl_documents(path: Path, field: str | None = None) -> Iterator[Document]:
    """Yield the document of every line; blank lines are skipped.

    A record gives `field`, or without one `text`, or else `prompt` and `completion`. Raises UserError with file, row and column
    for bad JSON, bytes that are not UTF-8, a missing field or one that is not a string.
    """
    with open_binary(path) as file:
        row = 0
        try:
            for row, line in enumerate(file, 1):
                if row == 1:
                    line = line.removeprefix(b"\xef\xbb\xbf")
                if line.strip():
                    yield to_document(_parse(decode(line, path, row).rstrip("\r\n"), f"{path}:{row}"), field, f"{path}:{row}")
        except (OSError, EOFError) as error:
            raise UserError(f"{path}:{row + 1}: reading stopped ({error}); the file may be cut short: fetch it again.") from None


def _parse(line: str, origin: str) -> dict[str, Any]:
    """The JSON object of one line."""
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        what = error.msg[0].lower() + error.msg[1:]
        raise UserError(
            f"{origin}: bad JSON at column {error.colno} ({what}) in {_excerpt(line, error.pos)}; "
            "write each record as one JSON object on one line."
        ) from None
    except (RecursionError, ValueError) as error:
        raise UserError(f"{origin}: bad JSON ({error}); write each record as one JSON object on one line.") from None
    if not isinstance(record, dict):
        what = KINDS[type(record)]
        fix = ' Turn a JSON array into lines with `jq -c ".[]" FILE`.' if isinstance(record, list) else ""
        raise UserError(f'{origin}: the line is {what}, not an object; write records like {{"text": "…"}}.{fix}')
    return record


def _excerpt(line: str, position: int) -> str:
    """About 40 characters around a position, as a quoted string."""
    start = max(0, position - 20)
    return repr(line[start : position + 20])


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
    value = record[field]
    if not isinstance(value, str):
        kind = KINDS.get(type(value), type(value).__name__)
        raise UserError(f"{origin}: field '{field}' is {kind}, not a string; make it a string or drop the record.")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        code = ord(value[error.start])
        raise UserError(
            f"{origin}: field '{field}' has half of a surrogate pair (\\u{code:04x}) at character {error.start + 1}, which is no "
            "character; write the whole pair or drop it."
        ) from None
    return value


def _missing(record: Mapping[str, Any], field: str, origin: str) -> UserError:
    names = sorted(str(name) for name in record)
    held = f"it has {', '.join(names)}" if names else "it is empty"
    guess = nearest(field, names)
    return UserError(
        f"{origin}: there is no field '{field}' in the record ({held}).{guess} Records need `text`, or `prompt` and `completion`, "
        "or the field that --field names."
    )


def read_parquet_documents(path: Path, field: str | None = None) -> Iterator[Document]:
    """Yield the document of every row, reading `PARQUET_ROWS` rows at a time; columns are chosen as in `read_jsonl_documents`.

    Raises UserError where pyarrow is not installed, the file is damaged, or a column is missing or holds no strings.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{path} is Parquet, which needs pyarrow; install it with: pip install 'weft[data]'.") from None
    row = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            schema = file.schema_arrow
            columns = _parquet_columns(schema.names, field, path)
            for name in columns:
                _check_column(str(schema.field(name).type), name, path)
            for batch in file.iter_batches(batch_size=PARQUET_ROWS, columns=list(columns)):
                for record in batch.to_pylist():
                    row += 1
                    yield to_document(record, field, f"{path}:{row}")
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path}: not readable as Parquet after row {row} ({reason}); write or fetch the file again.") from None


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
