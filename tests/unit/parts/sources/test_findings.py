"""What is found in a data file: rows left out, columns not read, labels, duplicates; and that it
is read and rendered once."""

import datetime
import decimal
import json
import struct

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from template_families import renderer

import posttrain.parts.sources.dataset as dataset
from posttrain.core.errors import DataError
from posttrain.core.proofs import Subject
from posttrain.parts.shelf import Shelf
from posttrain.parts.sources.dataset import Dataset, DatasetRows

ROWS = [{"prompt": f"{i}+1=", "completion": f"{i + 1}"} for i in range(5)]


def turns(question, answer):
    return {
        "prompt": [{"role": "user", "content": question}],
        "completion": [{"role": "assistant", "content": answer}],
    }


def source(tmp_path, rows, *, family="chatml", context=200, seed=0, shelf=None, **options):
    if rows is not None:
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        (tmp_path / "d.jsonl").write_text("\n".join(lines), encoding="utf-8")
    spec = Dataset(**{"path": "d.jsonl", "assistant_mask": "prefix", **options})
    return DatasetRows(
        spec, root=tmp_path, renderer=renderer(family), context=context, seed=seed, shelf=shelf
    )


def refused(tmp_path, rows, **options):
    with pytest.raises(DataError) as error:
        source(tmp_path, rows, **options)
    return str(error.value)


# --- rows that cannot be used ------------------------------------------------------------------

BAD = {
    "not json": "{oops",
    "key twice": '{"prompt": "a", "prompt": "b", "completion": "c"}',
    "no answer": {"prompt": "a"},
    "empty answer": {"prompt": "a", "completion": " "},
    "answer of another type": {"prompt": "a", "completion": 7},
    "text and messages": {"prompt": "a", "completion": [{"role": "assistant", "content": "b"}]},
    "control token at the end": {"prompt": "<|im_start|>user", "completion": "c"},
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("place", [0, 2, 5])
def test_one_bad_row_is_named_and_can_be_left_out(tmp_path, name, place):
    rows = [*ROWS[:place], BAD[name], *ROWS[place:]]
    where = f"d.jsonl, row {place + 1}" if place or isinstance(BAD[name], str) else "d.jsonl"
    assert where in refused(tmp_path, rows)
    found = source(tmp_path, rows, bad_rows="skip")
    clean = source(tmp_path, ROWS)
    used = [
        {tuple(g.members[0].trajectory.tokens.tolist()) for g in s.draw(5, step=0)}
        for s in (found, clean)
    ]
    assert used[0] == used[1]
    assert (found.files[0].rows, found.files[0].skipped) == (5, 1)
    assert any(f"d.jsonl, row {place + 1}" in note for note in found.files[0].notes)
    data = next(p for p in found.files[0].proofs if p.subject is Subject.DATA)
    assert data.words == "6 rows: 1 of them left out and named"


def test_a_file_of_bad_rows_alone_is_refused(tmp_path):
    assert "row 1" in refused(tmp_path, ["{oops", "{again"], bad_rows="skip")
    assert "no row can be used" in refused(
        tmp_path, [{"prompt": "a", "completion": ""}], bad_rows="skip"
    )


def test_rows_too_long_are_said(tmp_path):
    rows = [*ROWS, {"prompt": "a", "completion": "b" * 300}]
    found = source(tmp_path, rows, too_long="skip").files[0]
    assert found.notes == ("1 row left out, longer than the context (the first: row 6)",)


# --- columns -----------------------------------------------------------------------------------


@pytest.mark.parametrize("column", ["tools", "images", "documents", "system", "input"])
def test_columns_that_say_more_to_the_model_are_refused_or_named(tmp_path, column):
    rows = [*ROWS, {**ROWS[0], "prompt": "z", column: ["x"]}]
    found = refused(tmp_path, rows)
    assert f"row 6: a value in {column}, which is not read" in found
    assert f"ignore: [{column}]" in found
    assert source(tmp_path, rows, ignore=(column,)).num_groups == 6
    empty = [
        {**row, column: value} for row, value in zip(ROWS, [None, "", [], {}, None], strict=True)
    ]
    assert source(tmp_path, empty).num_groups == 5


def test_other_columns_are_said(tmp_path):
    rows = [{**row, "id": n, "topic": "sums"} for n, row in enumerate(ROWS)]
    assert "columns that are not read: id, topic" in source(tmp_path, rows).files[0].notes
    named = source(tmp_path, rows, weight="id", ignore=("topic",)).files[0]
    assert not any("not read" in note for note in named.notes)


@pytest.mark.parametrize("label", [True, False, 0, 1, 1.0, "bad", "Chosen"])
@pytest.mark.parametrize("place", [0, 4])
def test_answers_with_a_judgement_are_no_demonstrations(tmp_path, label, place):
    rows = [dict(row) for row in ROWS]
    rows[place]["label"] = label
    assert "a label that is true or false" in refused(tmp_path, rows)
    assert source(tmp_path, rows, format="completion").num_groups == 5
    pairs = [turns("a", str(n)) for n in range(3)]
    chat = [{"messages": [*pair["prompt"], *pair["completion"]]} for pair in pairs]
    chat[1]["label"] = label
    assert "a label that is true or false" in refused(tmp_path, chat)


def test_duplicates_are_said(tmp_path):
    found = source(tmp_path, [*ROWS, ROWS[1], ROWS[1]]).files[0]
    assert found.rows == 7
    assert "2 rows duplicate others (the first: row 6)" in found.notes


# --- what the template does --------------------------------------------------------------------


def test_a_row_whose_answer_loses_text_is_named_allowed_or_left_out(tmp_path):
    rows = [turns("a", "b"), turns("a", "    return 1"), turns("a", "c")]
    assert "d.jsonl, row 2: the template cuts whitespace at the start" in refused(
        tmp_path, rows, family="gemma"
    )
    left = source(tmp_path, rows, family="gemma", bad_rows="skip").files[0]
    assert (left.rows, left.skipped) == (2, 1)
    found = source(tmp_path, rows, family="gemma", allow=("trim",)).files[0]
    assert found.notes == (
        "1 row: the template cuts whitespace at the start of a message: '    ' (message 2); the "
        "first: row 2",
    )
    rendering = next(p for p in found.proofs if p.subject is Subject.RENDERING)
    assert rendering.words.startswith("3 rows: text as written in 2, changes of the others named")


def test_proofs_say_what_held(tmp_path):
    found = source(tmp_path, [turns("a", "b"), turns("c", "d")], family="default_system").files[0]
    words = {p.subject: p.words for p in found.proofs}
    assert words[Subject.DATA] == "2 rows: all used"
    assert words[Subject.RENDERING].startswith(
        "2 rows: text as written in all; template adds a system prompt"
    )
    assert found.questions == {"a", "c"}


# --- Parquet -----------------------------------------------------------------------------------


def table(**columns):
    texts = {"prompt": pa.array(["a", "b", "c"]), "completion": pa.array(["x", "y", "z"])}
    return pa.table({**texts, **columns})


NOT_TEXT = pa.Array.from_buffers(
    pa.string(), 3, [None, pa.py_buffer(struct.pack("<4i", 0, 1, 2, 3)), pa.py_buffer(b"x\xffy")]
)
UNREADABLE = {
    "late nanoseconds": pa.array([None, 2**61, 0], pa.timestamp("ns")),
    "bytes that are no text": NOT_TEXT,
    "days beyond the calendar": pa.array([0, 2**30, 0], pa.int32()).cast(pa.date32()),
}
READABLE = {
    "dates": pa.array([datetime.date(2024, 1, 1)] * 3),
    "decimals": pa.array([decimal.Decimal("1.5")] * 3),
    "bytes": pa.array([b"\xff"] * 3),
    "nested nulls": pa.array(
        [[None], None, [{"a": None}]], pa.list_(pa.struct([("a", pa.int8())]))
    ),
    "a map": pa.array([[("k", 1)], None, []], pa.map_(pa.string(), pa.int64())),
    "a dictionary": pa.array(["u", "v", "u"]).dictionary_encode(),
    "large text": pa.array(["u", None, "v"], pa.large_string()),
    "not finite": pa.array([float("nan"), float("inf"), None]),
    "nothing": pa.nulls(3),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_a_cell_without_a_value_is_named_by_row_and_column(tmp_path, name):
    pq.write_table(table(extra=UNREADABLE[name]), tmp_path / "d.parquet")
    found = refused(tmp_path, None, path="d.parquet")
    assert "d.parquet, row 2: " in found
    assert "'extra'" in found
    assert "ignore: [extra]" in found
    assert source(tmp_path, None, path="d.parquet", ignore=("extra",)).num_groups == 3
    assert source(tmp_path, None, path="d.parquet", bad_rows="skip").num_groups == 2


@pytest.mark.parametrize("name", READABLE)
def test_columns_of_other_types_are_only_said(tmp_path, name):
    pq.write_table(table(extra=READABLE[name]), tmp_path / "d.parquet")
    found = source(tmp_path, None, path="d.parquet").files[0]
    assert found.rows == 3
    assert bool(found.notes) is (name != "nothing")


@pytest.mark.parametrize("edit", ["cut", "zeros", "no rows", "columns twice", "not parquet"])
def test_damaged_parquet_files_are_refused_by_name(tmp_path, edit):
    path = tmp_path / "d.parquet"
    pq.write_table(table().slice(0, 0) if edit == "no rows" else table(), path)
    content = path.read_bytes()
    if edit == "columns twice":
        pq.write_table(pa.Table.from_arrays([pa.array(["a"])] * 2, names=["prompt"] * 2), path)
    elif edit != "no rows":
        half = len(content) // 2
        zeros = content[:20] + bytes(half) + content[20 + half :]
        path.write_bytes({"cut": content[:half], "zeros": zeros, "not parquet": b"PAR1"}[edit])
    assert "d.parquet" in refused(tmp_path, None, path="d.parquet")


# --- once --------------------------------------------------------------------------------------


def test_a_file_is_rendered_once_per_content(tmp_path, monkeypatch):
    calls = []
    real = dataset.render_rows
    monkeypatch.setattr(dataset, "render_rows", lambda *a, **k: calls.append(1) or real(*a, **k))
    shelf = Shelf()
    first = source(tmp_path, ROWS, shelf=shelf)
    again = source(tmp_path, None, shelf=shelf, seed=1)
    assert len(calls) == 1
    assert {g.task for g in first.draw(5, step=0)} == {g.task for g in again.draw(5, step=0)}
    assert [g.task for g in first.draw(5, step=0)] != [g.task for g in again.draw(5, step=0)]
    (tmp_path / "e.jsonl").write_bytes((tmp_path / "d.jsonl").read_bytes())
    source(tmp_path, None, shelf=shelf, path="e.jsonl", name="d")
    assert len(calls) == 1, "the same content under another path"
    for change in ({"context": 100}, {"family": "phi4"}, {"allow": ("cut",)}, {"name": "other"}):
        before = len(calls)
        source(tmp_path, None, shelf=shelf, **change)
        assert len(calls) == before + 1, change
    source(tmp_path, ROWS[:3], shelf=shelf)
    assert len(calls) == 6, "other content"


def test_a_shelf_forgets_the_oldest():
    shelf = Shelf(size=2)
    for key in "abac":
        shelf.get(key, lambda key=key: [key])
    assert shelf.get("b", lambda: "made again") == "made again"
