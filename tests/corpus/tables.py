"""Bad data files: each goes through `iv.data.load` and through `interp-vlm study --data`."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from interp_vlm.data import Examples
from tests.corpus.images import PNG
from tests.corpus.row import Bad

__all__ = ["TABLES"]


def row(**changes: Any) -> dict[str, Any]:
    """A good row with some columns changed; None takes a column out."""
    whole = {"image": "ok.png", "question": "is there a cat?", "answer": "yes", **changes}
    return {name: value for name, value in whole.items() if value is not ...}


def table(content: bytes | str | list[Any], name: str = "t.jsonl", scheme: str = "file") -> Callable[[Path], str]:
    """A table beside a good picture; rows are written as JSON Lines."""

    def make(folder: Path) -> str:
        (folder / "ok.png").write_bytes(PNG)
        text = "".join(json.dumps(each) + "\n" for each in content) if isinstance(content, list) else content
        (folder / name).write_bytes(text.encode() if isinstance(text, str) else text)
        return f"{scheme}:{folder / name}"

    return make


def csv(text: str | bytes) -> Callable[[Path], str]:
    head = "image,question,answer\n"
    return table(head + text if isinstance(text, str) else head.encode() + text, "t.csv")


def parquet(rows: list[dict[str, Any]], scheme: str = "file") -> Callable[[Path], str]:
    def make(folder: Path) -> str:
        (folder / "ok.png").write_bytes(PNG)
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "t.parquet")
        return f"{scheme}:{folder / 't.parquet'}"

    return make


def cut_parquet(folder: Path) -> str:
    spec = parquet([row(id=str(i)) for i in range(50)])(folder)
    path = folder / "t.parquet"
    path.write_bytes(path.read_bytes()[:-30] + os.urandom(26) + b"PAR1")
    return spec


def doubled_parquet(folder: Path) -> str:
    values = pyarrow.array(["ok.png"])
    doubled = pyarrow.Table.from_arrays([values] * 4, names=["image", "question", "answer", "answer"])
    (folder / "ok.png").write_bytes(PNG)
    pyarrow.parquet.write_table(doubled, folder / "t.parquet")
    return f"file:{folder / 't.parquet'}"


def not_text_parquet(folder: Path) -> str:
    """Bytes that are no UTF-8 in a column of texts."""
    spoilt = pyarrow.array([b"\xff\xfe\xfa"], pyarrow.binary()).view(pyarrow.string())
    columns = {"image": pyarrow.array(["ok.png"]), "question": spoilt, "answer": pyarrow.array(["yes"])}
    (folder / "ok.png").write_bytes(PNG)
    pyarrow.parquet.write_table(pyarrow.table(columns), folder / "t.parquet")
    return f"file:{folder / 't.parquet'}"


def bomb(folder: Path) -> str:
    """A hundred kilobytes that unpack to a hundred megabytes."""
    (folder / "t.csv.gz").write_bytes(gzip.compress(b"image,question,answer\n" + b"\n" * 100_000_000, 9))
    return f"file:{folder / 't.csv.gz'}"


def pictures_elsewhere(folder: Path) -> str:
    (folder / "other").mkdir()
    (folder / "other" / "far.png").write_bytes(PNG)
    rows = [row(image="../other/far.png"), row(image=str(folder / "other" / "far.png"))]
    (folder / "tables").mkdir()
    return table(rows)(folder / "tables")


def holds(n: int, **fields: str) -> Callable[[Examples], None]:
    """So many examples, the first with these fields, and every picture there."""

    def check(found: Examples) -> None:
        assert len(found) == n
        assert {name: getattr(found[0], name) for name in fields} == fields
        assert all(example.image.size == (40, 30) for example in found)

    return check


def only_table(name: str, content: bytes = b"") -> Callable[[Path], str]:
    """A spec for a path in the folder; with content, of that file."""

    def make(folder: Path) -> str:
        if content:
            (folder / name).write_bytes(content)
        return f"file:{folder / name}"

    return make


def pipe(folder: Path) -> str:
    os.mkfifo(folder / "t.csv")
    return f"file:{folder / 't.csv'}"


GOOD_CSV = "image,question,answer\nok.png,is there a cat?,yes\n"

TABLES = (
    Bad("missing-column", table([row(answer=...)]), r"line 1 has no column 'answer' \(it has image, question\)"),
    Bad("missing-column-later", table([row(), row(question=...)]), r"line 2 has no column 'question'"),
    Bad("optional-column-in-some-rows", table([row(kind="a"), row()]), r"line 2 has no column 'kind'"),
    Bad("mixed-types", table([row(answer=1), row(answer="one")]), r"'answer' mixes types: int at .*line 1, str at"),
    Bad("fraction-as-answer", table([row(answer=0.5)]), r"answer is 0\.5, a float"),
    Bad("list-as-question", table([row(question=["a"])]), r"question is \['a'\], a list"),
    Bad("boolean-as-answer", table([row(answer=True)]), r"answer is True, a bool"),
    Bad("duplicate-ids", table([row(id="a"), row(id="a")]), r"line 2 repeats the id 'a' of .*line 1"),
    Bad("nan-answer", table(b'{"image": "ok.png", "question": "q", "answer": NaN}\n'), r"answer is missing \(nan\)"),
    Bad("null-answer", table([row(), row(answer=None)]), r"line 2: answer is missing \(None\)"),
    Bad("blank-question", table([row(question=" \t")]), r"question is missing"),
    Bad("nan-cell", csv("ok.png,q,NaN\n"), r"answer is missing \('NaN'\)"),
    Bad("no-accepted-answers", table([row(answers=[])]), r"answers is \[\].*a list of texts"),
    Bad("accepted-answers-of-other-types", table([row(answers=[1, None])]), r"answers is \[1, None\]"),
    Bad("empty-file", table(b"", "t.csv"), r"t\.csv is empty"),
    Bad("header-alone", csv(""), r"t\.csv holds no rows"),
    Bad("byte-order-mark-alone", table(b"\xef\xbb\xbf", "t.csv"), r"t\.csv holds no rows"),
    Bad("latin-1", csv("ok.png,ein M\xe4dchen?,ja\n".encode("latin-1")), r"not UTF-8 text \(byte 34\)"),
    Bad("utf-16", table(GOOD_CSV.encode("utf-16"), "t.csv"), r"not UTF-8 text"),
    Bad("ten-megabyte-line", table([row(question="a " * 5_000_000)]), r"line 1: question has 9999999 characters"),
    Bad("ten-megabyte-cell", csv(f"ok.png,{'q' * 10_000_000},yes\n"), r"line 2 is not a table row"),
    Bad("ten-megabyte-file-name", table([row(image="x" * 10_000_000)]), r"image has 10000000 characters"),
    Bad("megabyte-column-name", table([{"x" * 1_000_000: 1}]), r"line 1 has no column 'image'"),
    Bad("truncated-json", table('[{"image": "ok.png", "question": "q"', "t.json"), r"t\.json is not JSON"),
    Bad(
        "one-bad-line",
        table('{"image": "ok.png", "question": "q", "answer": "a"}\n{"image": \n'),
        r"line 2 is not JSON",
    ),
    Bad("array-of-texts", table('["a", "b"]', "t.json"), r"item 1 is 'a'; expected a JSON object"),
    Bad("deep-json", table("[" * 200_000, "t.json"), r"t\.json is not JSON .*recursion"),
    Bad("deep-json-line", table('{"a":' * 200_000), r"line 1 is not JSON .*recursion"),
    Bad("number-of-five-thousand-digits", table('{"answer": ' + "1" * 5000 + "}\n"), r"is not JSON .*4300 digits"),
    Bad("name-given-twice", table('{"answer": "yes", "answer": "no"}\n'), r"names 'answer' twice"),
    Bad("half-a-surrogate", table([row(question="a\ud800b")]), r"question is 'a\\ud800b', no Unicode text"),
    Bad("open-quote", csv('ok.png,"is there a cat?,yes\nok.png,q,a\n'), r"is not a table row"),
    Bad("comma-too-many", csv("ok.png,a cat, or a dog?,cat\n"), r"line 2 has 4 cells; expected 3"),
    Bad("column-twice", table("image,question,answer,answer\nok.png,q,a,b\n", "t.csv"), r"names a column twice"),
    Bad("blanks-in-the-header", table("image, question, answer\nok.png,q,a\n", "t.csv"), r"no column 'question'"),
    Bad("parquet-of-garbage", table(os.urandom(2000), "t.parquet"), r"t\.parquet is not a Parquet file"),
    Bad("parquet-with-a-spoilt-footer", cut_parquet, r"t\.parquet is not a Parquet file"),
    Bad("parquet-with-a-column-twice", doubled_parquet, r"names a column twice"),
    Bad("parquet-with-bytes-as-text", not_text_parquet, r"t\.parquet (is not a Parquet file|.*no Unicode)"),
    Bad("parquet-with-pictures-inside", parquet([row(image={"bytes": PNG})]), r"image holds an encoded picture.*hf:"),
    Bad("gzip-cut", table(gzip.compress(GOOD_CSV.encode())[:-9], "t.csv.gz"), r"is not a whole gzip file"),
    Bad("gzip-of-nothing", table(b"no gzip at all", "t.csv.gz"), r"is not a whole gzip file"),
    Bad("decompression-bomb", bomb, r"unpacks to more than 100 times"),
    Bad(
        "label-outside-the-closed-set",
        table([{"question_id": 1, "image": "ok.png", "text": "is there a cat?", "label": "maybe"}], scheme="pope"),
        r"label is 'maybe'; expected yes or no",
    ),
    Bad(
        "pictures-missing",
        table([row(image=f"{i}.png") for i in range(20)]),
        r"20 of 20 pictures .*0\.png \(missing\).*and 10 more",
    ),
    Bad("picture-is-the-folder", table([row(image=".")]), r"\. \(a folder\)"),
    Bad("unknown-format", table(b"hello", "t.xlsx"), r"t\.xlsx has an unknown format"),
    Bad("table-is-absent", only_table("absent.csv"), r"absent\.csv does not exist"),
    Bad("table-is-a-pipe", pipe, r"t\.csv (does not exist|is not a regular file)"),
    Bad("folder-without-a-table", lambda folder: f"file:{folder}", r"holds no single table \(none\)"),
    Bad("somebody-else-s-home", lambda _: "file:~nobody-there/t.csv", r"~nobody-there/t\.csv is no path"),
    Bad("endless-path", lambda _: f"file:{'x' * 5000}", r"is no path \(File name too long\)"),
    Bad("unknown-scheme", lambda _: "coco:val2014", r"'coco:val2014' names no data source"),
    Bad("unknown-option", lambda folder: f"file:{folder}?pictures=x", r"has the option 'pictures'"),
    Bad("image-folder-absent", lambda folder: table([row()])(folder) + "?images=/no/such", r"/no/such does not exist"),
    Bad("hub-data-set-of-garbage", table(os.urandom(2000), "t.parquet", "hf"), r"t\.parquet cannot be loaded"),
    Bad(
        "hub-data-set-without-pictures",
        parquet([row(image="ok.png")], "hf"),
        r"(is .*expected pictures|cannot be read)",
    ),
    Bad("hub-data-set-that-is-absent", lambda folder: f"hf:{folder / 'absent'}", r"absent does not exist"),
    Bad("byte-order-mark", table("\ufeff" + GOOD_CSV, "t.csv"), recovers=holds(1, answer="yes")),
    Bad("windows-line-ends", table(GOOD_CSV.replace("\n", "\r\n"), "t.csv"), recovers=holds(1, answer="yes")),
    Bad("pictures-outside-the-folder", pictures_elsewhere, recovers=holds(2)),
)
