"""Errors that the person at the keyboard can mend; the command line shows them as one line."""


class UserError(Exception):
    """The message names the thing, the value and the way out."""

    exit_code = 1


class SettingsError(UserError):
    """A setting is wrong: nothing has been written yet."""

    exit_code = 2


class ShardError(UserError):
    """A shard, sidecar or index is not what it claims to be."""


def first_line(error: Exception) -> str:
    """What it says in its first line; its kind where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def last_line(text: str) -> str:
    """Of a traceback, what was wrong."""
    return text.strip().splitlines()[-1]


def printable(text: str) -> str:
    """What a terminal would obey instead of showing it, written out: names come from data."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def in_markdown(text: str) -> str:
    """So that it is shown as it is: no markup, no new line, no other cell of a table."""
    return "".join(f"\\{c}" if c in "\\`*_[]<>|#" else c for c in printable(text))
