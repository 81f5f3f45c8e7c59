"""The one exception for everything that the user can put right.

    raise UserError("beta=0.08 is too large for 32 blocks at sparsity 0.7: at most 0.01935")

The command line prints it on one line and exits with code 2. Anything else is a bug and keeps
its traceback.
"""

from collections.abc import Iterable
from difflib import get_close_matches


class UserError(Exception):
    """What is wrong, where, and what to do about it, on one line."""


def first_line(error: BaseException) -> str:
    """The first line of what an error says; the name of its type where it says nothing."""
    lines = (line.strip() for line in str(error).splitlines())
    return next((line for line in lines if line), type(error).__name__)


def one_line(error: UserError, longest: int = 800) -> str:
    """The message for a terminal, whatever the names in it hold: printable, and cut in its middle.

    one_line(UserError("a\\nb: no such file"))   # 'a\\\\nb: no such file'
    """
    text = "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(error)
    )
    half = (longest - 5) // 2
    return text if len(text) <= longest else f"{text[:half]} ... {text[-half:]}"


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: the nearest known one, else all of them."""
    names = sorted(known)
    close = get_close_matches(name, names, n=1, cutoff=0.6)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(names)}"
