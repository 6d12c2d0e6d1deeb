"""Drawings to pixels: SVG text or a bitmap becomes a PNG on white, in several processes."""

import io
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial

from PIL import Image

from pretrain.data.format import ShardError

OVERSAMPLE = 2  # vectors are drawn twice as large and averaged: softer edges than the renderer's own


def render(drawing: str | bytes, size: int) -> bytes:
    """Return a drawing as the bytes of a `size` x `size` RGB PNG on white."""
    if isinstance(drawing, str):
        import resvg_py  # only the processes that draw need it

        side = size * OVERSAMPLE
        drawn = resvg_py.svg_to_bytes(
            svg_string=drawing,
            width=side,
            height=side,
            dpi=96,  # CSS's; the renderer's own default makes "100pt" nothing
            skip_system_fonts=True,
        )
        drawing = bytes(drawn)
    with Image.open(io.BytesIO(drawing)) as file:
        picture = file.convert("RGBA")
    side = max(picture.size)
    canvas = Image.new("RGBA", (side, side), "white")
    canvas.alpha_composite(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    small = canvas.convert("RGB").resize((size, size), Image.Resampling.BOX)
    out = io.BytesIO()
    small.save(out, "PNG")
    return out.getvalue()


def render_all(drawings: Mapping[str, str | bytes], *, size: int, workers: int) -> Iterator[tuple[str, bytes]]:
    """Yield (key, PNG) in the order of the mapping.

    Raises:
        ShardError: a drawing cannot be rendered, the renderer is missing or its process was killed.
    """
    try:
        import resvg_py  # noqa: F401 (asked here so that the sentence comes from the parent)
    except ImportError:
        raise ShardError("resvg_py is not installed and draws the SVG: run `pip install 'diptych[tools]'`") from None
    if workers < 2:
        yield from _guarded(drawings, (render(drawing, size) for drawing in drawings.values()))
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=leave_with_parent) as pool:
        pictures = pool.map(partial(render, size=size), drawings.values(), chunksize=16)
        yield from _guarded(drawings, pictures)


def _guarded(drawings: Mapping[str, str | bytes], pictures: Iterable[bytes]) -> Iterator[tuple[str, bytes]]:
    iterator = iter(pictures)
    for key in drawings:
        try:
            yield key, next(iterator)
        except (ValueError, OSError) as error:
            raise ShardError(
                f"drawing {key}: cannot be rendered ({error}); delete its package and run again"
            ) from error
        except BrokenProcessPool:
            raise ShardError(f"drawing {key}: the process that drew it was killed (memory?); run again") from None


def leave_with_parent() -> None:
    """Let Ctrl-C reach the parent only, and leave when the parent is killed: no process is left behind."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_watch, daemon=True).start()


def _watch() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
