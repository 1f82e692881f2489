"""Rows of different lengths come back as they went in; limits hold; a store that a crash left behind is empty."""

import numpy as np
import pytest

from lora_jax.data.row_store import SEGMENT, Kind, Place, RowStore, RowStores, size

KINDS = (Kind((None, 3), np.float32), Kind((2, None, None), np.float16), Kind((4,), np.int32))
LENGTHS = (2, 5, 3)
BYTES = sum(4 * n * 3 + 2 * 2 * n * n + 4 * 4 for n in LENGTHS)


def arrays(row, length):
    """As a model gives them: longer than the row, rubbish in the padding."""
    rng = np.random.default_rng(row)
    return [rng.integers(1, 9, kind.row(length)).astype(kind.dtype) for kind in KINDS]


@pytest.mark.parametrize("on_disk", [False, True])
def test_rows_are_cut_and_padded(tmp_path, on_disk):
    store = RowStore(KINDS, LENGTHS, tmp_path / "s" if on_disk else None)
    assert store.nbytes == size(KINDS, LENGTHS) == BYTES
    for row, length in enumerate(LENGTHS):
        store.put(Place(row), arrays(row, 6))
        assert store.present[row] and store.present.sum() == row + 1
        assert length < 6
    out = store.batch([[Place(1)], [], [Place(0)]], 7)
    for kind, array in zip(KINDS, out, strict=True):
        assert array.shape == (3, *kind.row(7)) and array.dtype == kind.dtype
    assert not any(array[1].any() for array in out)
    for b, row in ((0, 1), (2, 0)):
        n, given = LENGTHS[row], arrays(row, 6)
        assert np.array_equal(out[0][b, :n], given[0][:n]) and not out[0][b, n:].any()
        assert np.array_equal(out[1][b, :, :n, :n], given[1][:, :n, :n])
        assert not out[1][b, :, n:].any() and not out[1][b, :, :, n:].any()
        assert np.array_equal(out[2][b], given[2])
    if on_disk:
        assert sum(p.stat().st_size for p in (tmp_path / "s").glob("*.bin")) == BYTES


def test_a_row_that_is_missing_is_an_error():
    with pytest.raises(KeyError, match="row 2"):
        RowStore(KINDS, LENGTHS).batch([[Place(2)]], 7)


def test_a_store_on_disk_is_found_again_once_it_was_closed(tmp_path):
    store = RowStore(KINDS, LENGTHS, tmp_path)
    store.put(Place(1), arrays(1, 5))
    before = store.batch([[Place(1)]], 5)
    assert not RowStore(KINDS, LENGTHS, tmp_path).present.any()  # as after a crash
    store.close()
    again = RowStore(KINDS, LENGTHS, tmp_path)
    assert again.present.tolist() == [False, True, False]
    assert all(np.array_equal(a, b) for a, b in zip(again.batch([[Place(1)]], 5), before, strict=True))
    (tmp_path / "1.bin").write_bytes(b"short")
    assert not RowStore(KINDS, LENGTHS, tmp_path).present.any()


def test_memory_first_then_disk_then_nothing(tmp_path):
    stores = RowStores(1.5 * BYTES, 1.5 * BYTES, tmp_path / "cache")
    first, second = stores.open("a", KINDS, LENGTHS), stores.open("b", KINDS, LENGTHS)
    assert first.folder is None and second.folder == tmp_path / "cache" / "b"
    assert stores.open("c", KINDS, LENGTHS) is None
    assert stores.open("a", KINDS, LENGTHS) is first
    stores.release("a")
    assert stores.open("c", KINDS, LENGTHS) is None  # a second run still uses it
    first.put(Place(0), arrays(0, 2))
    stores.release("a")
    third = stores.open("c", KINDS, LENGTHS)
    assert third is not None and third.folder is None and not first.present.any()
    stores.remove()
    assert not (tmp_path / "cache").exists()
    assert RowStores(BYTES - 1, 10 * BYTES).open("a", KINDS, LENGTHS) is None  # no folder, no disk


def test_what_an_earlier_process_left_on_disk_counts(tmp_path):
    for key in ("old", "mine"):
        store = RowStore(KINDS, LENGTHS, tmp_path / key)
        store.put(Place(0), arrays(0, 2))
        store.close()
    stores = RowStores(0, 2 * BYTES, tmp_path)
    assert stores.open("mine", KINDS, LENGTHS).present[0] and (tmp_path / "old").exists()
    assert stores.open("new", KINDS, LENGTHS) is not None
    assert not (tmp_path / "old").exists() and (tmp_path / "mine").exists()


def test_rows_that_share_a_row_lie_side_by_side():
    kinds = [Kind((None, 2), np.float32), Kind((SEGMENT, 3), np.float32)]
    store = RowStore(kinds, [2, 3])
    tokens, segments = np.arange(12.0).reshape(6, 2), np.arange(12.0).reshape(4, 3)
    store.put(Place(0, start=3, segment=1), [tokens, segments])
    store.put(Place(1, start=0, segment=0), [tokens, segments])
    [whole, places] = store.batch([[Place(0), Place(1, 2, 1)], [Place(1, 1, 2)]], 5, 4)
    assert whole.shape == (2, 5, 2) and places.shape == (2, 4, 3)
    np.testing.assert_array_equal(whole[0], np.concatenate([tokens[3:5], tokens[:3]]))
    np.testing.assert_array_equal(whole[1], np.concatenate([np.zeros((1, 2)), tokens[:3], np.zeros((1, 2))]))
    np.testing.assert_array_equal(places[0], np.stack([segments[1], segments[0], np.zeros(3), np.zeros(3)]))
    np.testing.assert_array_equal(places[1][2], segments[0])
