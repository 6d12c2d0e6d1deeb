"""Symbols in a text: what an instruction lays stands between two NULs, so that a user's "<bin_3>" stays text.

Readers refuse NUL in data (fields.text), so nobody else can write one. A tokenizer gives the id of a symbol that it
knows, and spells one that it does not know. White space before a symbol belongs to it and is no token; what is behind
a symbol keeps its space, as byte-level BPE and SentencePiece want the beginning of a word.
"""

MARK = "\0"


def symbol(name: str) -> str:
    """Return a symbol, e.g. `<bin_3>`, as it stands in a text."""
    return f"{MARK}{name}{MARK}"


def pieces(text: str) -> list[tuple[str, bool]]:
    """Return a text in pieces, each with whether it is a symbol; one that was cut off in its middle is left out."""
    found = text.split(MARK)
    out = []
    for number, piece in enumerate(found):
        laid, last = number % 2 == 1, number + 1 == len(found)
        if not (laid and last):
            out.append((piece if laid or last else piece.rstrip(), laid))
    return [(piece, laid) for piece, laid in out if piece]


def plain(text: str) -> str:
    """Return a text with its symbols spelled, as people read it."""
    return text.replace(MARK, "")
