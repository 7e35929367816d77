"""What an error says, in one line."""

from __future__ import annotations


def message(error: BaseException) -> str:
    """Its message: "division by zero"; its kind, if it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def one_line(error: BaseException) -> str:
    """Its kind and its message: "ZeroDivisionError: division by zero"."""
    said = " ".join(str(error).split())
    return f"{type(error).__name__}{said and f': {said}'}"
