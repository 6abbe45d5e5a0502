"""A function of many items, computed by worker processes."""

import multiprocessing
import os
import signal
import threading
from concurrent.futures import ProcessPoolExecutor

from tqdm import tqdm

WINDOW = 8192  # items that wait for a worker at once


def start_worker():
    """Initialize a worker process: Ctrl-C is left to its parent, and it ends when its parent does.

    The parent may be killed without a chance to end its workers.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=end_after_parent, daemon=True).start()


def end_after_parent():
    """Wait for the end of the parent process, then end this one."""
    multiprocessing.parent_process().join()
    os._exit(1)


def parallel(function, items, workers, title):
    """Yield function(item) of each item, in order, computed by `workers` processes.

    A progress bar shows `title`. items: a list.
    """
    pool = ProcessPoolExecutor(workers, initializer=start_worker)
    try:
        with tqdm(total=len(items), desc=title, unit="image") as bar:
            for start in range(0, len(items), WINDOW):
                window = items[start : start + WINDOW]
                for value in pool.map(function, window, chunksize=4):
                    bar.update()
                    yield value
    finally:
        pool.shutdown(cancel_futures=True)
