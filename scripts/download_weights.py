"""Download the author's published weights to where the README's commands expect them.

    python scripts/download_weights.py v107                      # the final network
    python scripts/download_weights.py v98 --sha256 0123abcd...  # before it saw a label

Writes exp/v107/train/checkpoint_0009.pth.tar or exp/v98/train/checkpoint_0001.pth.tar and prints
its SHA-256. The author did not publish it: keep it, and give it the next time. The file gets its
name only when it is complete and has the given SHA-256. An existing file is checked and left as it
is.
"""

import argparse
import re
import sys
import urllib.error
import urllib.request
from functools import partial
from http.client import HTTPException
from pathlib import Path

from tqdm import tqdm

from common.errors import InputError, one_line_errors
from common.files import atomic, sha256_of

EXP = Path(__file__).resolve().parents[1] / "exp"
RELEASE = "https://github.com/lyakaap/ISC21-Descriptor-Track-1st/releases/download/v1.0.1"
WEIGHTS = {
    "v107": (f"{RELEASE}/isc_ft_v107.pth.tar", "v107/train/checkpoint_0009.pth.tar"),
    "v98": (f"{RELEASE}/isc_selfsup_v98.pth.tar", "v98/train/checkpoint_0001.pth.tar"),
}


def show_progress(bar, blocks, size, total):
    """Show urlretrieve's progress in a tqdm bar."""
    bar.total = total
    bar.update(blocks * size - bar.n)


def download(url, path, sha256=None):
    """Download `url` to `path` unless it exists; returns its SHA-256.

    Raises InputError where the download fails or the SHA-256 is another; then nothing has changed.
    """
    if path.exists():
        digest = sha256_of(path)
        if sha256 not in (None, digest):
            raise InputError(
                f"{path}: is not the file that --sha256 names but {digest}; move it away"
            )
        return digest
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic(path) as temporary, tqdm(desc=path.name, unit="B", unit_scale=True) as bar:
        progress = partial(show_progress, bar)
        try:  # the user names the URL; a file that ends too soon is a URLError
            urllib.request.urlretrieve(url, temporary, progress)  # noqa: S310
        except (urllib.error.URLError, HTTPException, ValueError) as error:
            raise InputError(
                f"{url}: cannot be downloaded ({error}); check the network, or give --url"
            ) from None
        digest = sha256_of(temporary)
        if sha256 not in (None, digest):
            raise InputError(
                f"{url}: is not the file that --sha256 names but {digest}; nothing was kept"
            )
    return digest


def parse_args(argv=None):
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stage", choices=WEIGHTS, help="whose weights")
    parser.add_argument("--sha256", metavar="HEX", help="refuse any other file")
    parser.add_argument(
        "--url", help="another place that has the file (default: the author's release)"
    )
    parser.add_argument(
        "--exp", type=Path, default=EXP, help="folder of the stages (default: %(default)s)"
    )
    args = parser.parse_args(argv)
    if args.sha256 and not re.fullmatch("[0-9a-fA-F]{64}", args.sha256):
        parser.error(f"--sha256 {args.sha256}: must be 64 hexadecimal digits")
    return args


@one_line_errors
def main(argv=None):
    """Run the command; returns the exit code: 0, or 2 with one line on stderr."""
    args = parse_args(argv)
    url, name = WEIGHTS[args.stage]
    path = args.exp / name
    digest = download(args.url or url, path, args.sha256 and args.sha256.lower())
    print(f"{digest}  {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
