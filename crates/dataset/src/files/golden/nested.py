"""Writes nested.parquet beside this script: a data set of others in nested columns, as `datasets` saves it.

    python3 -m venv venv && venv/bin/pip install pyarrow==26.0.1
    venv/bin/python nested.py
"""

import pathlib

import pyarrow as pa
import pyarrow.parquet as pq


def call(name, **arguments):
    return {"id": "c", "type": "function", "function": {"name": name, "arguments": arguments}}


def tool(name, **properties):
    return {"type": "function", "function": {"name": name, "description": "d", "parameters": {"type": "object", "properties": properties}}}


ROWS = [
    {"id": "one", "reward": 0.5, "messages": [
        {"role": "user", "content": "?"},
        {"role": "assistant", "content": "\n\n", "reasoning_content": "hm", "tool_calls": [call("open", url="a – b")]},
        {"role": "tool", "tool_call_id": "c", "content": "ok"},
        {"role": "assistant", "content": None, "tool_calls": [call("click", ref=5, deep={"x": [1, 2]})]},
    ], "tools": [tool("open", url={"type": "string"}), tool("click", ref={"type": "integer"})]},
    {"id": "two", "messages": [{"role": "assistant", "content": "hi"}], "tools": [{"name": "bare"}]},
    {"id": "three", "messages": [{"role": "narrator", "content": "hi"}], "tools": None},
]

# Arrow finds one type for all rows: each struct has the fields of all of them.
table = pa.Table.from_pylist(ROWS)
assert "null" not in str(table.schema), table.schema
pq.write_table(table, pathlib.Path(__file__).with_name("nested.parquet"), compression="snappy")
