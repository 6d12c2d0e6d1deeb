"""Where a value lies in a sample: members by extension, json members by path, and what makes them usable text.

A config names sources in order, the first that is there counts: `txt` is the member of that extension, `json:KEY` a
value of the json member, `json:translation.en` one that lies deeper.
"""

from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import AfterValidator

from pretrain.batch import Record
from pretrain.data.decode import BadSample, decode_text
from pretrain.dist import hash64

JSON = "json:"
MAX_TEXT = 1_000_000  #: characters; longer ones are a fault of the data, and would be tokenised for nothing


def _hole(value: str) -> str:
    if value.count("{}") != 1:
        raise ValueError("needs one hole {}")
    return value


def _in_json(value: str) -> str:
    if not value.startswith(JSON):
        raise ValueError("write it as json:KEY")
    return value


Template = Annotated[str, AfterValidator(_hole)]  #: a text with one hole {}
Path = Annotated[str, AfterValidator(_in_json)]  #: json:KEY


def lookup(record: Record, meta: dict[str, Any], source: str) -> Any:
    """Return what lies at a source, or None where nothing does."""
    if not source.startswith(JSON):
        return decode_text(record.fields[source], name=source) if source in record.fields else None
    found: Any = meta
    path = source.removeprefix(JSON)
    for name in [path] if path in meta else path.split("."):
        found = found.get(name) if isinstance(found, dict) else None
    return found


def first(record: Record, meta: dict[str, Any], sources: Sequence[str], what: str) -> tuple[Any, str]:
    """Return what lies at the first source that has something, and that source.

    Raises:
        BadSample: none has; the reason lists what the sample does have.
    """
    for source in sources:
        found = lookup(record, meta, source)
        if found is not None:
            return found, source
    has = ", ".join([*record.fields, *(f"{JSON}{name}" for name in list(meta)[:20])])
    raise BadSample(f"no {what}: none of {', '.join(sources)}; it has {has or 'nothing at all'}")


def text(found: Any, what: str) -> str:
    """Return a value as text without blanks around it.

    Raises:
        BadSample: it is something else, is blank, endless, or holds what cannot be written as UTF-8.
    """
    if not isinstance(found, str):
        raise BadSample(f"{what} is a {type(found).__name__}, expected text")
    words: str = found.strip()
    if not words:
        raise BadSample(f"{what} is empty")
    if len(words) > MAX_TEXT:
        raise BadSample(f"{what} has {len(words)} characters, over {MAX_TEXT}")
    if "\0" in words:  # UTF-16, mostly, or bytes from somewhere else
        raise BadSample(f"{what} holds NUL, which is no text")
    if not (words.isascii() or encodable(words)):
        raise BadSample(f"{what} holds half a surrogate pair, which is no text")
    return words


def encodable(found: str) -> bool:
    """Return whether a string can be written as UTF-8: json may hold halves of surrogate pairs, which cannot."""
    try:
        found.encode()
    except UnicodeEncodeError:
        return False
    return True


def draw_text(found: Any, what: str, draw: int, salt: str) -> str:
    """Return a text, or one of a list of texts, drawn by (draw, salt)."""
    if isinstance(found, list):
        if not found:
            raise BadSample(f"{what} is a list without entries")
        found = found[draw_below(len(found), draw, salt)]
    return text(found, what)


def draw_item(meta: dict[str, Any], source: str | None, draw: int) -> dict[str, Any]:
    """Return the json member with one object of the list at `source` laid over it, drawn by `draw`; None: as it is."""
    if source is None:
        return meta
    found = lookup(Record("", "", {}), meta, source)
    if not isinstance(found, list) or not found or not all(isinstance(item, dict) for item in found):
        raise BadSample(f"{source} is no list of objects")
    return {**meta, **found[draw_below(len(found), draw, "item")]}


def fill(template: str, words: str) -> str:
    """Return a template with its hole filled; braces in the words stay as they are."""
    return template.replace("{}", words)


def draw_below(count: int, draw: int, salt: str) -> int:
    """Return one of 0 ... count - 1, drawn by (draw, salt)."""
    return hash64(draw, salt) % count
