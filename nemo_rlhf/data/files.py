"""Opening what records come from: files of several kinds, directories, data sets of a hub, and lists in memory.

What a file is, its first bytes decide before its name does.
"""

from __future__ import annotations

import bz2
import csv
import glob
import gzip
import io
import lzma
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import IO, Any

from nemo_rlhf.data.jsons import read_jsons
from nemo_rlhf.untrusted import is_lfs_pointer

Source = str | Path | Sequence[Any]
# A place, and the record there or the error that says why there is none: one wrong line does not hide the others.
Located = Iterator[tuple[str, Any]]

TABLES = {".csv": ",", ".tsv": "\t"}
SUFFIXES = {".jsonl", ".json", ".parquet", ".gz", ".zst", ".bz2", ".xz", ".txt", ".arrow", ".yaml", *TABLES}
_HUB_NAME = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(/(?P<config>[\w.-]+))?(:(?P<split>[\w.%\[\]:+-]+))?")
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bz2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_NOT_READ = {
    b"PK\x03\x04": "a zip archive: unpack it, and name the file in it",
    b"\xff\xfe": "text in UTF-16: save it in UTF-8",
    b"\xfe\xff": "text in UTF-16: save it in UTF-8",
    b"ARROW1": "an Arrow file: name the directory that datasets' save_to_disk wrote, or a parquet file",
    b"\xff\xff\xff\xff": "an Arrow file: name the directory that datasets' save_to_disk wrote, or a parquet file",
    b"\x89HDF": "an HDF5 file: save it as jsonl or parquet",
    b"SQLite": "a database: save its table as jsonl or parquet",
}
_HEAD_BYTES = 64
MAX_DEPTH = 100


class ArrowRecord(dict[str, Any]):
    """A record from a columnar file, where Arrow has put null for each key that another record's objects have."""


class CsvRecord(dict[str, Any]):
    """A record of a csv file, all of whose values are text."""


def locate_records(source: Source, what: str) -> Located:
    """Yields (place, record) of a source, which is a file (jsonl, json, csv, parquet; also compressed), a pattern of
    such files, a directory that ``datasets``' ``save_to_disk`` wrote, the name of a data set on a hub
    (``owner/name[/configuration][:split]``), or a sequence. In the place of a record that cannot be read stands the
    ValueError that says why.

    ``what`` names one record ("prompt", "text"). Raises ValueError for a source that is missing, that is nothing which
    can be read at all, or that holds no record.
    """
    if not isinstance(source, (str, Path)) and len(source) == 0:
        raise ValueError(f"The list of {what}s is empty.")
    is_empty = True
    if isinstance(source, (str, Path)):
        located = _open(source, what)
    else:
        located = ((f"{what} {index}", record) for index, record in enumerate(source))
    for where, record in located:
        is_empty = False
        yield where, _unfit(where, record) or record
    if is_empty:
        raise ValueError(f"{source} is empty: it must hold at least one {what}.")


def read_records(source: Source, what: str) -> Iterator[tuple[str, Any]]:
    """Yields the (place, record) pairs of ``locate_records``. Raises the ValueError of a record that cannot be read."""
    for where, record in locate_records(source, what):
        if isinstance(record, ValueError):
            raise record
        yield where, record


def _open(source: str | Path, what: str) -> Located:
    path = Path(source).expanduser()
    try:
        is_directory, is_file = path.is_dir(), path.is_file()
    except OSError as error:  # a name that is too long, a directory that may not be entered
        raise ValueError(f"{path} cannot be read ({error.strerror}).") from None
    if is_directory:
        return _read_directory(path)
    if is_file:
        return _read_file(path)
    if re.search(r"[*?\[]", str(source)) and (found := sorted(glob.glob(str(path), recursive=True))):
        return chain.from_iterable(_open(name, what) for name in found)
    hub = _HUB_NAME.fullmatch(str(source))
    if hub and path.suffix not in SUFFIXES and not Path(hub["name"]).parent.exists():
        return _read_hub(hub["name"], hub["config"], hub["split"], what)
    raise ValueError(f"There is no file {path} to read {what}s from.")


def _read_file(path: Path) -> Located:
    try:
        file: Any = path.open("rb")
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}).") from None
    with file:
        head = file.peek(_HEAD_BYTES)[:_HEAD_BYTES]
        packing = next((name for magic, name in _COMPRESSED.items() if head.startswith(magic)), None)
        if packing is None:
            yield from _read_stream(path, file, path.suffix)
            return
        damage: tuple[type[Exception], ...] = (OSError, EOFError, zlib.error, lzma.LZMAError)
        try:
            with _unpacked(path, file, packing) as stream:
                yield from _read_stream(path, stream, Path(path.stem).suffix)
        except damage as error:
            raise ValueError(f"{path} cannot be unpacked ({error}): it is damaged, or was cut off.") from None


def _unpacked(path: Path, file: IO[bytes], packing: str) -> Any:
    if packing == "zstd":
        import pyarrow

        return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"))
    opener: Any = {"gzip": gzip.open, "bz2": bz2.open, "xz": lzma.open}[packing]
    return io.BufferedReader(opener(file, "rb"))


def _read_stream(path: Path, file: Any, suffix: str) -> Located:
    head = file.peek(_HEAD_BYTES)[:_HEAD_BYTES]
    wrong = next((words for magic, words in _NOT_READ.items() if head.startswith(magic)), None)
    if wrong:
        raise ValueError(f"{path} is {wrong}.")
    if is_lfs_pointer(head):
        raise ValueError(f"{path} is only a git-LFS pointer, not the file itself: run `git lfs pull` beside it.")
    if head.startswith(b"PAR1"):
        return _read_parquet(path)
    if suffix.lower() in TABLES and not head.lstrip().startswith((b"{", b"[")):
        return _read_csv(path, file, TABLES[suffix.lower()])
    return read_jsons(path, file, suffix.lower())


def _read_parquet(path: Path) -> Located:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            for batch in table.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    yield f"{path}, row {number}", ArrowRecord(row)
                    number += 1
    except (OSError, pyarrow.ArrowException) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} is no parquet file that can be read after row {number} ({reason}).") from None


def _read_csv(path: Path, file: Any, delimiter: str) -> Located:
    csv.field_size_limit(1 << 30)  # its default is less than a long chat
    # Bytes that are no UTF-8 become lone surrogates, which are refused with their line as they are everywhere.
    text = io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")
    rows = csv.reader(text, delimiter=delimiter, strict=True)
    header: list[str] = []
    line = 1
    while True:
        where = f"{path}, line {line}"
        try:
            row = next(rows, None)
        except csv.Error as error:
            raise ValueError(f"{where} is no row of a csv file ({error}).") from None
        if row is None:
            return
        line = rows.line_num + 1
        if not header:
            if not all(row) or len(set(row)) < len(row):
                raise ValueError(f"{where} must give each column of the csv file a name of its own.")
            header = row
        elif len(row) == len(header):
            yield where, CsvRecord(zip(header, row, strict=True))
        elif row:  # a blank line is no row
            yield where, ValueError(f"{where} has {len(row)} cells, and the header has {len(header)}.")


def _read_directory(path: Path) -> Located:
    import datasets

    try:
        dataset = datasets.load_from_disk(str(path))
    except FileNotFoundError:
        raise ValueError(
            f"{path} is a directory but no data set: give a file, a pattern such as {path}/*.jsonl, or what datasets' "
            "save_to_disk wrote."
        ) from None
    except Exception as error:  # it raises whatever its files bring about
        raise ValueError(f"{path} cannot be read as a data set ({' '.join(str(error).split())}).") from None
    if isinstance(dataset, datasets.DatasetDict):
        if len(dataset) != 1:
            splits = " or ".join(str(path / split) for split in dataset)
            raise ValueError(f"{path} holds several splits: give the directory of one, {splits}.")
        (dataset,) = dataset.values()
    return _rows(str(path), dataset)


def _read_hub(name: str, config: str | None, split: str | None, what: str) -> Located:
    import datasets

    given = name + (f"/{config}" if config else "") + (f":{split}" if split else "")
    try:
        found = datasets.load_dataset(name, config, split=split)
    except Exception as error:  # of the network, of the hub, of the files there
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"There is no file {given} to read {what}s from, and no data set of that name could be loaded from the hub "
            f"({reason})."
        ) from None
    if isinstance(found, dict):
        if len(found) != 1 and "train" not in found:
            splits = " or ".join(f"{given}:{one}" for one in found)
            raise ValueError(f"{given} has several splits: give one of them, {splits}.")
        found = found["train"] if "train" in found else next(iter(found.values()))
    return _rows(given, found)


def _rows(name: str, dataset: Iterable[Any]) -> Located:
    return ((f"{name}, row {index}", ArrowRecord(record)) for index, record in enumerate(dataset))


def _unfit(where: str, value: Any, depth: int = 0) -> ValueError | None:
    """The error for a value that cannot be encoded or gone through: text with half a surrogate pair, which JSON can
    write and no encoding can, or too many values within one another. None: it can."""
    parts: Iterable[Any] = ()
    if isinstance(value, str):
        try:
            value.isascii() or value.encode()
        except UnicodeEncodeError as error:
            return ValueError(
                f"{where} has text that is no Unicode ({value[error.start]!a} after {error.start} characters): repair "
                "the text, or remove the record."
            )
    elif isinstance(value, Mapping):
        parts = chain(value, value.values())
    elif isinstance(value, (list, tuple)):
        parts = value
    if parts and depth == MAX_DEPTH:
        return ValueError(f"{where} has more than {MAX_DEPTH} lists and objects within one another.")
    return next((wrong for part in parts if (wrong := _unfit(where, part, depth + 1))), None)
