"""What is shown on a console: text that came from elsewhere, without what a terminal would obey.

A text may hold escape sequences, which recolour, clear or retitle a terminal, and marks that turn the direction of what
follows. They are shown by their numbers, as JSON writes them, so that JSON stays what it is.
"""

import re
import sys

# but for tab and line feed: control characters of both sets, and the overriding of directions
OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def harmless(text: str) -> str:
    """The text with every character that a terminal obeys as \\u and its number."""
    return OBEYED.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def tell(text: str) -> None:
    """Prints a line at once, harmlessly."""
    print(harmless(text), flush=True)


def warn(text: str) -> None:
    """Prints a line on standard error, harmlessly, which says whose it is."""
    print(harmless(f"trunkline: {text}"), file=sys.stderr)
