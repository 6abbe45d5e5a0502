"""Check whether a file can be submitted: every rule of the two tracks.

    python scripts/validate_submission.py exp/v107/extract/v107_iso.h5  # descriptor track
    python scripts/validate_submission.py exp/v107/extract/v107_iso.csv  # matching track
    # fewer rows than DISC21 has
    python scripts/validate_submission.py --partial exp/v107/extract/v107_iso.h5

Prints one line and exits with 0, or says on stderr what is wrong first and exits with 2.

The file may be an untrusted one. In an .h5, links, external and virtual data, filters, and shapes
are checked before any data is read, so that it can neither make this command open another file nor
use much memory. Rules of the challenge: arXiv 2106.09672.
"""

import argparse
import sys

from common.errors import one_line_errors
from common.submissions import (
    add_submission_arguments,
    check_matches,
    check_submission,
    track_of,
)


def parse_args(argv=None):
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_submission_arguments(parser)
    parser.add_argument(
        "--partial", action="store_true", help="an .h5 may have fewer rows than DISC21"
    )
    return parser.parse_args(argv)


@one_line_errors
def main(argv=None):
    """Run the command; returns the exit code: 0, or 2 with one line on stderr."""
    args = parse_args(argv)
    if track_of(args.submission, args.track) == "matching":
        print(check_matches(args.submission))
    else:
        print(check_submission(args.submission, challenge=True, partial=args.partial))
    return 0


if __name__ == "__main__":
    sys.exit(main())
