"""Draws as the tables of other libraries: Arrow, pandas, Hugging Face datasets; all need the extra `data`."""

from __future__ import annotations

import importlib
import json
from typing import TYPE_CHECKING, Any

import torch

from lmppl.errors import MissingDependency
from lmppl.sequences import Draws
from lmppl.storage.records import FORMAT, Header, header_of, table_of

if TYPE_CHECKING:
    import datasets
    import pandas
    import pyarrow

__all__ = ["require", "to_arrow", "to_dataset", "to_pandas"]


def to_arrow(draws: Draws) -> pyarrow.Table:
    """One row a draw, as an Arrow table: prompt, text, ids, weights, a column for each feature and factor.

    Grouped columns are called `features.NAME`, `log_factors.NAME`, `columns.NAME`; `weight` is normalised
    within each context. The header stands in the schema's metadata.
    """
    arrow = require("pyarrow", "an Arrow table or a .parquet file")
    header, table = header_of(draws), table_of(draws)
    fields = [arrow.field(name, _arrow_type(arrow, name, header)) for name in table]
    metadata = {FORMAT: json.dumps(header)}
    return arrow.table(list(table.values()), schema=arrow.schema(fields, metadata=metadata))


def to_pandas(draws: Draws) -> pandas.DataFrame:
    """One row a draw, with the columns of `to_arrow`."""
    return require("pandas", "a data frame").DataFrame(table_of(draws))


def to_dataset(draws: Draws) -> datasets.Dataset:
    """One row a draw, as a Hugging Face dataset with the columns of `to_arrow`."""
    library = require("datasets", "a Hugging Face dataset")
    return library.Dataset(library.table.InMemoryTable(to_arrow(draws).replace_schema_metadata(None)))


def require(module: str, purpose: str) -> Any:
    """The optional module, or a `MissingDependency` that names the extra."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise MissingDependency(f"{purpose} needs {module}: pip install 'lmppl[data]'") from error


def _arrow_type(arrow: Any, name: str, header: Header) -> Any:
    plain = {
        "context": arrow.int64(),
        "prompt": arrow.string(),
        "text": arrow.string(),
        "ids": arrow.list_(arrow.int64()),
        "finished": arrow.bool_(),
        "weight": arrow.float64(),
    }
    if name in plain:
        return plain[name]
    dtype_name, *shape = header["columns"][name]
    dtype = getattr(torch, dtype_name)
    if dtype.is_floating_point:
        kind = arrow.float64() if dtype == torch.float64 else arrow.float32()
    else:
        kind = arrow.bool_() if dtype == torch.bool else arrow.int64()
    for _ in shape:
        kind = arrow.list_(kind)
    return kind
