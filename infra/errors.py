"""The one exception for everything that the user can put right.

    raise UserError("beta=0.08 is too large for 32 blocks at sparsity 0.7: at most 0.01935")

The command line prints it on one line and exits with code 2. Anything else is a bug and keeps
its traceback.
"""

from collections.abc import Iterable
from difflib import get_close_matches


class UserError(Exception):
    """What is wrong, where, and what to do about it, on one line."""


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: the nearest known one, else all of them."""
    names = sorted(known)
    close = get_close_matches(name, names, n=1, cutoff=0.6)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(names)}"
