"""A CSV or TSV table of image paths or base64 images, with a header or (like OFA's files) without one."""

import csv
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from data_tools.sources.base import Options, Row, column_of, count_lines, different, is_base64, picture
from pretrain.config import ConfigError

MAX_FIELD = 64 * 1024 * 1024  # characters in one cell; the csv module stops at 131072 otherwise

_NOT_UTF8 = re.compile("[\udc80-\udcff]")  # how bytes look that did not decode


class Form(NamedTuple):
    """What is known of a table before its first row."""

    names: list[str]
    headerless: bool
    separator: str
    quotes: bool


def claims(source: Path) -> bool:
    """Return whether the path is a file that ends in .csv or .tsv."""
    return source.is_file() and source.suffix in (".csv", ".tsv")


def count(source: Path, options: Options) -> int:
    """Return about the number of rows: one a line."""
    return count_lines(source)


def rows(source: Path, options: Options) -> Iterator[Row]:
    """Yield a row a record.

    Raises:
        ConfigError: the table lacks a column, or its quotes do not end.
    """
    form = _form(source, options)
    image = column_of(options.image, ("image",), form.names, source, "--image-column")
    caption = column_of(options.caption, ("caption",), form.names, source, "--caption-column")
    records = _cells(source, form.separator, quotes=form.quotes)
    if not form.headerless:
        next(records, None)
    for number, (line, cells) in enumerate(records):
        where = f"{source.name} line {line}"
        if any(_NOT_UTF8.search(cell) for cell in cells if not cell.isascii()):
            yield Row(number, where, None, [], {}, "row is not UTF-8")
        elif len(cells) != len(form.names):
            likeness = "the first line" if form.headerless else "the header"
            yield Row(number, where, None, [], {}, f"row has another number of cells than {likeness}")
        else:
            record = {
                name: cell for at, (name, cell) in enumerate(zip(form.names, cells)) if at not in (image, caption)
            }
            found = picture(cells[image], source.parent, options)
            problem = "" if found else f"no image path under {form.names[image]!r}"
            captions = different([cells[caption].strip()])
            yield Row(number, where, found, captions, record, problem, wordless=options.wordless)


def _form(source: Path, options: Options) -> Form:
    """Return the names of the columns: from --columns, else from the first line, unless that is no header."""
    separator = options.separator or ("\t" if source.suffix == ".tsv" else ",")
    encoded = any(map(is_base64, _first(source, separator, quotes=False)))
    quotes = options.quotes if options.quotes is not None else not (encoded and separator == "\t")
    first = _first(source, separator, quotes=quotes)
    if not (options.columns or options.headerless or encoded):
        return Form(first, headerless=False, separator=separator, quotes=quotes)
    names = list(options.columns) or [f"column{at}" for at in range(len(first))]
    if len(names) != len(first):
        raise ConfigError(
            f"source {source}: --columns names {len(names)} columns, its first line has {len(first)} cells"
        )
    if encoded and not options.columns and not (options.image or "").removeprefix("-").isdecimal():
        where = next(at for at, cell in enumerate(first) if is_base64(cell))
        raise ConfigError(
            f"source {source}: its first line holds a picture (cell {where}), so there is no header: name the columns "
            f"with --columns NAME,NAME,... or by number, e.g. --image-column {where} --caption-column 2"
        )
    return Form(names, headerless=True, separator=separator, quotes=quotes)


def _first(source: Path, separator: str, *, quotes: bool) -> list[str]:
    return next(_cells(source, separator, quotes=quotes), (0, []))[1]


def _cells(source: Path, separator: str, *, quotes: bool) -> Iterator[tuple[int, list[str]]]:
    """Yield (line number, cells), blank lines left out; bytes that are not UTF-8 become surrogates."""
    csv.field_size_limit(MAX_FIELD)
    if not quotes:
        with open(source, "rb") as lines:  # a stray carriage return ends no line here
            for number, line in enumerate(lines, 1):
                text = line.decode("utf-8-sig" if number == 1 else "utf-8", errors="surrogateescape").rstrip("\r\n")
                if text:
                    yield number, text.split(separator)
        return
    with open(source, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        reader = csv.reader(file, delimiter=separator)
        try:
            for cells in reader:
                if cells:
                    yield reader.line_num, cells
        except csv.Error as error:
            raise ConfigError(
                f"source {source}, line {reader.line_num}: not readable as a table ({error}); "
                "--no-quotes takes quotation marks for letters"
            ) from error
