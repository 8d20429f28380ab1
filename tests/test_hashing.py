"""Hashed ids against values of mmh3 5.3.1, which is not here, and columns of every kind against lists."""

import hypothesis
import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
import pytest

import jaxsparse as js
from jaxsparse.data import hashing

LARGEST = 2**31 - 2
# mmh3.hash(value, seed, signed=False)
STRINGS = [
    ("", 0, 0),
    ("", 1, 1364076727),
    ("a", 0, 1009084850),
    ("spam", 0, 2713519960),
    ("spam", 42, 1925645473),
    ("Grüße, 世界", 0, 4152016249),
    ("The quick brown fox jumps over the lazy dog", 0, 776992547),
    ("a\x00b\x00", 7, 3630137044),
    ("x" * 100, 2**32 - 1, 3691011017),
]
# mmh3.hash((value % 2**64).to_bytes(8, "little"), seed, signed=False), for seeds 0 and 9
INTEGERS = [
    (0, 1669671676, 2299495978),
    (1, 1392991556, 1088836450),
    (-1, 1651860712, 3591754683),
    (255, 4242213303, 2094841125),
    (2**31, 386683422, 2791603620),
    (-(2**63), 1366273829, 1100873996),
    (2**63 - 1, 2188461247, 1544146912),
    (2**64 - 1, 1651860712, 3591754683),
    (1234567890123, 1740798302, 910672318),
]
WORDS = ["de", "fr", "", "de", "Grüße", "a long one, for once"]


def ids(values, **kwargs):
    return js.hash_ids(values, LARGEST, **kwargs).tolist()


def murmur(data: bytes, seed: int) -> int:
    """MurmurHash3 x86 32 as its author describes it, byte by byte in Python."""
    state, bits = seed, 2**32 - 1
    rotate = lambda x, by: (x << by | x >> (32 - by)) & bits  # noqa: E731
    for at in range(0, len(data), 4):
        word = int.from_bytes(data[at : at + 4], "little")
        state ^= rotate(word * 0xCC9E2D51 & bits, 15) * 0x1B873593 & bits
        if at + 4 <= len(data):
            state = (rotate(state, 13) * 5 + 0xE6546B64) & bits
    state ^= len(data)
    state = (state ^ state >> 16) * 0x85EBCA6B & bits
    state = (state ^ state >> 13) * 0xC2B2AE35 & bits
    return state ^ state >> 16


@pytest.mark.parametrize("num_rows", [1, 1000, LARGEST])
def test_strings_are_murmurhash3(num_rows):
    for value, seed, want in STRINGS:
        for values in ([value], [value.encode()], np.array([value], object)):
            got = js.hash_ids(values, num_rows, seed)
            assert got.dtype == np.int32 and got.tolist() == [want % num_rows]
    together = [value for value, seed, _ in STRINGS if seed == 0]
    assert js.hash_ids(together, num_rows).tolist() == [want % num_rows for _, seed, want in STRINGS if seed == 0]


@pytest.mark.parametrize("num_rows", [1, 1000, LARGEST])
def test_integers_are_murmurhash3_of_eight_bytes(num_rows):
    for value, *wants in INTEGERS:
        for seed, want in zip((0, 9), wants, strict=True):
            assert js.hash_ids([value], num_rows, seed).tolist() == [want % num_rows]
    for dtype in ("i1", "u1", ">i2", "i4", "u4", "i8", ">u8"):
        assert js.hash_ids(np.array([0, 1], dtype), num_rows).tolist() == [1669671676 % num_rows, 1392991556 % num_rows]
    values = np.arange(2 * 16384 + 5)  # several chunks
    assert js.hash_ids(values, num_rows)[-1] == murmur(int(values[-1]).to_bytes(8, "little"), 0) % num_rows


@hypothesis.settings(max_examples=10)
@hypothesis.given(st.lists(st.text(max_size=12), max_size=12), st.integers(0, 2**32 - 1))
def test_any_text(values, seed):
    want = [murmur(value.encode(), seed) % LARGEST for value in values]
    assert ids(values, seed=seed) == ids([value.encode() for value in values], seed=seed) == want
    ended = [value.rstrip("\0") for value in values]  # as NumPy has strings
    assert ids(np.array(ended, str), seed=seed) == [murmur(value.encode(), seed) % LARGEST for value in ended]
    assert ids(np.array([value.encode() for value in ended], bytes), seed=seed) == ids(ended, seed=seed)


def test_many_strings_of_many_lengths():
    rng = np.random.default_rng(0)
    values = ["x" * n + str(n) for n in rng.integers(0, 90, 20_000)]
    want = {value: murmur(value.encode(), 0) % LARGEST for value in set(values)}
    assert ids(values) == [want[value] for value in values]


def test_shapes():
    words = np.array(WORDS).reshape(2, 3)
    assert js.hash_ids(words, 100).shape == js.hash_ids(np.arange(6).reshape(2, 3), 100).shape == (2, 3)
    np.testing.assert_array_equal(js.hash_ids(words, 100).ravel(), js.hash_ids(WORDS, 100))
    for nothing in ([], np.zeros(0, int), np.zeros(0, "U3"), np.zeros(0, object)):
        assert js.hash_ids(nothing, 10).shape == (0,)
    lists = js.hash_ids([["de", "fr"], [], ("de",)], 100)
    assert [x.tolist() for x in lists] == [js.hash_ids(["de", "fr"], 100).tolist(), [], [js.hash_ids(["de"], 100)[0]]]
    assert [x.tolist() for x in js.hash_ids([[], []], 10)] == [[], []]
    with pytest.raises(TypeError, match=r"list of lists.*'bc' at position 1"):
        js.hash_ids([["a"], "bc"], 10)
    batch = next(iter(js.batches(lists, num_rows=100, batch_size=3)))
    assert batch.x.shape == (3, 2)


def test_missing_values():
    for gone in (None, float("nan")):
        assert ids(["de", gone, "fr"], missing="") == ids(["de", "", "fr"])
        assert ids([5, gone, 7], missing=-1) == ids([5, -1, 7])
        assert ids([gone, gone], missing="?") == ids(["?", "?"])
        assert ids(np.array(["de", gone], object), missing="x") == ids(["de", "x"])
        with pytest.raises(ValueError, match=r"'values'.*without missing.*position 1, 2 in all.*missing="):
            js.hash_ids(["de", gone, gone], 10)


def test_what_cannot_be_hashed():
    for bad, match in [
        ([1.5], "1.5 at position 0"),
        ([1, "a"], "'a' at position 1"),
        (["a", b"a"], "b'a' at position 1"),
        (["a", None, 3], "3 at position 2"),
        ([1, True], "True at position 1"),
        (np.array([True]), "bool"),
        (np.array([1.0, np.nan]), r"float64.*astype\('int64'\).*'Int64'"),
        (np.array(["2020-01-01"], "M8[D]"), "datetime64"),
        ([{}], "{} at position 0"),
    ]:
        with pytest.raises(TypeError, match=rf"'values'.*strings, bytes or integers.*{match}"):
            js.hash_ids(bad, 10, missing=0)
    for bad in (2**64, -(2**63) - 1):
        with pytest.raises(OverflowError, match=r"64 bits.*at position 1"):
            js.hash_ids([0, bad], 10)
    for num_rows in (0, 2**31 - 1, 1.5, True):
        with pytest.raises(ValueError, match="'num_rows'"):
            js.hash_ids(["a"], num_rows)
    for seed in (-1, 2**32):
        with pytest.raises(ValueError, match="'seed'"):
            js.hash_ids(["a"], 10, seed)


def test_crosses():
    # h = mmh3.hash, unsigned: h(struct.pack("<2I", h("de", s), h((1).to_bytes(8, "little"), s)), s)
    for country, device, seed, want in [
        ("de", 1, 0, 1311230296),
        ("de", 2, 0, 3889079499),
        ("fr", 1, 3, 2380304660),
    ]:
        assert js.cross([[country], np.array([device])], LARGEST, seed).tolist() == [want % LARGEST]
    a, b, c = ["x", "y", "x"], [1, 2, 2], [b"", b"1", b"2"]
    words = [[murmur(x.encode(), 0) for x in a], [murmur(x.to_bytes(8, "little"), 0) for x in b]]
    words.append([murmur(x, 0) for x in c])
    packed = [b"".join(w.to_bytes(4, "little") for w in example) for example in zip(*words, strict=True)]
    assert js.cross([a, b, c], LARGEST).tolist() == [murmur(example, 0) % LARGEST for example in packed]
    assert js.cross([a, b], 10**6).tolist() != js.cross([b, a], 10**6).tolist()
    holes = [["x", None], [None, 2]]
    assert js.cross(holes, 999, missing=["", 0]).tolist() == js.cross([["x", ""], [0, 2]], 999).tolist()
    with pytest.raises(ValueError, match=r"columns\[1\].*missing"):
        js.cross([["x", "y"], [None, 2]], 999)
    with pytest.raises(ValueError, match=r"columns\[1\].*shape \(2,\)"):
        js.cross([["x", "y"], [1]], 999)
    for one in ([a], "ab"):
        with pytest.raises(ValueError, match="two columns"):
            js.cross(one, 999)
    with pytest.raises(ValueError, match=r"'missing'.*2 in a list"):
        js.cross([a, b], 999, missing=[1])


def test_columns_of_pandas(monkeypatch):
    pd = pytest.importorskip("pandas")
    want, with_none = ids(WORDS), [*WORDS[:2], None, *WORDS[3:]]
    for dtype in (object, "string", "category"):
        assert ids(pd.Series(WORDS, dtype=dtype)) == want
        column = pd.Series(with_none, dtype=dtype)
        assert ids(column, missing="") == want
        with pytest.raises(ValueError, match="at position 2"):
            js.hash_ids(column, 10)
    assert ids(pd.Categorical(WORDS)) == want
    numbers = pd.Series([2**62 + 1, None, 3], dtype="Int64")
    assert ids(numbers, missing=0) == ids([2**62 + 1, 0, 3])
    assert ids(pd.Series([3, 4, 3]).astype("category")) == ids([3, 4, 3])
    with pytest.raises(TypeError, match="'Int64'"):
        js.hash_ids(pd.Series([1, None]), 10)
    large = pd.Series(WORDS, dtype="category")
    assert ids(large) == want
    monkeypatch.setattr(hashing, "hash_bytes", None)  # the categories are not hashed again
    assert ids(large.iloc[1:3]) == want[1:3] and ids(large.iloc[:0]) == []


def test_columns_of_polars():
    pl = pytest.importorskip("polars")
    want, with_none = ids(WORDS), [*WORDS[:2], None, *WORDS[3:]]
    for dtype in (pl.String, pl.Categorical, pl.Enum(sorted(set(WORDS)))):
        assert ids(pl.Series(WORDS, dtype=dtype)) == want
        assert ids(pl.Series(with_none, dtype=dtype), missing="") == want
        assert ids(pl.Series([], dtype=dtype)) == []
    assert ids(pl.Series([2**62 + 1, None, 3]), missing=0) == ids([2**62 + 1, 0, 3])
    with pytest.raises(TypeError, match="float64"):
        js.hash_ids(pl.Series([1.5]), 10)


def test_columns_of_arrow():
    pa = pytest.importorskip("pyarrow")
    want, with_none = ids(WORDS), [*WORDS[:2], None, *WORDS[3:]]
    for kind in ("string", "large_string", "binary", "large_binary", "string_view"):
        assert ids(pa.array(WORDS, kind)) == ids(pa.chunked_array([WORDS[:2], WORDS[2:]], kind)) == want
        assert ids(pa.array(["x", *with_none, "y"], kind)[1:-1], missing="" if "string" in kind else b"") == want
        assert ids(pa.array([], kind)) == []
    assert ids(pa.array(WORDS).dictionary_encode()) == want
    assert ids(pa.array(with_none).dictionary_encode(), missing="") == want
    assert ids(pa.array([2**62 + 1, None, 3]), missing=0) == ids([2**62 + 1, 0, 3])
    assert ids(pa.array([None, None], "string").dictionary_encode(), missing="") == ids(["", ""])
    with pytest.raises(TypeError, match="float64"):
        js.hash_ids(pa.array([1.5]), 10)
    lists = pa.array([["x", "y"], [], ["z"]])
    of_chunks = js.hash_ids(pa.chunked_array([lists[1:], lists]), LARGEST)
    assert [row.tolist() for row in of_chunks] == [[], ids(["z"]), ids(["x", "y"]), [], ids(["z"])]
    with pytest.raises(ValueError, match=r"without missing lists\. Got 1 of them"):
        js.hash_ids(pa.array([["x"], None]), 10)
    none_among_values = pa.DictionaryArray.from_arrays(pa.array([0, 1, 0]), pa.array(["x", None]))
    assert ids(none_among_values, missing="y") == ids(["x", "y", "x"])
    with pytest.raises(ValueError, match="without missing values"):
        js.hash_ids(none_among_values, 10)


def test_no_numbers_are_no_ids():
    assert js.hash_ids(np.zeros(0), 10).tolist() == []


def test_numbers_of_numpy_in_lists_are_what_they_are_in_arrays():
    for dtype in (np.int8, np.int32, np.int64, np.uint64):
        assert ids([dtype(5), dtype(7)]) == ids([5, 7])
    assert ids([np.int8(-1), 5, np.uint64(2**64 - 1)]) == ids([-1, 5, -1])
    words = np.empty(2, object)
    words[:] = [np.array(["x"], object), np.array(["y", "z"], object)]
    for values in ([np.float64(1.5)], [np.float64("nan")], [np.True_], words, [bytearray(b"x")]):
        with pytest.raises((TypeError, ValueError), match="The 'values' argument"):
            js.hash_ids(values, 10)


def test_what_has_several_columns_or_a_mask_is_no_column():
    assert ids(jnp.arange(6).reshape(2, 3)) == [ids([0, 1, 2]), ids([3, 4, 5])]
    masked = np.ma.masked_array([1, 2], [False, True])
    for values in (masked, {"x": [1]}):
        with pytest.raises(TypeError, match="The 'values' argument"):
            js.hash_ids(values, 10)
    with pytest.raises(TypeError, match="The 'columns' argument"):
        js.cross({"x": [1, 2], "y": [3, 4]}, 10)
    pd = pytest.importorskip("pandas")
    frame = pd.DataFrame({"x": ["a", "b"], "y": ["c", "d"]})
    with pytest.raises(TypeError, match="The 'columns' argument"):
        js.cross(frame, 10)
    with pytest.raises(TypeError, match="The 'values' argument"):
        js.hash_ids(frame, 10)


def test_strings_that_are_no_text_are_an_error_that_names_the_argument():
    with pytest.raises(ValueError, match="The 'values' argument"):
        js.hash_ids(["x", "\ud800"], 10)
