"""Files: atomic writing, digests, names fit for a terminal."""

import hashlib
import os
import sys
from contextlib import contextmanager


@contextmanager
def atomic(path):
    """Give a temporary path beside `path` (a Path) for the length of a block.

    The temporary file takes the place of `path` when the block ends well, and is deleted otherwise.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def sha256_of(path):
    """SHA-256 of a file (a Path), 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def as_utf8(name):
    """A file name as the text whose UTF-8 are its bytes, whatever the locale; bytes that are not
    UTF-8 become surrogates.
    """
    if sys.getfilesystemencoding() == "utf-8":
        return name
    return os.fsencode(name).decode("utf-8", "surrogateescape")


def names_as_utf8(value):
    """What a line of JSON holds, with each file name in it as as_utf8 gives it."""
    if isinstance(value, str):
        return as_utf8(value)
    if isinstance(value, list):
        return [names_as_utf8(item) for item in value]
    if isinstance(value, dict):
        return {key: names_as_utf8(item) for key, item in value.items()}
    return value


def as_path(text):
    """The file name whose bytes are the UTF-8 of a text: the inverse of as_utf8."""
    if sys.getfilesystemencoding() == "utf-8":
        return text
    return os.fsdecode(text.encode("utf-8", "surrogateescape"))


def shown(name):
    """A file name as text for one line: bytes that are not UTF-8, and unprintable characters, as
    escapes.
    """
    try:
        text = os.fsencode(name).decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:  # no name of a file in this locale
        text = name.encode("utf-8", "backslashreplace").decode()
    return printable(text)


def printable(text):
    """Text for one line: unprintable characters as escapes."""
    characters = []
    for character in text:
        if not character.isprintable():
            character = character.encode("unicode_escape").decode()
        characters.append(character)
    return "".join(characters)
