"""What several commands' arguments have in common."""


def at_least(kind, low):
    """An argparse type: a finite number no less than `low`."""

    def number(text):
        value = kind(text)
        if not low <= value < float("inf"):
            raise ValueError(text)
        return value

    number.__name__ = f"{kind.__name__} >= {low}"
    return number


FORMATS = (".png", ".svg", ".pdf")
