"""What a server says, as it may be shown on a terminal."""


def printable(text: str) -> str:
    """Without what would steer the terminal: the server may be a stranger's."""
    return "".join(char if char.isprintable() else " " for char in text)
