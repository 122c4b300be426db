"""Files are replaced whole or not at all."""

import pytest

from cartridges.files import file_digest, replacing, write_atomically


def test_a_file_is_replaced_by_text_or_bytes(tmp_path):
    file = tmp_path / "a.json"
    write_atomically(file, "\u00e9\n")
    before = file_digest(file)
    write_atomically(file, b"\xc3\xa9\n")
    assert file_digest(file) == before and list(tmp_path.iterdir()) == [file]


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    file = tmp_path / "a.json"
    file.write_text("old")
    with pytest.raises(OSError, match="disk full"), replacing(file) as temporary:
        temporary.write_text("half of the n")
        raise OSError("disk full")
    assert file.read_text() == "old" and list(tmp_path.iterdir()) == [file]
