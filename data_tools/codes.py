"""Put the codes of pictures into shards, as a member of each sample that readers find.

The table has shard (base name), key and codes: `pretrain/encode.py CODEBOOK SHARDS --codes OUT.parquet` writes it, and
so may any other program, for codes of a VQGAN of its own. The member holds them as little-endian uint16; dataset.json
says which image tokenizer they are of. All else is copied byte for byte; samples that the table does not name stay
without codes. The same command goes on after a stop.

Example:
  python -m data_tools codes data/photos --table codes.parquet --out data/photos-codes
"""

import argparse
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from data_tools import _engine, _inputs

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

COLUMNS = ("shard", "key", "codes")


class Piece(NamedTuple):
    """One shard and where it goes."""

    source: Path
    out: Path
    lines: list[bytes]  #: of its index
    table: Path
    member: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    parser.add_argument("shards", nargs="+", metavar="SHARDS", help="folders, tars, or tars in braces")
    parser.add_argument("--table", type=Path, required=True, metavar="PARQUET", help="table of shard, key and codes")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="folder of the new set")
    parser.add_argument("--member", type=_member, default="codes", metavar="NAME", help="extension (default codes)")
    _engine.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Write the new set."""
    from data_tools import _choice, _copy, _rows  # imported late: --help need not wait for them
    from data_tools._folder import claim
    from pretrain.config import ConfigError
    from pretrain.data import format as shards

    paths, engine = _inputs.shard_paths(args.shards), _engine.chosen(args)
    about = _checked(args.table)
    _copy.check_out(args.out, paths)
    with claim(args.out) as state:
        source = _rows.opened(paths, state=state, engine=engine)
        names = _choice.shards_by_name(source)  # refuses two of one name
        if missing := sorted(set(names) - _shards_of(args.table)):
            raise ConfigError(f"--table {args.table}: has no codes of {missing[0]}; is it of this set?")
        (args.out / shards.MANIFEST).unlink(missing_ok=True)  # half a set vouches for nothing
        _copy.plan(args.out, state, set(names))
        table = _engine.digest(args.table)
        tasks = [
            _engine.Task(
                f"{_copy.COPY}{shard.path.name}",
                Piece(shard.path, args.out / shard.path.name, shard.lines, args.table, args.member),
                _engine.digest(shard.path, table, args.member),
                shard.path.stat().st_size,
            )
            for shard in source
        ]
        notes = list(
            map(json.loads, _engine.run(coded, tasks, state=state, engine=engine, doing="write", fits=_copy.whole))
        )
        counts = {note["name"]: (note["samples"], note["bytes"], note["sha256"]) for note in notes}
        meta = {"source": sorted({path.absolute().parent.name for path in paths}), args.member: about}
        shards.write_manifest(args.out, counts, meta)
    _copy.tell(args.out, counts)
    if bare := sum(note["bare"] for note in notes):
        print(f"  {bare:>8}  samples are not in the table and have no codes")
    return 0


def coded(piece: Piece) -> bytes:
    """Write one shard with the codes of its samples and return a note of it."""
    from data_tools import _tar
    from pretrain.data import format as shards

    code_of = _codes_of(piece.table, piece.source.name)
    bare = 0
    with shards.ShardWriter(piece.out) as writer, _tar.opened(piece.source) as tar:
        for line in piece.lines:
            entry = shards.read_row(line)
            if piece.member in entry.members:
                raise shards.ShardError(
                    f"shard {piece.source}: {entry.key!r} has a member {piece.member!r} already; "
                    "choose another --member"
                )
            members = {name: tar.read(place) for name, place in entry.members.items()}
            codes = code_of.get(entry.key)
            bare += codes is None
            writer.add(entry.key, members if codes is None else {**members, piece.member: codes.tobytes()})
    samples, size, sha256 = writer.listed
    note = {"name": piece.out.name, "samples": samples, "bytes": size, "sha256": sha256, "bare": bare}
    return json.dumps(note).encode()


def _checked(table: Path) -> dict[str, object]:
    """Return what a table says of its image tokenizer; of one that says nothing, its name."""
    from pretrain.config import ConfigError

    if not table.is_file():
        raise ConfigError(f"--table {table}: no such file; name a Parquet file of {', '.join(COLUMNS)}")
    try:
        import pyarrow.parquet as pq

        from pretrain.data.feature_table import read_about

        names = set(pq.read_schema(table).names)
    except ImportError as error:
        raise ConfigError(f"--table {table}: Parquet needs pyarrow ({error}); pip install 'diptych[tools]'") from None
    except (OSError, ValueError) as error:  # pyarrow's ArrowInvalid is a ValueError
        raise ConfigError(f"--table {table}: is no readable Parquet file ({str(error)[:200]})") from None
    if missing := [name for name in COLUMNS if name not in names]:
        raise ConfigError(f"--table {table}: has no column {missing[0]!r}; it has {', '.join(sorted(names))}")
    about = read_about(table)
    return {name: value for name, value in about.items() if name not in ("version", "shards")} or {"table": table.name}


def _shards_of(table: Path) -> set[str]:
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    return set(pc.unique(pq.read_table(table, columns=["shard"])["shard"]).to_pylist())


def _codes_of(table: Path, shard: str) -> "dict[str, NDArray[np.uint16]]":
    """Return the codes of each sample of a shard.

    Raises:
        ConfigError: a code that is no number below 65,536.
    """
    import numpy as np
    import pyarrow.parquet as pq

    from pretrain.config import ConfigError

    rows = pq.read_table(table, columns=list(COLUMNS), filters=[("shard", "==", shard)])
    found = {}
    for key, codes in zip(rows["key"].to_pylist(), rows["codes"]):
        values = np.asarray(codes.as_py() or [-1])
        if values.dtype.kind not in "iu" or values.min() < 0 or values.max() >= 1 << 16:
            raise ConfigError(f"--table {table}: the codes of {key!r} in {shard} are no numbers from 0 to 65535")
        found[str(key)] = values.astype("<u2")
    return found


def _member(text: str) -> str:
    if not re.fullmatch(r"[a-z0-9_]+(\.[a-z0-9_]+)*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no extension; write small letters, digits and dots")
    return text
