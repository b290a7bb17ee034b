"""The one kind of error a user is meant to read."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Something the user gave cannot be used.

    The message is one or two sentences with three parts: what was given, what is allowed, and what to do. The command line
    prints it alone on stderr and exits with code 2; as a `ValueError` it behaves as expected from Python too.
    """


def nearest(given: str, allowed: Iterable[str]) -> str:
    """Return ``" Did you mean 'x'?"`` for the closest allowed word, or an empty string when nothing is close."""
    matches = difflib.get_close_matches(str(given), [str(word) for word in allowed], n=1, cutoff=0.6)
    return f" Did you mean '{matches[0]}'?" if matches else ""


def unknown(kind: str, given: str, allowed: Iterable[str]) -> UserError:
    """Build the error for a name that is not in a known set, offering the nearest one."""
    words = sorted(str(word) for word in allowed)
    return UserError(f"unknown {kind} '{given}'.{nearest(given, words)} Allowed: {', '.join(words)}.")
