"""The one exception that means "the user can fix this", and the search for the name they meant.

Every mistake a user can make raises `UserError` with a message that says what was given, what was expected and what to
do. The command line prints that message alone and exits with code 2; in a notebook it is an ordinary `ValueError`.
"""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake in the user's input. The message is complete: no traceback is needed to act on it."""


def nearest(name: str, options: Iterable[str], count: int = 3) -> list[str]:
    """Returns the `count` options that look most like `name`, best first (never empty if there is an option)."""
    options = list(dict.fromkeys(options))
    close = difflib.get_close_matches(name, options, n=count, cutoff=0.5)
    if close:
        return close
    score = {o: difflib.SequenceMatcher(None, name, o).ratio() for o in options}
    return sorted(options, key=lambda o: -score[o])[:count]


def did_you_mean(name: str, options: Iterable[str]) -> str:
    """Returns 'did you mean X? (known: a, b, c)', the tail of every unknown-name message."""
    options = sorted(set(options))
    if not options:
        return "there are none to choose from"
    shown = ", ".join(options[:20]) + (", ..." if len(options) > 20 else "")
    return f"did you mean {nearest(name, options, 1)[0]!r}? (known: {shown})"
