"""The captions of one sample, as the caption reader finds them: the txt member, then the json member's own."""

from collections.abc import Mapping
from typing import Any

from pretrain.data.decode import BadSample, decode_json, decode_text


def captions_of(members: Mapping[str, bytes]) -> list[str]:
    """Return the different captions of a sample, the one of the txt member first.

    Raises:
        BadSample: there is none, one is empty, or its bytes are not what they should be.
    """
    captions = [decode_text(members["txt"]).strip()] if "txt" in members else []
    tree = decode_json(members["json"]) if "json" in members else {}
    captions += captions_in(tree) if isinstance(tree, dict) else []
    if not captions:
        raise BadSample("no caption: neither a txt member nor captions in a json member")
    if not all(captions):
        raise BadSample("caption is empty")
    return list(dict.fromkeys(captions))


def captions_in(record: Mapping[str, Any], *, key: str = "caption") -> list[str]:
    """Return what a record says under `captions`, else under `key`, white space trimmed; null is nothing said.

    Raises:
        BadSample: it is neither text nor a list of texts.
    """
    found = record.get("captions")
    found = record.get(key) if found is None else found
    texts = [found] if isinstance(found, str) else [] if found is None else found
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise BadSample("caption is neither text nor a list of texts")
    return [text.strip() for text in texts]
