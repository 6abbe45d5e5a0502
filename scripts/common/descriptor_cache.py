"""Finished descriptors, kept in an sqlite file."""

import sqlite3
import threading
from contextlib import contextmanager

import numpy as np

from common.errors import InputError


class DescriptorCache:
    """The descriptors of one network, in a file that several commands may use at once.

    Without a path nothing is kept. An image is known by the SHA-256 of its file, 32 bytes, a
    network and a view by the network's key for the view. Every method raises InputError where
    the file cannot be used.
    """

    def __init__(self, path, network):
        self.path = path
        self.network_key = network.key  # of a view
        self.dimensions = network.dimensions
        self.new_images = set()  # SHA-256 of those whose descriptors were computed
        self.lock = threading.Lock()
        with self.locked():
            if not path:
                return
            path.parent.mkdir(parents=True, exist_ok=True)
            self.connection = sqlite3.connect(path, timeout=60, check_same_thread=False)
            self.connection.execute(
                "CREATE TABLE IF NOT EXISTS descriptors "
                "(picture BLOB, network BLOB, descriptor BLOB, PRIMARY KEY (picture, network))"
            )

    @contextmanager
    def locked(self):
        """Let one thread at a time in; what sqlite or the file system raises becomes InputError."""
        try:
            with self.lock:
                yield
        except (sqlite3.Error, OSError) as error:
            remedy = "delete it, name another file with --cache, or say --no-cache"
            raise InputError(
                f"{self.path}: cannot be used as a cache ({error}); {remedy}"
            ) from None

    def get(self, digest, view):
        """The descriptor of an image's view, (dimensions,) float32, or None where no valid one is
        kept.
        """
        if not self.path:
            return None
        query = "SELECT descriptor FROM descriptors WHERE picture = ? AND network = ?"
        with self.locked():
            record = self.connection.execute(query, (digest, self.network_key(view))).fetchone()
        if record is None:
            return None
        (blob,) = record
        if len(blob) != 4 * self.dimensions:
            return None
        descriptor = np.frombuffer(blob, "<f4")
        is_unit = abs(float(descriptor @ descriptor) - 1) < 1e-3
        return descriptor if is_unit else None

    def put(self, digests, view, descriptors):
        """Keep the descriptors (n, dimensions) of a view of n images; they are on the disk on
        return.
        """
        self.new_images.update(digests)
        if not self.path:
            return
        key = self.network_key(view)
        records = []
        for digest, descriptor in zip(digests, descriptors, strict=True):
            blob = descriptor.astype("<f4").tobytes()
            records.append((digest, key, blob))
        insert = "INSERT OR REPLACE INTO descriptors VALUES (?, ?, ?)"
        with self.locked(), self.connection:
            self.connection.executemany(insert, records)
