"""Array files: what is read, and that everything else is refused without running it."""

import numpy as np
import pytest

from zoo.errors import DataError
from zoo.files import read_arrays


def test_arrays_by_name_all_of_them_or_the_one(tmp_path):
    x, y = np.arange(3.0), np.eye(2)
    np.savez(tmp_path / "two.npz", x=x, y=y)
    np.save(tmp_path / "one.npy", y)
    np.testing.assert_array_equal(read_arrays(tmp_path / "two.npz", "y")[0], y)
    assert [len(a) for a in read_arrays(tmp_path / "two.npz")] == [3, 2]
    np.testing.assert_array_equal(read_arrays(tmp_path / "one.npy")[0], y)
    with pytest.raises(DataError, match="expected the arrays x, z, found x, y"):
        read_arrays(tmp_path / "two.npz", "x", "z")
    with pytest.raises(DataError, match="holds one array; give an .npz file with x"):
        read_arrays(tmp_path / "one.npy", "x")


@pytest.mark.parametrize(
    "content", [b"", b"x,y\n1,2\n", b"PK\x03\x04 cut short", b"\x93NUMPY\x01\x00v\x00{'descr'"]
)
@pytest.mark.parametrize("name", ["a.npy", "a.npz"])
def test_damaged_files_are_refused_without_advice_to_unpickle(tmp_path, content, name):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=f"is no readable {name[1:]} file of numbers") as caught:
        read_arrays(tmp_path / name)
    assert "unsafely" not in str(caught.value) and "allow_pickle" not in str(caught.value)


def test_a_damaged_member_and_a_missing_file(tmp_path):
    np.savez_compressed(tmp_path / "a.npz", x=np.random.default_rng(0).normal(size=500))
    raw = bytearray((tmp_path / "a.npz").read_bytes())
    raw[200:260] = bytes(60)
    (tmp_path / "a.npz").write_bytes(raw)
    with pytest.raises(DataError, match="is no readable .npz file"):
        read_arrays(tmp_path / "a.npz", "x")
    with pytest.raises(DataError, match="no file .*b.npz"):
        read_arrays(tmp_path / "b.npz")
