"""The folder of what is computed once, where there is a home and where there is none."""

from pathlib import Path

import pytest

from flashgrpo.errors import UserError
from flashgrpo.files import cache_folder


@pytest.fixture
def home(monkeypatch, tmp_path):
    """The user's home, and no FLASHGRPO_CACHE."""
    monkeypatch.delenv("FLASHGRPO_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


@pytest.fixture
def homeless(monkeypatch):
    """A container's user without a name."""

    def unknown(uid):
        raise KeyError(uid)

    monkeypatch.delenv("FLASHGRPO_CACHE")
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", unknown)


def test_the_cache_lies_in_the_home(home, tmp_path):
    assert cache_folder(tmp_path / "other") == home / ".cache/flashgrpo"


def test_the_variable_comes_first_and_its_tilde_is_the_home(home, monkeypatch):
    monkeypatch.setenv("FLASHGRPO_CACHE", "~/elsewhere")
    assert cache_folder() == home / "elsewhere"


def test_without_a_home_it_is_where_it_is_put_and_that_is_said(homeless, tmp_path):
    said = []
    assert cache_folder(tmp_path / "run/.cache", said.append) == tmp_path / "run/.cache"
    assert said == [
        "~/.cache/flashgrpo cannot be written (no home is known for ~), "
        f"so the cache is {tmp_path}/run/.cache; FLASHGRPO_CACHE moves it"
    ]
    with pytest.raises(UserError, match="set FLASHGRPO_CACHE to a folder that can"):
        cache_folder()


def test_a_home_that_cannot_be_written(home, monkeypatch, tmp_path):
    (tmp_path / ".cache").write_bytes(b"")
    assert cache_folder(tmp_path / "run/.cache") == tmp_path / "run/.cache"
    monkeypatch.setenv("FLASHGRPO_CACHE", str(tmp_path / ".cache/mine"))
    with pytest.raises(UserError, match=r"FLASHGRPO_CACHE: .*/mine cannot be written \(not a directory\); set"):
        cache_folder(Path("other"))
