import numpy as np
import pytest

from diffsparse.search.store import SearchStore, StoreMismatch


def test_values_survive(tmp_path):
    path = tmp_path / "deep" / "search.sqlite"
    with SearchStore(path) as store:
        assert not store.claim({"seed": 1, "orders": ("a", "b")})
        store.put_json("a/x", {"k": [1, 2.5]})
        store.put_arrays("a/y", {"m": np.eye(3, dtype=np.float32)})
    with SearchStore(path) as store:
        assert store.claim({"seed": 1, "orders": ("a", "b")})
        assert store.get_json("a/x") == {"k": [1, 2.5]}
        assert np.array_equal(store.get_arrays("a/y")["m"], np.eye(3))
        assert store.names("a/") == ["a/x", "a/y"]
        assert "a/z" not in store
        with pytest.raises(KeyError):
            store.get_json("a/y")


def test_another_search_is_refused_by_the_setting_that_differs(tmp_path):
    with SearchStore(tmp_path / "s") as store:
        store.claim({"seed": 1, "steps": 8})
        assert store.claim({"seed": 1, "steps": 8, "of a later version": None})
        with pytest.raises(StoreMismatch, match=r"other settings \(seed\)"):
            store.claim({"seed": 2, "steps": 8})


def test_a_file_that_is_no_store_is_refused(tmp_path):
    (tmp_path / "s").write_text("hello" * 500)
    with pytest.raises(StoreMismatch, match="not a search record"):
        SearchStore(tmp_path / "s")
