"""Work divided among processes."""

import multiprocessing
import os
import signal
import threading
from concurrent.futures import ProcessPoolExecutor

import pylibmagic  # noqa: F401  (libmagic for AugLy, where the system has none)
from tqdm import tqdm

WINDOW = 8192  # pictures that wait for a worker at once


def start_worker():
    """In a worker process: leave Ctrl-C to the parent, and end as soon as that is gone, killed or
    not.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def parallel(function, items, workers, title):
    """Yields the function's value for each item, in order, computed by `workers` processes below a
    progress bar.
    """
    pool = ProcessPoolExecutor(workers, initializer=start_worker)
    try:
        with tqdm(total=len(items), desc=title, unit="picture") as bar:
            for start in range(0, len(items), WINDOW):
                for value in pool.map(function, items[start : start + WINDOW], chunksize=4):
                    bar.update()
                    yield value
    finally:
        pool.shutdown(cancel_futures=True)
