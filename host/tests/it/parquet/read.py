"""Prints as JSON what pyarrow and DuckDB read in the Parquet files below a folder: the types of the columns
and every row, each value as a text that must be the same for both."""

import datetime
import glob
import json
import sys

import duckdb
import pyarrow
import pyarrow.parquet

FILES = sorted(glob.glob(sys.argv[1] + "/**/*.parquet", recursive=True))
EPOCH = datetime.datetime(1970, 1, 1, tzinfo=datetime.timezone.utc)


def shown(value):
    if value is None:
        return None
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, datetime.datetime) and value.tzinfo is not None:
        return str((value - EPOCH) // datetime.timedelta(microseconds=1))
    if isinstance(value, (datetime.datetime, datetime.time)):
        return value.isoformat(timespec="microseconds")
    return str(value)


def by_pyarrow():
    tables = [pyarrow.parquet.read_table(file, partitioning=None) for file in FILES]
    table = pyarrow.concat_tables(tables)
    types = {field.name: str(field.type) for field in table.schema}
    columns = [column.to_pylist() for column in table.columns]
    rows = [[shown(value) for value in row] for row in zip(*columns)]
    return {"types": types, "rows": rows}


def by_duckdb():
    database = duckdb.connect()
    source = f"read_parquet({FILES!r}, hive_partitioning = false)"
    described = database.execute(f"DESCRIBE SELECT * FROM {source}").fetchall()
    types = {column[0]: column[1] for column in described}
    # DuckDB needs another Python package to return values of this type.
    values = ", ".join(
        f'epoch_us("{name}")' if kind == "TIMESTAMP WITH TIME ZONE" else f'"{name}"'
        for name, kind in types.items()
    )
    rows = database.execute(f"SELECT {values} FROM {source}").fetchall()
    return {"types": types, "rows": [[shown(value) for value in row] for row in rows]}


json.dump({"pyarrow": by_pyarrow(), "duckdb": by_duckdb()}, sys.stdout)
