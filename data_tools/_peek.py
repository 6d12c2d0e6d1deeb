"""Format and size of a JPEG, PNG or WebP from its first bytes, without an image library and without the rest.

Whatever is not plainly right is left to Pillow: None means "ask it", never "broken".
"""

import zlib
from collections.abc import Callable

Read = Callable[[int, int], bytes]  #: (offset, number of bytes) -> bytes, fewer at the end

FIRST = 1024  # bytes that are read at once; holds all that is asked of most images
PNG = b"\x89PNG\r\n\x1a\n"
DEPTHS = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}  #: PNG colour type -> bit depths
FRAMES = frozenset({*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC})  #: JPEG markers of a frame header, which has the size
ALONE = frozenset({0x01, *range(0xD0, 0xD8)})  #: JPEG markers without a segment
SCAN = 0xDA


def peek(read: Read, size: int) -> tuple[str, int, int] | None:
    """Return (extension of the true format, width, height) of an image of `size` bytes, or None."""
    head = read(0, min(FIRST, size))

    def ahead(at: int, number: int) -> bytes:
        return head[at : at + number] if at + number <= len(head) else read(at, max(0, min(number, size - at)))

    if head[:3] == b"\xff\xd8\xff":
        return _jpeg(ahead)
    if head[:8] == PNG:
        return _png(head)
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return _webp(head, size)
    return None


def _jpeg(ahead: Read) -> tuple[str, int, int] | None:
    """Walk from segment to segment up to the first scan, as Pillow does."""
    at, found = 2, None
    while True:
        cell = ahead(at, 4)
        if len(cell) < 4 or cell[0] != 0xFF:
            return None
        marker, length = cell[1], int.from_bytes(cell[2:])
        if marker == SCAN:
            return found
        if marker == 0xFF or marker in ALONE:
            at += 1 if marker == 0xFF else 2
            continue
        if marker < 0xC0 or length < 2:
            return None
        if marker in FRAMES:
            frame = ahead(at + 4, 6)
            if found or len(frame) < 6 or frame[0] != 8 or frame[5] not in (1, 3, 4):
                return None
            found = ("jpg", int.from_bytes(frame[3:5]), int.from_bytes(frame[1:3]))
            if not (found[1] and found[2]):
                return None
        at += 2 + length


def _png(head: bytes) -> tuple[str, int, int] | None:
    chunk = head[12:29]
    if head[8:12] != b"\0\0\0\r" or chunk[:4] != b"IHDR" or len(head) < 33:
        return None
    if zlib.crc32(chunk) != int.from_bytes(head[29:33]) or head[24] not in DEPTHS.get(head[25], ()):
        return None
    width, height = int.from_bytes(chunk[4:8]), int.from_bytes(chunk[8:12])
    return ("png", width, height) if width and height else None


def _webp(head: bytes, size: int) -> tuple[str, int, int] | None:
    if int.from_bytes(head[4:8], "little") + 8 > size or len(head) < 30:
        return None
    kind, body = head[12:16], head[20:30]
    if kind == b"VP8X":
        return "webp", 1 + int.from_bytes(body[4:7], "little"), 1 + int.from_bytes(body[7:10], "little")
    if kind == b"VP8 " and body[3:6] == b"\x9d\x01\x2a" and not body[0] & 1:
        sides = [int.from_bytes(body[at : at + 2], "little") & 0x3FFF for at in (6, 8)]
        return ("webp", sides[0], sides[1]) if all(sides) else None
    if kind == b"VP8L" and body[0] == 0x2F:
        bits = int.from_bytes(body[1:5], "little")
        return "webp", 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    return None
