"""Files: atomic writing, digests."""

import hashlib
import os
from contextlib import contextmanager


@contextmanager
def atomic(path):
    """Gives a temporary path beside `path`, which takes its place when the block ends well and
    vanishes otherwise.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def sha256_of(path):
    """SHA-256 of a file, 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
