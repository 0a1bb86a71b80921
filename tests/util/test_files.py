"""Files that are refused before they are waited for, and written whole or not at all."""

import errno
import json
import os
import stat

import pytest

from lesa.errors import LesaError
from lesa.util.files import (
    as_path,
    read_file,
    require_writable,
    require_writable_file,
    write_atomically,
)
from lesa.util.strict_json import parse_json, to_json

GIVE = "give another"


@pytest.mark.parametrize("wrong", ["", " ", None, 3, b"bytes", "null\0byte", []], ids=repr)
def test_what_is_no_path_is_told(wrong):
    for check in (as_path, require_writable, require_writable_file):
        with pytest.raises(LesaError, match="^here=.*: not a path; give the name"):
            check(wrong, "here")


@pytest.fixture
def odd(tmp_path):
    """Paths that are no regular files, or cannot be read, by kind."""
    found = {"folder": tmp_path / "folder", "loop": tmp_path / "loop", "pipe": tmp_path / "pipe"}
    found["folder"].mkdir()
    found["loop"].symlink_to(found["loop"])
    os.mkfifo(found["pipe"])
    found["device"], found["missing"] = "/dev/zero", tmp_path / "missing"
    found["to a device"] = tmp_path / "link"
    found["to a device"].symlink_to("/dev/zero")
    found["long"], found["null"] = tmp_path / ("a" * 300), f"{tmp_path}/a\0b"
    found["sparse"] = tmp_path / "sparse"
    with found["sparse"].open("wb") as file:
        file.truncate(10 << 30)
    return found


def test_what_is_no_regular_file_is_refused_at_once(odd):
    for kind, path in odd.items():
        with pytest.raises(LesaError, match=f"{GIVE}$") as told:
            read_file(path, 1000, GIVE)
        assert "\n" not in str(told.value), kind


def test_a_regular_file_is_read_also_through_a_link(tmp_path):
    (tmp_path / "file").write_bytes(b"abc")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    assert read_file(tmp_path / "link", 3, GIVE) == b"abc"
    with pytest.raises(LesaError, match="has 3 bytes, more than 2"):
        read_file(tmp_path / "file", 2, GIVE)


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_the_users_mask_and_the_files_own_permissions_are_kept(tmp_path, mask):
    before = os.umask(mask)
    try:
        new = write_atomically(tmp_path / "new", "a")
        assert stat.S_IMODE(new.stat().st_mode) == 0o666 & ~mask
        new.chmod(0o640)
        write_atomically(new, "b")
        assert new.read_text() == "b" and stat.S_IMODE(new.stat().st_mode) == 0o640
    finally:
        os.umask(before)


@pytest.mark.parametrize("call", ["open", "fsync", "replace"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EDQUOT])
def test_a_disk_that_refuses_is_one_sentence_and_leaves_nothing(tmp_path, monkeypatch, call, code):
    (tmp_path / "file").write_text("old")

    def refuse(*args, **kwargs):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, call, refuse)
    with pytest.raises(LesaError, match=f"cannot be written .{os.strerror(code)}"):
        write_atomically(tmp_path / "file", "new")
    monkeypatch.undo()
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]


def test_only_a_file_is_replaced(odd, tmp_path):
    for kind in ("folder", "pipe", "device", "to a device"):
        with pytest.raises(LesaError, match="not a regular file|Is a directory"):
            write_atomically(odd[kind], "text")
        with pytest.raises(LesaError, match="a folder|a pipe or a device"):
            require_writable_file(odd[kind])
    assert stat.S_ISFIFO(odd["pipe"].stat().st_mode) and odd["to a device"].is_symlink()
    with pytest.raises(LesaError, match="File name too long"):
        write_atomically(odd["long"], "text")
    with pytest.raises(LesaError, match="No such file"):
        write_atomically(tmp_path / "nowhere" / "file", "text")


@pytest.mark.parametrize("coding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_json_in_any_coding(coding):
    assert parse_json('{"a": ["ü", 1.5, null]}'.encode(coding), "it", GIVE) == {
        "a": ["ü", 1.5, None]
    }


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "Expecting value"),
        ('{"a": 1,}', "Expecting property name|Illegal trailing comma"),
        ('{"a": 1, "b": {"c": 1, "c": 2}}', "the key 'c' is there twice"),
        ("[NaN]", "NaN is no number"),
        ("[-Infinity]", "-Infinity is no number"),
        ("[" * 100_000, "too many brackets"),
        ("[" * 100 + "]" * 100, "more than 64 brackets"),
        ('{"a":' * 65 + "1" + "}" * 65, "more than 64 brackets"),
        ("1" * 10_000, "digits"),
        ("{" + '"a":1,' * 200_000 + '"a":1}', "the key 'a' is there twice"),
    ],
    ids=range(10),
)
def test_json_that_is_refused(text, told):
    with pytest.raises(LesaError, match=f"^it is none .*({told}).*; {GIVE}$"):
        parse_json(text.encode(), "it is none", GIVE)


def test_what_to_json_writes_parse_json_reads():
    value = {"a": [float("inf"), "\ud800", {"b": None}], "c": True}
    again = parse_json(to_json(value).encode(), "it", GIVE)
    assert again == {**value, "a": [None, *value["a"][1:]]}
    assert json.loads(to_json(again)) == again
