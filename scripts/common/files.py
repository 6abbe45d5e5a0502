"""Files: atomic writing, digests, names fit for a terminal."""

import hashlib
import os
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


def shown(name):
    """A file name as text for one line: bytes that are not UTF-8, and unprintable characters, as
    escapes.
    """
    text = os.fsencode(name).decode("utf-8", "backslashreplace")
    characters = []
    for character in text:
        if not character.isprintable():
            character = character.encode("unicode_escape").decode()
        characters.append(character)
    return "".join(characters)
