"""Reads Parquet files, and Hugging Face datasets on disk (`Dataset.save_to_disk`), batch by batch."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cartridges.errors import UserError

PARQUET_SUFFIX = ".parquet"
BATCH_ROWS = 32
"""Rows read at once; few, because a row may be a book."""


@dataclass(frozen=True)
class Table:
    """The rows at `where`. `text_column` is the column named text, or else the only column of strings.

    `batches` reads the given columns as Arrow tables or record batches.
    """

    where: Path
    columns: tuple[str, ...]
    text_column: str
    batches: Callable[[list[str]], Iterator[Any]]

    def rows(self, *columns: str) -> Iterator[dict[str, Any]]:
        """The rows in order, with the existing ones of `columns` and without empty values."""
        wanted = [column for column in columns if column in self.columns]
        for batch in self.batches(wanted):
            yield from map(_without_none, batch.to_pylist())


def is_table(where: Path) -> bool:
    """Whether `where` is a Parquet file, a folder of only Parquet files, or a Hugging Face dataset."""
    if where.is_file():
        return where.suffix.lower() == PARQUET_SUFFIX
    return where.is_dir() and (_is_dataset(where) or bool(_parquet_files(where)))


def open_table(where: Path) -> Table:
    """The table at `where`. Raises `UserError` if it is damaged or has no text column."""
    from pyarrow import ArrowException

    try:
        return _open_dataset(where) if where.is_dir() and _is_dataset(where) else _open_parquet(where)
    except (ArrowException, OSError) as error:
        raise UserError(f"{where} cannot be read as a table: {str(error).splitlines()[0]}") from None


def _open_parquet(where: Path) -> Table:
    import pyarrow.parquet as pq

    files = _parquet_files(where) if where.is_dir() else [where]

    def batches(columns: list[str]) -> Iterator[Any]:
        for file in files:
            yield from pq.ParquetFile(file).iter_batches(BATCH_ROWS, columns=columns)

    schema = pq.read_schema(files[0])
    return Table(where, tuple(schema.names), _text_column(schema, where), batches)


def _open_dataset(where: Path) -> Table:
    from datasets import load_from_disk

    if (where / "dataset_dict.json").is_file():
        splits = sorted(path.name for path in where.iterdir() if (path / "state.json").is_file())
        raise UserError(f"{where} is a dataset of several splits; give the folder of one: "
                        f"{', '.join(str(where / split) for split in splits)}")
    dataset = load_from_disk(str(where))

    def batches(columns: list[str]) -> Iterator[Any]:
        return dataset.select_columns(columns).with_format("arrow").iter(BATCH_ROWS)

    schema = dataset.features.arrow_schema
    return Table(where, tuple(schema.names), _text_column(schema, where), batches)


def _is_dataset(folder: Path) -> bool:
    """Whether `folder` has the files that `save_to_disk` writes; a folder of documents may have a state.json too."""
    parts = (folder / "state.json", folder / "dataset_info.json")
    return all(part.is_file() for part in parts) or (folder / "dataset_dict.json").is_file()


def _parquet_files(folder: Path) -> list[Path]:
    """The files of a folder that holds only Parquet files, in order; otherwise none."""
    files = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    return files if all(path.is_file() and path.suffix.lower() == PARQUET_SUFFIX for path in files) else []


def _text_column(schema, where: Path) -> str:
    import pyarrow as pa

    if "text" in schema.names:
        return "text"
    strings = [field.name for field in schema
               if pa.types.is_string(field.type) or pa.types.is_large_string(field.type)]
    strings = [name for name in strings if name != "corpus_id"]
    if len(strings) == 1:
        return strings[0]
    raise UserError(f"{where} has no column \"text\" (its columns: {', '.join(schema.names[:8])}); rename the one "
                    "that holds the text")


def _without_none(value: Any) -> Any:
    """`value` without the None that Arrow fills in for missing fields."""
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return [_without_none(item) for item in value] if isinstance(value, list) else value
