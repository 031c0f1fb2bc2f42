"""Text from files that is safe to print: no escape sequences, no control characters, bounded length."""


def printable(text: str, max_len: int) -> str:
    """The text with control, format and surrogate characters as escapes, except newlines; cut after `max_len`.

    A terminal runs escape sequences (`ESC ]0;...`), and bidirectional marks reorder what a reader sees.
    """
    cut = f"{text[:max_len]}..." if len(text) > max_len else text
    if cut.isprintable():
        return cut
    return "".join(char if char.isprintable() or char == "\n" else _escape(char) for char in cut)


def quoted(text: str, max_len: int = 200) -> str:
    """The text in quotes on one line, for names from a file."""
    return f"'{printable(text, max_len)}'".replace("\n", "\\n")


def _escape(char: str) -> str:
    # Spaces other than U+0020 are not "printable" either, but harmless.
    return char if char.isspace() and ord(char) > 0xA0 and char not in "\u2028\u2029" else ascii(char)[1:-1]
