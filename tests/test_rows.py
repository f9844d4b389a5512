"""Rows by their place: the same rows as json and csv give, at 8 bytes each."""

import csv
import gc
import json
import pickle
import tracemalloc

import numpy as np
import pytest

import medplib.data.json_text as json_module
from medplib.data import read
from medplib.data.json_text import scan_json
from medplib.data.rows import MemoryRows, ParseCsv, index_csv, index_json
from medplib.errors import InputError

VALUES = [{"a": "é" * i, "b": [i, {"c": None}]} for i in range(40)] + ["text", 7, 1.5, [], True]


@pytest.mark.parametrize("chunk", [1, 7, 64, 1 << 20])
@pytest.mark.parametrize("indent", [None, 3])
def test_a_list_gives_the_values_that_json_gives(tmp_path, monkeypatch, chunk, indent):
    monkeypatch.setattr(json_module, "CHUNK", chunk)
    path = tmp_path / "list.json"
    path.write_text(json.dumps(VALUES, indent=indent, ensure_ascii=False), encoding="utf-8")
    rows, kept = index_json(path, lambda number, row: number % 3 != 0)
    assert [rows[i] for i in range(len(rows))] == VALUES
    assert kept.tolist() == [i for i in range(len(VALUES)) if i % 3]
    again = pickle.loads(pickle.dumps(rows))  # noqa: S301
    assert again[12] == VALUES[12]


def test_lines_an_object_and_lists_inside_it(tmp_path):
    lines = tmp_path / "rows.jsonl"
    lines.write_text("\ufeff" + "\n".join(map(json.dumps, VALUES)) + "\n", encoding="utf-8")
    rows, kept = index_json(lines, lambda number, row: True)
    assert [rows[i] for i in range(len(rows))] == VALUES
    assert kept is None
    table = tmp_path / "object.json"
    table.write_text(json.dumps({"é": [1, 2], "b": {"c": [3]}}))
    pairs, _ = index_json(table, lambda number, row: True)
    assert [pairs[0], pairs[1]] == [("é", [1, 2]), ("b", {"c": [3]})]
    assert [(key, value) for key, _, value in scan_json(table, inside=("é",))] == [
        ("é", 1),
        ("é", 2),
        ("b", {"c": [3]}),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "a list or an object"),
        ("[1, 2", "']' should stand"),
        ('[{"a": 1}, {"a": ]', "a whole JSON value"),
        ("[1] 2", "the end"),
        ('{"a" 1}', "':' should stand"),
        ("[" * 100_000, "a whole JSON value"),
    ],
)
def test_text_that_is_no_json_is_refused_with_its_place(tmp_path, text, message):
    (tmp_path / "bad.json").write_text(text)
    with pytest.raises(InputError, match=message):
        list(scan_json(tmp_path / "bad.json"))


def test_bytes_that_are_no_text_and_a_missing_file(tmp_path):
    (tmp_path / "bad.json").write_bytes(b'["\xff"]')
    with pytest.raises(InputError, match="not UTF-8"):
        list(scan_json(tmp_path / "bad.json"))
    with pytest.raises(InputError, match="cannot be opened"):
        index_json(tmp_path / "gone.json", lambda number, row: True)


def test_csv_rows_with_quotes_line_breaks_and_a_mark(tmp_path):
    path = tmp_path / "table.csv"
    fields = [["é, x", 'say "a"', "two\nlines"], ["", 'inch 5"', "z"], ["1", "2", "3"]]
    with open(path, "w", encoding="utf-8-sig", newline="") as file:
        csv.writer(file).writerows([["a", "b ", "c"], *fields[:1], [], *fields[1:]])
    seen = []
    rows, kept = index_csv(path, lambda number, row: seen.append(row) or number != 1)
    wanted = [dict(zip("abc", row, strict=True)) for row in fields]
    assert seen == wanted
    assert [rows[i] for i in range(len(rows))] == wanted
    assert kept.tolist() == [0, 2]


@pytest.mark.parametrize("sign", ["\x0b", "\x0c", "\x1c", "\x85", "\u2028", "\u2029"])
def test_a_csv_row_ends_at_its_line_and_at_no_other_separator(tmp_path, sign):
    path = tmp_path / "table.csv"
    path.write_text(f"a,b\r\nx{sign}y,z{sign}w\r\n1,2\r\n", encoding="utf-8", newline="")
    rows, _ = index_csv(path, lambda number, row: True)
    assert [rows[0], rows[1]] == [{"a": f"x{sign}y", "b": f"z{sign}w"}, {"a": "1", "b": "2"}]


def test_a_text_cut_within_a_character_is_one_that_can_be_written(tmp_path):
    path = tmp_path / "list.json"
    path.write_text('[{"q": "cut \\ud83d", "\\ud83d\\ude00": ["\\ud83d\\ude00"]}]')
    rows, _ = index_json(path, lambda number, row: True)
    assert rows[0] == {"q": "cut \ufffd", "\U0001f600": ["\U0001f600"]}
    assert rows[0]["q"].encode("utf-8").decode("utf-8") == rows[0]["q"]


def test_csv_that_is_not_utf8_is_refused_with_its_place(tmp_path):
    (tmp_path / "table.csv").write_bytes(b"a,b\n1,2\n3,\xe9\n")
    with pytest.raises(InputError, match="not UTF-8 text: byte 10 is 0xe9"):
        index_csv(tmp_path / "table.csv", lambda number, row: True)


def test_a_mark_is_no_part_of_the_first_row(tmp_path):
    (tmp_path / "lines.txt").write_text("\ufeffa,b\n", encoding="utf-8")
    rows, _ = index_csv(tmp_path / "lines.txt", lambda number, row: True, ParseCsv(header=False))
    assert rows[0] == ["a", "b"]


def test_a_changed_file_is_refused(tmp_path):
    path = tmp_path / "list.json"
    path.write_text("[1, 2]")
    rows, _ = index_json(path, lambda number, row: True)
    path.write_text("[1, 2, 3]")
    with pytest.raises(InputError, match="has changed since"):
        rows[0]


def test_rows_in_memory_are_packed():
    rows = MemoryRows(iter(VALUES))
    assert [rows[i] for i in range(len(rows))] == VALUES
    assert rows.digest == MemoryRows(VALUES).digest != MemoryRows(VALUES[1:]).digest


def llava(count: int) -> str:
    """LLaVA-Med's JSON list."""
    talk = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A radiograph."}]
    row = json.dumps({"id": "0", "image": "a.png", "conversatons": talk})
    return f"[{', '.join([row] * count)}]"


def pmc(count: int) -> str:
    """PMC-VQA's table."""
    head = "Figure_path,Question,Answer,Choice A,Choice B,Choice C,Choice D,Answer_label\n"
    return head + "a.png,Which organ?,A:Lung,A: Lung,B: Heart,C: Liver,D: Brain,A\n" * count


@pytest.mark.parametrize(
    ("name", "file", "text", "count"),
    [("llava_med", "rows.json", llava, 100_000), ("pmc_vqa", "train.csv", pmc, 10_000)],
)
def test_what_stays_of_a_large_file_is_8_bytes_per_row(tmp_path, name, file, text, count):
    (tmp_path / "a.png").write_bytes(b"")
    (tmp_path / file).write_text(text(5))
    read(name, tmp_path / file)  # modules are imported here
    (tmp_path / file).write_text(text(count))
    tracemalloc.start()
    records = read(name, tmp_path / file)
    gc.collect()  # the reader of csv leaves a cycle
    kept = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert len(records) == count
    assert records.nbytes == 8 * (count + 1)
    assert kept < records.nbytes + 50_000, f"{kept / count:.2f} bytes per row"
    assert records[count - 1].row == count - 1
    assert records.subset(np.arange(0, count, 2)).nbytes == 8 * (count + 1) + 8 * (count // 2)
