"""Readers against what was written, against scikit-learn's and Vowpal Wabbit's values, and on damaged files."""

import functools
import gzip
import json
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import jaxsparse as js
from jaxsparse.data.readers.digits import integers

HASHED = {"num_rows": 2**20}
TSV_NAMES = ["y", "a", "b", "c", "d"]


@pytest.fixture
def write(tmp_path):
    def to_file(content, name="file.txt"):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return to_file


def whole(reader):
    """All chunks of a pass in one, and that another pass is the same."""
    passes = []
    for _ in range(2):
        xs, ys, weights = zip(*reader, strict=True)
        passes.append((joined(xs), joined(ys), joined(weights)))
    assert repr(passes[0]) == repr(passes[1])
    return passes[0]


def joined(parts):
    if isinstance(parts[0], dict):
        return {name: joined([part[name] for part in parts]) for name in parts[0]}
    if hasattr(parts[0], "toarray"):
        return np.concatenate([part.toarray() for part in parts]).tolist()
    if parts[0] is None:
        return None
    return [row.tolist() for part in parts for row in part]


def fails(reader, *what):
    with pytest.raises(ValueError) as caught:
        list(reader() if callable(reader) else reader)
    for text in what:
        assert text in str(caught.value), str(caught.value)


SVM = b"""\xef\xbb\xbf# as it is published
1 1:0.5 3:2\r
-1 qid:7 2:1e-3 # a comment

+1.5  4:-.25\t5:1
0
"""
SVM_X = [[0.5, 0, 2, 0, 0], [0, 1e-3, 0, 0, 0], [0, 0, 0, -0.25, 1], [0, 0, 0, 0, 0]]


@pytest.mark.parametrize("chunk_rows", [1, 3, 100])
def test_svmlight(write, chunk_rows):
    for path in (write(SVM), write(gzip.compress(SVM), "x.gz"), write(SVM.replace(b" qid:7", b""))):
        reader = js.read_svmlight(path, chunk_rows=chunk_rows)
        assert reader.num_features == 5
        x, y, weight = whole(reader)
        np.testing.assert_allclose(x, SVM_X, rtol=1e-7)
        assert y == [1, -1, 1.5, 0] and weight is None and reader.num_examples == 4
    x, _, _ = whole(js.read_svmlight(path, num_features=7, zero_based=True))
    np.testing.assert_allclose(x, np.pad(SVM_X, ((0, 0), (1, 1))), rtol=1e-7)
    assert whole(js.read_svmlight([path, path], num_features=5))[1] == 2 * y


def test_svmlight_is_what_was_written(write):
    rng = np.random.default_rng(0)
    dense = np.where(rng.random((200, 50)) < 0.2, rng.normal(size=(200, 50)), 0).astype(np.float32)
    labels = rng.normal(size=200).astype(np.float32)
    lines = [
        " ".join([str(label), *(f"{i + 1}:{value}" for i, value in enumerate(row) if value)])
        for label, row in zip(labels.tolist(), dense.tolist(), strict=True)
    ]
    x, y, _ = whole(js.read_svmlight(write("\n".join(lines)), num_features=50, chunk_rows=64))
    np.testing.assert_array_equal(np.array(x, np.float32), dense)
    np.testing.assert_array_equal(np.array(y, np.float32), labels)


def test_svmlight_with_queries_and_labels(write):
    x, y, _ = whole(js.read_svmlight(write("2 qid:3 1:1\n0 qid:3 2:1\n1 qid:11 1:4\n"), query_id=True))
    assert x == {"features": [[1, 0], [0, 1], [4, 0]], "qid": [3, 3, 11]} and y == [2, 0, 1]
    path = write("0,3 1:1 2:1\n 2:4\n2 1:3 # one\n1:7\n")
    for num_labels in (None, 4):
        reader = js.read_svmlight(path, multilabel=True, num_labels=num_labels)
        x, y, _ = whole(reader)
        # sklearn.datasets.load_svmlight_file(path, multilabel=True)[1] is [(0, 3), (), (2,), ()]
        assert x["labels"] == [[1, 0, 0, 1], [0, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]] and y is None
        assert x["features"] == [[1, 1], [0, 4], [3, 0], [7, 0]] and reader.num_labels == 4
    batch = next(iter(js.batches(next(iter(reader)).x, batch_size=4)))
    assert np.asarray(batch.x["labels"].indices).tolist() == [[0, 0], [0, 3], [2, 2]]


BAD_SVM = {
    "1 3": "'3' is not index:value",
    "1 2:": "the value of 2 is '', not a finite number",
    "1 2: 3:4": "the value of 2 is ''",
    "1 2:3:4": "the value of 2 is '3:4'",
    "1 4 5:6:7": "'4' is not index:value",
    "1 2:nan": "'nan', not a finite number",
    "1 2:1e39": "'1e39', not a finite number",
    "1 2:1-2": "'1-2'",
    "1 1_0:1": "the index is '1_0', not an integer",
    "1 1.5:1": "the index is '1.5'",
    "1 1e1:1": "the index is '1e1'",
    "1 1e0:1": "the index is '1e0'",
    "1 2.0:1": "the index is '2.0'",
    "1 0:1": "index 0 is outside 1 to 4; if indices begin at 0, give zero_based=True",
    "1 5:1": "index 5 is outside 1 to 4",
    "1 -1:1": "index -1 is outside",
    "1 2:1 2:3": "it has an index twice",
    "1 3:1 2:1 3:2": "it has an index twice",
    "a 2:1": "the label is 'a'",
    "2:1": "the label is '2:1'",
    "1 qid:x 2:1": "the qid is 'x'",
}


def test_bad_lines_of_svmlight(write, tmp_path):
    for line, what in BAD_SVM.items():
        path = write(f"1 1:1\n# a comment\n{line}\n-1 4:2\n")
        fails(js.read_svmlight(path, num_features=4), f"{path}, line 3: ", what, repr(line), "bad_lines=")
    path, aside = write("".join(f"1 4:{n}\n{line}\n" for n, line in enumerate(BAD_SVM))), tmp_path / "bad"
    reader = js.read_svmlight(path, num_features=4, chunk_rows=7, bad_lines=aside)
    for _ in range(2):
        with pytest.warns(UserWarning, match=f"{len(BAD_SVM)} bad lines were left out"):
            chunks = list(reader)
        assert reader.num_bad == reader.num_examples == len(BAD_SVM)
        assert [v for x, _, _ in chunks for v in x.toarray()[:, 3]] == list(range(len(BAD_SVM)))
        lines = aside.read_text().splitlines()
        assert [line.split("\t", 1)[1] for line in lines] == list(BAD_SVM)
        assert lines[0] == f"{path}, line 2: '3' is not index:value\t1 3"
    with pytest.warns(UserWarning, match="bad lines"):
        list(js.read_svmlight(path, bad_lines=aside))
    fails(lambda: js.read_svmlight(write("1 1:1\n"), query_id=True), "no qid")
    fails(lambda: js.read_svmlight(write("1.5 1:1\n"), multilabel=True), "the label is '1.5', not an integer")
    fails(lambda: js.read_svmlight(write("2,2 1:1\n"), multilabel=True), "it has a label twice")
    fails(lambda: js.read_svmlight(write("4 1:1\n"), multilabel=True, num_labels=4), "label 4 is outside 0 to 3")


def test_what_readers_are_given(write, tmp_path):
    path = write("1 1:1\n")
    for bad, match in [
        ({"num_features": 0}, "'num_features'"),
        ({"num_labels": 3}, "'num_labels'.*multilabel"),
        ({"chunk_rows": 0}, "'chunk_rows'"),
        ({"bad_lines": path}, "'bad_lines'.*another file"),
    ]:
        with pytest.raises(ValueError, match=match):
            js.read_svmlight(path, **bad)
    with pytest.raises(ValueError, match=r"'paths'.*empty list"):
        js.read_svmlight([])
    with pytest.raises(FileNotFoundError, match=r"'paths'.*nowhere.*does not exist"):
        js.read_svmlight(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="not a file"):
        js.read_vw(tmp_path, num_rows=4)
    packed = gzip.compress(b"1 1:1\n" * 1000, mtime=0)
    for damaged in (packed[:-20], packed[:30] + b"xxxx" + packed[34:]):
        fails(js.read_svmlight(path := write(damaged), num_features=1), f"{path} is a damaged gzip file")
    for empty in ("", "\n# nothing\n"):
        assert list(js.read_svmlight(write(empty))) == []
    assert list(js.read_vw(write("\n \n"), num_rows=4)) == list(js.read_jsonl(write("\n"), numbers=["a"])) == []


CSV = """y,a,b,c,d
1,0.5,3,"x, y",de
0,-2,0,,fr
1,1e3,2,"two
lines",de
"""


@pytest.mark.parametrize("chunk_rows", [1, 2, 100])
def test_csv(write, chunk_rows):
    asked = {
        "label": "y",
        "numbers": ["a", "b"],
        "ids": ["b"],
        "hashed": ["c", "d"],
        "crosses": [["c", "d"]],
        "num_rows": 2**20,
    }
    c, d = ["x, y", "", "two\nlines"], ["de", "fr", "de"]
    tabbed = CSV.replace(",", "\t").replace("x\t y", "x, y")
    for path in (
        write(CSV),
        write(gzip.compress(CSV.encode()), "a.csv.gz"),
        write(tabbed, "a.tsv.old"),
        write("\ufeff" + CSV),
    ):
        x, y, weight = whole(js.read_csv(path, chunk_rows=chunk_rows, **asked))
        assert x["numbers"] == [[0.5, 3], [-2, 0], [1000, 2]] and y == [1, 0, 1] and weight is None
        assert x["b"] == [3, 0, 2] and x["c"] == js.hash_ids(c, 2**20).tolist()
        assert x["d"] == js.hash_ids(d, 2**20).tolist() and x["c x d"] == js.cross([c, d], 2**20).tolist()
    x, y, weight = whole(
        js.read_csv(
            write("3;x;\n0.5;y;2\n"),
            columns=["w", "k", "n"],
            delimiter=";",
            weight="w",
            numbers=["n"],
            hashed=["k"],
            num_rows={"k": 7},
            seed={"k": 5},
            fill=-1,
        )
    )
    assert x == {"numbers": [[-1], [2]], "k": js.hash_ids(["x", "y"], 7, 5).tolist()}
    assert y is None and weight == [3, 0.5]
    x, _, _ = whole(js.read_csv(write('k\na"b\n"\n', "a.tsv"), hashed=["k"], quote=None, **HASHED))
    assert x["k"] == js.hash_ids(['a"b', '"'], 2**20).tolist()


def test_readers_are_streams(write):
    first = [write("0 1:1\n1 2:1\n2 3:1\n", "a"), write("3 1:1 2:2\n", "b")]
    read = functools.partial(js.read_svmlight, num_features=3, chunk_rows=2)
    streams = [js.stream(lambda: read(first), batch_size=2), js.stream(first, reader=read, batch_size=2)]
    for stream in streams:
        for _ in range(2):
            batches = list(stream)
            assert [batch.y.tolist() for batch in batches] == [[0, 1], [2, 3]]
    assert batches[1].x.shape == (2, 3) and sorted(np.asarray(batches[1].x.data).tolist())[-3:] == [1, 1, 2]
    fails(
        lambda: js.stream([*first, write("1 9:1\n", "c")], reader=read, batch_size=2),
        "c, line 1: index 9 is outside 1 to 3",
    )


BAD_CSV = {
    "1,2,3": "3 fields, where there are 5 columns",
    "1,2,3,4,5,6": "6 fields",
    "1,,3,x,y": "column 'a' is empty; give fill=",
    "1,abc,3,x,y": "column 'a' is 'abc', not a number",
    "1,1_0,3,x,y": "column 'a' is '1_0', not a number",
    "1,nan,3,x,y": "column 'a' is 'nan', not a finite number",
    "1,1e39,3,x,y": "column 'a' is '1e39', not a finite",
    ",1,3,x,y": "column 'y' is empty",
    "1,1,-3,x,y": "column 'b' is '-3', not an integer from 0",
    "1,1,3.0,x,y": "column 'b' is '3.0', not an integer",
    "1,1,99999999999999999999,x,y": "column 'b' is '9",
    '1,1,3,"x"z,y': "expected after",
    "1,1,3,\udcff,y": "it is not in UTF-8",
}


def test_bad_lines_of_csv(write, tmp_path):
    asked = dict(label="y", numbers=["a"], ids=["b"], hashed=["c", "d"], **HASHED)
    as_bytes = lambda text: text.encode(errors="surrogateescape")  # noqa: E731
    for line, what in BAD_CSV.items():
        path = write(as_bytes(f'{CSV}{line}\n1,1,1,"1",1\n'))
        fails(js.read_csv(path, **asked), f"{path}, line 6: ", what)
    aside = tmp_path / "bad"
    path = write(as_bytes(CSV + "".join(f"1,{n},1,x,y\n{line}\n" for n, line in enumerate(BAD_CSV))))
    reader = js.read_csv(path, chunk_rows=5, bad_lines=aside, **asked)
    with pytest.warns(UserWarning, match=f"{len(BAD_CSV)} bad lines"):
        chunks = list(reader)
    assert [v for x, _, _ in chunks for v in x["numbers"][:, 0]] == [0.5, -2, 1000, *range(len(BAD_CSV))]
    lines = aside.read_bytes().splitlines()
    assert [line.split(b"\t", 1)[1] for line in lines] == list(map(as_bytes, BAD_CSV))
    fails(
        js.read_csv(write("w,a\n-1,2\n"), weight="w", numbers=["a"]),
        "line 2: column 'w' is a weight, and -1 is negative",
    )
    fails(js.read_csv(write('a,b\n1,"2\n3,4\n'), numbers=["a"]), "line 2: unexpected end of data")


def test_ends_of_lines_and_letters_of_csv(write):
    """With quotes or without: CRLF, empty lines, and letters that take several bytes."""
    names = ["Zoë", "Łukasz", "李"]
    asked = dict(label="y", numbers=["a"], hashed=["b"], **HASHED)
    want = [js.hash_ids([name], 2**20)[0] for name in names]
    for end in ("\n", "\r\n", "\n\n", "\r\n\r\n"):
        for quote in ("", '"'):
            text = end.join(["y,a,b", *(f"1,{n},{quote}{name}{quote}" for n, name in enumerate(names)), ""])
            x, y, _ = whole(js.read_csv(write(text), **asked))
            assert (y, x["numbers"], x["b"]) == ([1, 1, 1], [[0], [1], [2]], want)
    fails(js.read_csv(write('y,"a\n1,2\n'), numbers=["a"]), "line 1: unexpected end of data")


def test_bad_lines_of_a_good_file(write, tmp_path, recwarn):
    reader = js.read_csv(write("a\n1\n"), numbers=["a"], bad_lines=tmp_path / "bad")
    assert len(list(reader)) == 1 and reader.num_bad == 0 and (tmp_path / "bad").read_bytes() == b"" and not recwarn


def test_fields_of_spaces_are_empty(write):
    for spaces in ("", "  ", '" "'):
        path = write(f"y,a\n1,{spaces}\n0, 2 \n")
        assert joined([x["numbers"] for x, _, _ in js.read_csv(path, numbers=["a"], fill=7)]) == [[7], [2]]
        fails(js.read_csv(path, numbers=["a"]), "line 2: column 'a' is empty; give fill=")
        fails(js.read_csv(write(f"a,y\n1,{spaces}\n"), label="y", numbers=["a"], fill=7), "column 'y' is empty")


def test_a_gz_file_of_no_bytes_is_damaged(write):
    fails(js.read_svmlight(write("", "x.gz"), num_features=3), "x.gz is a damaged gzip file")
    assert list(js.read_svmlight(write("", "x.svm"), num_features=3)) == []


def test_columns_that_cannot_be(write):
    path = write(CSV)
    fails(js.read_csv(path, numbers=["z"]), f"{path} has no column 'z'. Its columns are 'y', 'a'")
    fails(js.read_csv(write("a,a\n1,2\n"), numbers=["a"]), "several columns 'a'")
    fails(js.read_csv(write(""), numbers=["a"]), "is empty")
    for asked, error, match in [
        ({}, ValueError, "given, or ids, hashed or crosses"),
        ({"numbers": "abc"}, TypeError, "'numbers'.*list of names"),
        ({"crosses": ["a", "b"]}, TypeError, "'crosses'.*list of lists"),
        ({"crosses": [["a"]], "num_rows": 3}, ValueError, r"crosses\[0\].*two names"),
        ({"hashed": ["c"]}, ValueError, "'num_rows'.*'c'"),
        ({"hashed": ["c"], "num_rows": {"d": 3}}, ValueError, "'num_rows'.*'c'"),
        ({"hashed": ["c"], "num_rows": 0}, ValueError, "'num_rows'"),
        ({"hashed": ["c"], "ids": ["c"], "num_rows": 3}, ValueError, "'hashed'.*each once"),
        ({"numbers": ["a"], "fill": float("nan")}, ValueError, "'fill'"),
        ({"numbers": ["a"], "delimiter": "ab"}, ValueError, "'delimiter'"),
    ]:
        with pytest.raises(error, match=match):
            js.read_csv(path, **asked)


ROWS = [
    {"y": 1, "n": 0.5, "k": "de", "u": 3, "l": [1, 2], "t": ["a", "b"], "other": {"deep": []}},
    {"y": 0, "n": True, "k": "fr", "u": 0, "l": [], "t": []},
    {"y": 2.5, "n": -3, "k": "Grüße", "u": 2**40, "l": [7], "t": ["b"]},
]
ASKED = {
    "label": "y",
    "numbers": ["n"],
    "ids": ["u", "l"],
    "hashed": ["k", "t"],
    "crosses": [["k", "u"]],
    "num_rows": 2**20,
}


def check_rows(x, y):
    k, u = ([row[name] for row in ROWS] for name in "ku")
    assert y == [1, 0, 2.5] and x["numbers"] == [[0.5], [1], [-3]]
    assert x["u"] == u and x["l"] == [[1, 2], [], [7]]
    assert x["k"] == js.hash_ids(k, 2**20).tolist() and x["k x u"] == js.cross([k, u], 2**20).tolist()
    assert x["t"] == [ids.tolist() for ids in js.hash_ids([["a", "b"], [], ["b"]], 2**20)]


def test_jsonl(write):
    lines = "\n".join(json.dumps(row, ensure_ascii=row["y"] == 1) for row in ROWS)
    for path in (write(lines), write(gzip.compress(f"\n{lines}\n".encode()), "a.jsonl.gz")):
        for chunk_rows in (1, 100):
            x, y, _ = whole(js.read_jsonl(path, chunk_rows=chunk_rows, **ASKED))
            check_rows(x, y)
    nulls = write('{"n": null, "k": null}\n{"n": 2, "k": "x"}\n')
    x, _, _ = whole(js.read_jsonl(nulls, numbers=["n"], hashed=["k"], fill=9, missing="?", num_rows=100))
    assert x == {"numbers": [[9], [2]], "k": js.hash_ids(["?", "x"], 100).tolist()}


def test_bad_lines_of_jsonl(write, tmp_path):
    bad = {
        "{": "it is not JSON: Expecting property name",
        "[1]": "it is not an object",
        "3": "it is not an object",
        '{"n": 1}': "it has no 'y'",
        '{"y": "1"}': "column 'y' is \"1\", not a number",
        '{"n": null}': "column 'n' is empty; give fill=",
        '{"n": NaN}': "not a finite number",
        '{"u": -1}': "column 'u' is -1, where there are integers from 0",
        '{"u": true}': "column 'u' is true",
        '{"u": 9223372036854775808}': "column 'u' is 9223372036854775808",
        '{"u": [1]}': "column 'u' is [1], where there are integers",
        '{"l": ["a"]}': "column 'l' is [\"a\"], where there are lists of integers",
        '{"l": 3}': "column 'l' is 3, where there are lists",
        '{"k": 3}': "column 'k' is 3, where there are strings",
        '{"k": null}': "column 'k' is null, where there are strings",
        '{"t": "a"}': "column 't' is \"a\", where there are lists of strings",
        '{"t": [["a"]]}': "where there are lists of strings",
        '{"k": "\\ud800"}': "a lone surrogate",
        '{"y": 1, "k": "a", "k": "b"}': "it has the key 'k' twice",
    }
    lines = []
    for line in bad:
        parsed = json.loads(line) if line != "{" else 0
        full = isinstance(parsed, dict) and line != '{"n": 1}' and line.count('"k"') < 2
        lines.append(json.dumps(ROWS[0] | parsed) if full else line)
    for line, what in zip(lines, bad.values(), strict=True):
        path = write(f"{json.dumps(ROWS[0])}\n{line}\n")
        fails(js.read_jsonl(path, **ASKED), f"{path}, line 2: ", what)
    path, aside = write(json.dumps(ROWS[0]) + "\n" + "\n".join(lines) + "\n" + json.dumps(ROWS[1])), tmp_path / "bad"
    with pytest.warns(UserWarning, match=f"{len(bad)} bad lines"):
        chunks = list(js.read_jsonl(path, bad_lines=aside, **ASKED))
    assert [len(y) for _, y, _ in chunks] == [2] and len(aside.read_text().splitlines()) == len(bad)
    fails(js.read_jsonl(write(b'{"n": "\xff"}\n'), numbers=["n"]), "line 1: it is not in UTF-8")
    for rows, line in (('{"t": null}\n{"t": ["a"]}', 1), ('{"t": ["a", null]}\n{"t": null}', 2)):
        reader = js.read_jsonl(write(rows), hashed=["t"], missing="", **HASHED)
        fails(reader, f"line {line}: column 't' is null, where there are lists of strings")


def test_vw(write):
    # columns and values of vowpalwabbit 9.11.9 with -b 20 --noconstant
    lines = {
        "1 |a x:2 y 12 |b:0.5 x long_feature:3": {579720: 2, 829279: 1, 354750: 1, 143313: 0.5, 952008: 1.5},
        "-1 | x 12 -3": {695067: 1, 12: 1, 452911: 1},
        "1 0.5 'tag|user name:1.5": {82607: 1.5},
        "0 | x x:2": {695067: 3},
        "1 2 'tag |a b=c 007": {346189: 1, 354745: 1},
        "1 |Müller ü": {718951: 1},
        "1 |a 18446744073709551617 4294967298\ty  x:-2e-1": {354739: 1, 354740: 1, 829279: 1, 579720: -0.2},
        "1 |a:2 x:3": {579720: 6},
        "2.5 |12 x 5": {98015: 1, 17: 1},
        "1 |": {},
    }
    path = write("\n".join(lines))
    rows = [
        (x, y, w) for chunk in js.read_vw(path, num_rows=2**20, chunk_rows=4) for x, y, w in zip(*chunk, strict=True)
    ]
    for (x, _, _), want in zip(rows, lines.values(), strict=True):
        assert sorted(x.indices.tolist()) == sorted(want)
        np.testing.assert_allclose(x.toarray().ravel()[list(want)], list(want.values()), rtol=1e-6)
    assert [float(y) for _, y, _ in rows] == [1, -1, 1, 0, 1, 1, 1, 1, 2.5, 1]
    assert [float(w) for _, _, w in rows] == [1, 1, 0.5, 1, 2, 1, 1, 1, 1, 1]
    ((x, y, _),) = js.read_vw(write("|a x\n'tag |a y\n"), num_rows=2**20, labeled=False)
    assert x.indices.tolist() == [579720, 829279] and y is None


def test_bad_lines_of_vw(write, tmp_path):
    bad = {
        "1 a b": "no | before the features",
        "|a x": "it has no label; give labeled=False",
        "1| x": "it has no label",
        "1 2 0.5 |a x": "initial predictions are not supported",
        "1:2 |a x": "the label is '1:2'",
        "1 -2 |a x": "importance is negative",
        "1 |a :5": "':5' has no name",
        "1 |a x:": "the value of 'x' is ''",
        "1 |a x:abc": "the value of 'x' is 'abc'",
        "1 |a x:nan": "not a finite number",
        "1 |a:b x": "the scale of 'a' is 'b'",
        "1 |a x\r-1 |a y": "a carriage return in it",
    }
    for line, what in bad.items():
        fails(js.read_vw(path := write(f"1 |a x\n\n{line}\n"), num_rows=8), f"{path}, line 3: ", what)
    reader = js.read_vw(write("1 |a x\n" + "\n".join(bad)), num_rows=8, bad_lines=tmp_path / "bad")
    with pytest.warns(UserWarning, match="12 bad lines"):
        assert [len(y) for _, y, _ in reader] == [1]
    with pytest.raises(ValueError, match="'num_rows'"):
        js.read_vw(reader.paths, num_rows=0)


def test_vw_with_windows_ends(write):
    ((x, y, _),) = js.read_vw(write("1 |a x\r\n-1 |a y\r\n\r\n"), num_rows=2**20)
    assert x.indices.tolist() == [579720, 829279] and y.tolist() == [1, -1]


def test_text(write):
    path = write("ham\tThe cat, the CAT sat\r\n\nspam\t\nham\tGrüße\tan alle\n")
    rows = [["the", "cat", "sat"], [], ["grüße", "an", "alle"]]
    want = np.zeros((3, 2**16), np.float32)
    for row, words in zip(want, rows, strict=True):
        row[js.hash_ids(words, 2**16, 3)] = 1 / np.sqrt(np.float64(len(words) or 1))
    for chunk_rows in (1, 100):
        x, y, weight = whole(js.read_text(path, num_rows=2**16, seed=3, labels=["ham", "spam"], chunk_rows=chunk_rows))
        np.testing.assert_array_equal(np.array(x, np.float32), want)
        assert y == [0, 1, 0] and weight is None
    x, y, _ = whole(js.read_text(write("-1.5\ta b\n2\tb\n"), num_rows=100))
    assert y == [-1.5, 2]
    texts = write("spam\ta b\nb c\nb\tc\n")  # labels are read over where there are some
    x, y, _ = whole(js.read_text(texts, num_rows=100, labels=["ham", "spam"], labeled=False))
    assert y is None and [np.count_nonzero(row) for row in x] == [2, 2, 2]


def test_bad_lines_of_text(write, tmp_path):
    bad = {
        b"a b": "no tab between label and text",
        b"eggs\ta b": "'eggs' is not a label: those are 'ham', 'spam'",
        b"ham\ta\rham\tb": "a carriage return in it",
        b"ham\t\xff": "it is not in UTF-8",
    }
    given = {"num_rows": 9, "labels": ["ham", "spam"]}
    for line, what in bad.items():
        fails(js.read_text(path := write(b"ham\ta\n" + line + b"\n"), **given), f"{path}, line 2: ", what)
    reader = js.read_text(write(b"ham\ta\n" + b"\n".join(bad)), bad_lines=tmp_path / "bad", **given)
    with pytest.warns(UserWarning, match="4 bad lines"):
        assert [len(y) for _, y, _ in reader] == [1]
    fails(js.read_text(write("nan\ta\n"), num_rows=9), "'nan' is not a number")
    with pytest.raises(ValueError, match="'num_rows'"):
        js.read_text(reader.paths, num_rows=0)
    with pytest.raises(TypeError, match=r"'labels'.*a list of names"):
        js.read_text(reader.paths, num_rows=9, labels="ham")


DIGITS = st.one_of(
    st.integers(-(10**9), 10**9).map(str),
    st.sampled_from(
        ["", "-0", "007", "-", "--1", "+1", "1.", "1.5", " 1", "1e2", "1_0", "0/", "1:", "a", "٣", "-99999999"]
    ),
)


@given(st.lists(DIGITS, min_size=1, max_size=9), st.sampled_from([None, 7.0]))
def test_digits_are_what_float_makes_of_them(fields, fill):
    plain = [re.fullmatch("-?[0-9]{1,8}", field) or (field == "" and fill is not None) for field in fields]
    encoded = [field.encode() for field in fields]
    lengths = np.array(list(map(len, encoded)))
    buffer = np.frombuffer(b"\t".join(encoded) + bytes(8), np.uint8)
    got = integers(buffer, np.cumsum(lengths + 1) - lengths - 1, lengths, fill)
    assert (got is None) == (not all(plain))
    if got is not None:
        want = np.array([float(field or fill) for field in fields])
        np.testing.assert_array_equal(got, want)
        np.testing.assert_array_equal(np.signbit(got), np.signbit(want))


def test_columns_of_integers_decimals_and_holes(write):
    """The numbers that are parsed as digits, and those beside them that are not."""
    rows = [("3", "-1.5", "", "-7"), ("-0", "1e-3", "12", "123456789"), ("12345678", "2", "-12345678", "0")]
    text = "a\tb\tc\td\n" + "\n".join(map("\t".join, rows))
    (x,) = [x["numbers"] for x, _, _ in js.read_csv(write(text, "a.tsv"), numbers=list("abcd"), fill=0.5)]
    np.testing.assert_array_equal(x, np.array([[float(v or 0.5) for v in row] for row in rows], np.float32))


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_parquet(tmp_path, kind):
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "file"

    def save(columns, rows_a_group=2):
        table = pa.table(columns)
        if kind == "parquet":
            parquet.write_table(table, path, row_group_size=rows_a_group)
        else:
            with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
                writer.write_table(table, rows_a_group)
        return path

    def fails_at(columns, what, **asked):
        place = "row group" if kind == "parquet" else "record batch"
        fails(js.read_parquet(save(columns), **asked), f"{path}, {place} ", what)

    columns = {name: [row[name] for row in ROWS] for name in "ynkult"} | {"n": [0.5, 1.0, -3.0]}
    text = pa.array(columns["k"])
    for k in (text, text.dictionary_encode(), text.cast("large_string"), text.cast("binary")):
        for chunk_rows in (1, 100):
            reader = js.read_parquet(save(columns | {"k": k}), chunk_rows=chunk_rows, **ASKED)
            check_rows(*whole(reader)[:2])
            assert reader.num_examples == 3
    nulls = {"n": pa.array([1, None, 3]), "k": pa.array(["x", None, "y"]), "f": [True, False, True]}
    x, _, _ = whole(js.read_parquet(save(nulls), numbers=["n", "f"], hashed=["k"], num_rows=99, fill=9, missing="?"))
    assert x == {"numbers": [[1, 1], [9, 0], [3, 1]], "k": js.hash_ids(["x", "?", "y"], 99).tolist()}
    fails_at(nulls, "0, row 1: column 'n' is null; give fill=", numbers=["n"])
    fails_at(nulls, "0, row 1: column 'k' is null; give missing=", hashed=["k"], num_rows=9)
    fails_at(nulls, "0, row 1: column 'n' is null", ids=["n"])
    fails_at({"n": [1.0, 2, float("nan")]}, "1, row 0: column 'n' is nan, not a finite number", numbers=["n"])
    fails_at(
        {"n": [1.0, 2, 3], "w": [1, 1, -1]}, "1, row 0: column 'w' is -1.0, and a weight", numbers=["n"], weight="w"
    )
    fails_at({"l": [[1], [2], [3, -1]]}, "1, row 0: column 'l' has -1, which is not an id", ids=["l"])
    fails_at({"l": [[1], None, [3]]}, "0, row 1: column 'l' is null", ids=["l"])
    fails_at({"l": [["a"], ["b", None], []]}, "0, row 1: column 'l' is null", hashed=["l"], num_rows=9)
    fails_at({"l": ["a", "b", "c"]}, "column 'l' is of string, not of integers", ids=["l"])
    fails_at({"l": ["a", "b", "c"]}, "column 'l' is of string, not of numbers", numbers=["l"])
    fails(js.read_parquet(save({"a": [1]}), numbers=["z"]), "no column 'z'")
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    fails(js.read_parquet(path, numbers=["a"]), f"js.read_parquet: {path}, its schema: ")


def test_parquet_without_pyarrow(write, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(ImportError, match=re.escape("pip install 'jaxsparse[arrow]'")):
        js.read_parquet(write(""), numbers=["a"])
