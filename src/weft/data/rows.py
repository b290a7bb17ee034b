"""Files of records as rows with named columns: JSON Lines, JSON arrays, CSV, TSV, Parquet, and datasets of a hub."""

import csv
import io
import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from weft.data.documents import decode, open_binary
from weft.errors import UserError

KINDS = {dict: "an object", list: "a list", str: "a string", bool: "true or false", int: "a number", float: "a number", type(None): "null"}
JSONL, JSON, PARQUET = (".jsonl", ".ndjson"), (".json",), (".parquet", ".pq")
DELIMITERS = {".csv": ",", ".tsv": "\t"}
ROW_FILES = (*JSONL, *JSON, *DELIMITERS, *PARQUET)
PARQUET_ROWS = 1024  # rows held at once
HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(:\w+)?")
_BOM = b"\xef\xbb\xbf"
_WHOLE = re.compile(r"\s*[+-]?\d{1,9}\s*")


@dataclass(frozen=True)
class Row:
    """One record as its file has it; `origin` is "file:row", for messages."""

    columns: Mapping[str, Any]
    origin: str


Rows = Iterator[Row | UserError]  # an error stands in the place of a row that cannot be read, so that a check can go on


def ending(path: Path) -> str:
    """The ending that tells a file's format: `.jsonl` for `a.jsonl.gz`."""
    return (path.with_suffix("") if path.suffix == ".gz" else path).suffix.lower()


def is_hub_name(path: str | Path) -> bool:
    """Whether a path that does not exist can be the name of a dataset: `owner/name`, or `owner/name:split`."""
    return HUB_NAME.fullmatch(str(path)) is not None and not Path(path).exists() and ending(Path(str(path))) not in ROW_FILES


def read_rows(path: str | Path, known: Collection[str] = (), labelled: bool = False) -> Rows:
    """The rows of one file, by the ending of its name (`.gz` is read through), or of a dataset on the hub.

    known     column names, in lower case: the first line of a CSV or TSV file has to have one of them.
    labelled  or else may be a text and its label already, where it looks like that.
    Raises UserError for a file that cannot be read at all; a bad row is an error in its place.
    """
    if is_hub_name(path):
        return _hub_rows(str(path))
    path = Path(path)
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise UserError(f"{path} {what}; give a file of records ({', '.join(ROW_FILES)}), or the name of a dataset, such as owner/name.")
    kind = ending(path)
    if kind in JSONL:
        return read_jsonl_rows(path)
    if kind in JSON:
        return _json_rows(path)
    if kind in DELIMITERS:
        return _table_rows(path, DELIMITERS[kind], known, labelled)
    if kind in PARQUET:
        return read_parquet_rows(path)
    raise UserError(f"{path} is no file of records, judged by its name; give one that ends in {', '.join(ROW_FILES)}.")


def read_jsonl_rows(path: Path) -> Rows:
    """The object of every line; blank lines are skipped. A line that is not UTF-8, not JSON or no object is an error in its place."""
    with open_binary(path) as file:
        number = 0
        try:
            for number, line in enumerate(file, 1):
                line = line.removeprefix(_BOM) if number == 1 else line
                if line.strip():
                    yield _parsed(line, path, number)
        except (OSError, EOFError) as error:
            raise UserError(f"{path}:{number + 1}: reading stopped ({error}); the file may be cut short: fetch it again.") from None


def _parsed(line: bytes, path: Path, number: int) -> Row | UserError:
    origin = f"{path}:{number}"
    try:
        return Row(_parse(decode(line, path, number).rstrip("\r\n"), path, number), origin)
    except UserError as error:
        return error


def _parse(line: str, path: Path, number: int) -> dict[str, Any]:
    """The JSON object of one line."""
    record = _load(line, path, number, "write each record as one JSON object on one line")
    if not isinstance(record, dict):
        fix = ' Turn a JSON array into lines with `jq -c ".[]" FILE`.' if isinstance(record, list) else ""
        raise UserError(f'{path}:{number}: the line is {KINDS[type(record)]}, not an object; write records like {{"text": "…"}}.{fix}')
    return record


def _load(text: str, path: Path, number: int | None, fix: str) -> Any:
    """What the JSON of a line says, or of a whole file, which has no number."""
    try:
        return json.loads(text, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        what, place = error.msg[0].lower() + error.msg[1:], f"{path}:{number or error.lineno}"
        raise UserError(f"{place}: bad JSON at column {error.colno} ({what}) in {_excerpt(text, error.pos)}; {fix}.") from None
    except (RecursionError, ValueError) as error:
        place = str(path) if number is None else f"{path}:{number}"
        raise UserError(f"{place}: bad JSON ({error}); {fix}, each key once.") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; raises ValueError for a key that comes twice, of which `json` would keep the last."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"the key '{Counter(name for name, _ in pairs).most_common(1)[0][0]}' comes twice in one object")
    return found


def _excerpt(line: str, position: int) -> str:
    """About 40 characters around a position, as a quoted string."""
    start = max(0, position - 20)
    return repr(line[start : position + 20])


def _json_rows(path: Path) -> Rows:
    """The objects of a JSON array, counted from 1; a file of that name that begins with an object is read line by line."""
    with open_binary(path) as file:
        try:
            data = file.read().removeprefix(_BOM)
        except (OSError, EOFError) as error:
            raise UserError(f"{path}: reading stopped ({error}); the file may be cut short: fetch it again.") from None
    if data.lstrip()[:1] == b"{":
        yield from (_parsed(line, path, number) for number, line in enumerate(io.BytesIO(data), 1) if line.strip())
        return
    values = _load(decode(data, path, 1), path, None, "write an array of objects")
    if not isinstance(values, list):
        raise UserError(f"{path} is {KINDS[type(values)]}, not a list of records; write an array of objects.")
    for number, value in enumerate(values, 1):
        origin = f"{path}:{number}"
        wrong = UserError(f"{origin}: the record is {KINDS[type(value)]}, not an object; give every record its columns by name.")
        yield Row(value, origin) if isinstance(value, dict) else wrong


def _table_rows(path: Path, delimiter: str, known: Collection[str], labelled: bool) -> Rows:
    """The rows of a CSV or TSV file, numbered by the line they begin on."""
    names: tuple[str, ...] = ()
    for number, cells in _cells(path, delimiter):
        origin = f"{path}:{number}"
        if not names:
            names = tuple(cell.strip() for cell in cells)
            if {name.lower() for name in names} & set(known):
                check_names(names, origin)
                continue
            if not labelled or not _is_labelled(cells, path, delimiter):
                raise UserError(
                    f"{origin}: the first line has no column name that is known ({', '.join(name[:20] for name in names[:5])}); begin the "
                    f"file with a header of those that are: {', '.join(sorted(known))}."
                )
            names = "text", "label"
        if len(cells) != len(names):
            yield UserError(f"{origin}: the row has {len(cells)} columns, but the file {len(names)} ({', '.join(names)}); mend it.")
        else:
            yield Row(dict(zip(names, map(_typed, names, cells), strict=True)), origin)


def _cells(path: Path, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """The rows of a CSV or TSV file that are not empty, with the line each begins on. Quotes in a TSV file are ordinary characters."""
    csv.field_size_limit(sys.maxsize)
    quoting: Literal[0, 3] = csv.QUOTE_MINIMAL if delimiter == "," else csv.QUOTE_NONE
    before = 0
    with open_binary(path) as file:
        lines = (decode(line.removeprefix(_BOM) if n == 1 else line, path, n) for n, line in enumerate(file, 1))
        reader = csv.reader(lines, delimiter=delimiter, quoting=quoting, strict=True)
        try:
            for cells in reader:
                number, before = before + 1, reader.line_num
                if any(cells):
                    yield number, cells
        except csv.Error as error:
            raise UserError(
                f"{path}:{before + 1}: the row that begins here has quotes that do not close a cell ({error}); put a cell with quotes, "
                "commas or line ends in quotes and double the quotes within it, or fetch the file again."
            ) from None
        except (OSError, EOFError) as error:
            raise UserError(f"{path}:{before + 1}: reading stopped ({error}); fetch the file again.") from None


def _is_labelled(cells: Sequence[str], path: Path, delimiter: str) -> bool:
    """Whether the first line is a text and its label, for it cannot be a header: a whole number, or what is a label of a later row, too."""
    if len(cells) != 2 or _WHOLE.fullmatch(cells[1]):
        return len(cells) == 2
    rows = _cells(path, delimiter)
    next(rows)
    return any(later[1:] == cells[1:] for _, later in rows)


def check_names(names: Iterable[str], where: str) -> None:
    """Raise UserError where two columns have the same name, for one would take the place of the other."""
    seen: dict[str, str] = {}
    for name in filter(None, names):
        key = name.lower()
        if key in seen:
            raise UserError(f"{where}: '{seen[key]}' and '{name}' are one name for two columns (case does not matter); rename or drop one.")
        seen[key] = name


def _typed(name: str, cell: str) -> str | int | float | None:
    """A table has no types: a label that is a whole number is one there, and so is a margin a number, or nothing in an empty cell."""
    if name.lower() == "label" and _WHOLE.fullmatch(cell):
        return int(cell)
    if name.lower() == "margin":
        try:
            return float(cell) if cell.strip() else None
        except ValueError:
            return cell
    return cell


def read_parquet_rows(path: Path, choose: Callable[[Any], Sequence[str]] | None = None) -> Iterator[Row]:
    """Every row, `PARQUET_ROWS` held at once; `choose` names the columns to read from the file's Arrow schema.

    Raises UserError where pyarrow is not installed, or the file is damaged.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{path} is Parquet, which needs pyarrow; install it with: pip install 'weft[data]'.") from None
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            columns = None if choose is None else list(choose(file.schema_arrow))
            if columns is None:
                check_names(file.schema_arrow.names, str(path))
            for batch in file.iter_batches(batch_size=PARQUET_ROWS, columns=columns):
                for record in batch.to_pylist():
                    number += 1
                    yield Row(record, f"{path}:{number}")
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path}: not readable as Parquet after row {number} ({reason}); write or fetch the file again.") from None


def _hub_rows(name: str) -> Rows:
    """The rows of a dataset on the hub, its `train` split unless another is named after a colon."""
    try:
        import datasets
    except ImportError:
        raise UserError(f"there is no file {name}, and the hub's need: pip install 'weft[datasets]'; or give a file.") from None
    repository, _, split = name.partition(":")
    try:
        rows = datasets.load_dataset(repository, split=split or "train")
    except Exception as error:  # whatever the hub, the network or the dataset's own files raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"there is no file {name}, and no dataset of that name could be fetched ({reason}); give a file of records, or check name and "
            "network."
        ) from None
    for number, columns in enumerate(rows, 1):
        yield Row(columns, f"{name}:{number}")


def text_of(value: Any, where: str, may_be_empty: bool = False) -> str:
    """A string with something in it; `where` is "file:row: column 'name'". Raises UserError for anything else."""
    if not isinstance(value, str):
        kind = KINDS.get(type(value), type(value).__name__)
        raise UserError(f"{where} is {kind}, not a string; make it a string, or drop the record.")
    if not may_be_empty and not value.strip():
        raise UserError(f"{where} is empty; write what is said there, or drop the record.")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        code = ord(value[error.start])
        raise UserError(
            f"{where} has half of a surrogate pair (\\u{code:04x}) at character {error.start + 1}, which is no character; write the whole "
            "pair, or drop it."
        ) from None
    return value
