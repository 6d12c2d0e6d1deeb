"""What a reader is: a plug-in that turns a Record (bytes) into an Example (pictures and strings).

A reader file offers `Config` and `Reader`; its module name is its name under `data.reader`. A reader is a pure
function of the record: what it draws, it draws from `record.draw`. The prefix of an Example is given, its suffix is
learned; instructions of a paper are laid around them by objectives and methods.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

from pretrain.batch import Example, Record
from pretrain.config import ConfigError, plug_in
from pretrain.data.decode import IMAGES, MAX_PIXELS, BadSample, decode_json
from pretrain.data.picture import Picture

PACKAGE = "pretrain.data.readers"


class Reader(ABC):
    """Base of the readers."""

    boxes: ClassVar[bool] = False  #: it gives boxes: its pictures are scaled whole, never cropped, turned or mirrored
    codes: ClassVar[bool] = False  #: it gives codes of its pictures: likewise

    def __init__(self, config: Any, *, max_pixels: int = MAX_PIXELS) -> None:
        self.config = config
        self.max_pixels = max_pixels

    @abstractmethod
    def read(self, record: Record) -> Example:
        """Return the sample as its task sees it.

        Raises:
            BadSample: a member is missing, broken or empty.
        """

    def image(self, record: Record, names: tuple[str, ...] = IMAGES) -> Picture:
        """Return the first image member among `names`; nothing of it is decoded before it is asked for."""
        name = next((name for name in names if name in record.fields), None)
        if name is None:
            raise BadSample(f"no image member; it has {', '.join(record.fields) or 'none at all'}")
        return Picture(record.fields[name], max_pixels=self.max_pixels)

    def pictures(self, record: Record, names: Sequence[str] | None) -> list[Picture]:
        """Return the image as a list; an empty one where the config names no extensions."""
        return [] if names is None else [self.image(record, tuple(names))]

    def meta(self, record: Record) -> dict[str, Any]:
        """Return the json member, or an empty dict where there is none."""
        if "json" not in record.fields:
            return {}
        tree = decode_json(record.fields["json"])
        if not isinstance(tree, dict):
            raise BadSample(f"json is a {type(tree).__name__}, expected an object")
        return tree


def make(chosen: dict[str, dict[str, Any]], *, max_pixels: int = MAX_PIXELS) -> Reader:
    """Return the reader that a config names, e.g. {"caption": {"text": ["txt"]}}.

    Raises:
        ConfigError: not exactly one reader, an unknown one, or options it does not have.
    """
    if len(chosen) != 1:
        raise ConfigError(f"data.reader: name exactly one reader, as in {{caption: {{}}}}, got {list(chosen)}")
    module, config = plug_in(PACKAGE, chosen, where="data.reader")
    reader: Reader = module.Reader(config, max_pixels=max_pixels)
    return reader
