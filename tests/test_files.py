import hashlib
import os

import pytest

import files


def test_a_files_digest(tmp_path):
    content = bytes(range(256)) * 5000  # more than is read at once
    (tmp_path / "a").write_bytes(content)
    assert files.digest(tmp_path / "a") == hashlib.sha256(content).hexdigest()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="uses the full disk that Linux has")
def test_text_that_can_not_be_written_leaves_the_old_one_and_nothing_else(tmp_path):
    (tmp_path / "a.txt").write_text("old")
    (tmp_path / ".a.txt.unfinished").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        files.write_whole(tmp_path / "a.txt", "new")
    assert os.listdir(tmp_path) == ["a.txt"] and (tmp_path / "a.txt").read_text() == "old"
    files.write_whole(tmp_path / "a.txt", "new")
    assert os.listdir(tmp_path) == ["a.txt"] and (tmp_path / "a.txt").read_text() == "new"


def test_a_file_that_is_in_use_is_replaced_once_it_is_not(tmp_path, monkeypatch):
    """As on Windows, while a virus scanner reads it."""
    (tmp_path / "new").touch()
    tries = []

    def replaced(source, target, replace=os.replace):
        tries.append(source)
        if len(tries) < 3:
            raise PermissionError
        replace(source, target)

    monkeypatch.setattr(files.os, "replace", replaced)
    monkeypatch.setattr(files, "PATIENCE", 5)
    files.replace(tmp_path / "new", tmp_path / "there")
    assert len(tries) == 3 and (tmp_path / "there").exists()
    monkeypatch.setattr(files, "PATIENCE", 0)
    tries.clear()
    with pytest.raises(PermissionError):
        files.replace(tmp_path / "there", tmp_path / "new")
    assert len(tries) == 1
