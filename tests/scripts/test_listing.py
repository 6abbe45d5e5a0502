"""The image files that a command line names: folders, links, suffixes, text files of paths."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from common.errors import InputError
from common.listing import describe_left_out, list_files

SIZE = (24, 16)


def noise(seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (*SIZE[::-1], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture
def folder(tmp_path):
    """Three images: 0.png, 1.jpg, and 2.webp in a folder below; and no other file."""
    root = tmp_path / "images"
    (root / "below").mkdir(parents=True)
    noise(0).save(root / "0.png")
    noise(1).save(root / "1.jpg")
    noise(2).save(root / "below" / "2.webp")
    return root


def listed(*places):
    """The names of all files, and the members of each place as lists."""
    paths, members, unreadable, left_out = list_files([str(place) for place in places])
    assert unreadable == {}
    names = [Path(path).name for path in paths]
    return names, [numbers.tolist() for numbers in members], left_out


# ---- folders and links ----


def test_a_folder_in_a_fixed_order(folder):
    names, members, left_out = listed(folder)
    assert names == ["0.png", "1.jpg", "2.webp"] and members == [[0, 1, 2]] and not left_out


def test_hidden_files_and_folders_are_skipped(folder):
    shutil.copy(folder / "0.png", folder / ".hidden.png")
    (folder / "._0.png").write_bytes(b"\0\5\x16\7")  # macOS leaves such
    (folder / ".thumbnails").mkdir()
    shutil.copy(folder / "0.png", folder / ".thumbnails" / "0.png")
    names, _, left_out = listed(folder)
    assert names == ["0.png", "1.jpg", "2.webp"] and not left_out


def test_folders_in_circles_are_read_once(folder):
    (folder / "below" / "loop").symlink_to(folder)
    (folder / "again").symlink_to(folder / "below")
    names, members, _ = listed(folder)
    assert sorted(names) == ["0.png", "1.jpg", "2.webp"] and members == [[0, 1, 2]]


def test_symbolic_links_are_one_file(folder):
    (folder / "link.png").symlink_to(folder / "0.png")
    (folder / "dangling.png").symlink_to(folder / "nowhere.png")
    names, members, _ = listed(folder)
    assert names == ["0.png", "1.jpg", "dangling.png", "2.webp"] and members == [[0, 1, 2, 3]]


def test_hard_links_are_one_file(folder, tmp_path):
    os.link(folder / "0.png", folder / "3.png")
    os.link(folder / "0.png", folder / "below" / "4.jpg")
    (folder / "below" / "5.png").symlink_to(folder / "3.png")
    archive = tmp_path / "archive"
    archive.mkdir()
    os.link(folder / "1.jpg", archive / "renamed.jpg")
    names, members, _ = listed(folder, archive)
    assert names == ["0.png", "1.jpg", "2.webp"]
    assert members == [[0, 1, 2], [1]]


def test_copies_are_other_files(folder):
    shutil.copy2(folder / "0.png", folder / "copy.png")  # with the same time
    names, _, _ = listed(folder)
    assert names == ["0.png", "1.jpg", "copy.png", "2.webp"]


def test_overlapping_places_share_their_files(folder):
    names, members, _ = listed(folder, folder / "below", folder / ".." / "images" / "0.png")
    assert names == ["0.png", "1.jpg", "2.webp"] and members == [[0, 1, 2], [2], [0]]


# ---- suffixes ----


def test_suffixes_of_any_case_and_format(folder):
    for name in ("a.JPG", "b.Jpe", "c.PPM", "d.jp2", "e.TIF", "f.DIB", "g.apng", "h.Heic"):
        (folder / name).write_bytes(b"")
    names, _, left_out = listed(folder)
    assert len(names) == 11 and not left_out


@pytest.mark.parametrize(
    "file_format",
    ["AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP"],
)
def test_without_suffix_content_decides(folder, file_format):
    noise(3).save(folder / "no_suffix", file_format)
    noise(4).save(folder / "archive.v1", file_format)
    names, _, left_out = listed(folder)
    assert "no_suffix" in names and left_out == {".v1": 1}
    names, _, _ = listed(folder / "archive.v1")  # named by the user, so content decides too
    assert names == ["archive.v1"]


def test_other_files_are_counted(folder):
    for name in ("a.txt", "b.TXT", "below/c.txt", "d.mp4", "README", "e.", "trash.pdf"):
        (folder / name).write_bytes(b"P1 is no image, BM neither")
    (folder / ".DS_Store").write_bytes(b"hidden")
    os.mkfifo(folder / "pipe")
    _, _, left_out = listed(folder)
    assert left_out == {".txt": 3, ".mp4": 1, ".pdf": 1, "": 3}
    line = "8 other files left out: no suffix 3, .txt 3, .mp4 1, .pdf 1"
    assert describe_left_out(left_out) == line


def test_other_files_of_two_places_are_counted_once(folder):
    (folder / "below" / "a.txt").write_text("a")
    _, _, left_out = listed(folder, folder, folder / "below")
    assert left_out == {".txt": 1}
    assert describe_left_out(left_out) == "1 other file left out: .txt 1"


def test_many_suffixes_stay_one_line(folder):
    for number in range(50):
        (folder / f"a.{number:02}").write_text("a")
    (folder / "b.line\nbreak").write_text("a")
    _, _, left_out = listed(folder)
    line = describe_left_out(left_out)
    assert line.startswith("51 other files left out: ") and line.endswith("others 41")
    assert "\n" not in line and len(line) < 200


def test_a_folder_of_other_files_says_which(tmp_path):
    (tmp_path / "film.mp4").write_text("a")
    with pytest.raises(InputError, match=r"without images \(1 other file left out: .mp4 1\)"):
        list_files([str(tmp_path)])


# ---- text files of paths ----

ENCODINGS = {
    "plain": lambda text: text.encode(),
    "UTF-8 with a byte order mark": lambda text: text.encode("utf-8-sig"),
    "UTF-16": lambda text: text.encode("utf-16"),
    "UTF-16, big-endian": lambda text: b"\xfe\xff" + text.encode("utf-16-be"),
}


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("separator", ["\n", "\r\n", "\0"])
def test_lists_of_paths(folder, tmp_path, monkeypatch, encoding, separator):
    monkeypatch.chdir(tmp_path)
    shutil.copy(folder / "0.png", folder / "ünïcode 図.png")
    lines = ["images/1.jpg", "", "images/ünïcode 図.png", ""]
    (tmp_path / "list.txt").write_bytes(ENCODINGS[encoding](separator.join(lines)))
    names, _, _ = listed("list.txt")
    assert names == ["1.jpg", "ünïcode 図.png"]


def test_a_list_keeps_the_bytes_of_paths(folder, tmp_path):
    name = os.fsencode(folder) + b"/latin \xe9.png"
    shutil.copy(folder / "0.png", name)
    for mark in (b"", b"\xef\xbb\xbf"):
        (tmp_path / "list.txt").write_bytes(mark + name + b"\r\n")
        paths, *_ = list_files([str(tmp_path / "list.txt")])
        assert [os.fsencode(path) for path in paths] == [name]


@pytest.mark.parametrize("content", [b"", b"\xef\xbb\xbf", b"\xff\xfe", b"\xff\xfea", b"no\npath"])
def test_a_list_of_nothing_is_refused(tmp_path, content):
    (tmp_path / "list.txt").write_bytes(content)
    with pytest.raises(InputError, match="no line of it is the path of a file"):
        list_files([str(tmp_path / "list.txt")])
