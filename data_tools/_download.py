"""One fetch from table to report: plan, download, publish what is finished, say what became of the URLs."""

import argparse
import json
import math
import re
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

from data_tools import _img2dataset, _progress, _urls
from data_tools._cache import cache_folder
from data_tools._folder import claim
from data_tools._pairs import source_of
from data_tools.sources.base import Options
from pretrain.config import ConfigError
from pretrain.data import format as shards
from pretrain.data import headers

REPORT = "fetch-report.json"
STATE = ".fetch"
DIGESTED = 1 << 20  # bytes at either end of the table that tell it from another
ATTEMPTS = 2  # at shards that turn out damaged


def fetch(args: argparse.Namespace) -> int:
    """Download what is not there yet, write shards, report and manifest; return the exit status.

    Raises:
        ConfigError: the table cannot be read, or the folder was begun with another table or other options.
        ShardError: img2dataset cannot be had or stopped, or no URL gave a picture.
    """
    source = source_of(args.table, None)
    if source.__name__.rpartition(".")[2] not in ("table", "jsonl", "parquet"):
        raise ConfigError(f"{args.table}: is no table; name a .csv, .tsv, .jsonl or .parquet with URLs and captions")
    options = Options(image=args.url_column, caption=args.caption_column)
    if next(source.rows(args.table, options), None) is None:
        raise ConfigError(f"{args.table}: holds no row; nothing to fetch")
    with claim(args.out):
        state = args.out / STATE
        state.mkdir(exist_ok=True)
        python = _img2dataset.environment(args.cache or cache_folder(), args.python)
        _same_or_refuse(args, state / "begun.json")
        (args.out / shards.MANIFEST).unlink(missing_ok=True)
        plans, first = [], 0
        begun = sum(1 for _ in state.glob("pass-*/urls/plan.json"))
        for number in range(max(args.passes, begun)):
            folder = state / f"pass-{number}"
            plan = _urls.read(folder / "urls")
            if plan is None and number == 0:
                plan = _urls.write(
                    source, args.table, options, hashes=args.sha256_column, folder=folder / "urls",
                    shard_size=args.shard_size,
                )  # fmt: skip
            elif plan is None:
                before = state / f"pass-{number - 1}"
                plan = _urls.write_failed(
                    before / "urls", before / "img2dataset", folder / "urls", shard_size=args.shard_size
                )
            if plan.rows:
                _download(args, python, folder, plan, first=first)
            plans.append(plan)
            first += math.ceil(plan.rows / args.shard_size)
        return _finish(args, state, plans)


def _same_or_refuse(args: argparse.Namespace, path: Path) -> None:
    """Remember what decides about the shards; the rest may differ when the command is given again."""
    with open(args.table, "rb") as file:
        ends = file.read(DIGESTED)
        file.seek(max(0, args.table.stat().st_size - DIGESTED))
        ends += file.read()
    names = ("url_column", "caption_column", "sha256_column", "prefix", "shard_size", "size", "quality")
    now = {"table": f"{args.table.stat().st_size} bytes, {sha256(ends).hexdigest()[:16]}"}
    now |= {name: getattr(args, name) for name in names}
    if not path.exists():
        shards.write_atomic(path, json.dumps(now).encode())
        return
    begun = json.loads(path.read_bytes())
    other = [name for name in now if now[name] != begun.get(name)]
    if other:
        raise ConfigError(
            f"{args.out}: was begun with another {' and '.join(other)} "
            f"({', '.join(f'{begun.get(name)} then, {now[name]} now' for name in other)}); name another --out"
        )


def _download(args: argparse.Namespace, python: Path, folder: Path, plan: _urls.Plan, *, first: int) -> None:
    """Run img2dataset until all shards of a pass are there and whole."""
    output = folder / "img2dataset"
    expected = math.ceil(plan.rows / args.shard_size)
    options = {
        "url_list": str((folder / "urls").resolve()), "input_format": "parquet", "url_col": "url",
        "caption_col": "caption", "save_additional_columns": plan.columns or None,
        "output_folder": str(output.resolve()), "output_format": "webdataset",
        "number_sample_per_shard": args.shard_size, "processes_count": min(args.processes, expected),
        "thread_count": args.threads, "timeout": args.timeout, "retries": args.retries, "max_shard_retry": 2,
        "image_size": args.size, "resize_mode": "keep_ratio", "resize_only_if_bigger": True, "skip_reencode": True,
        "encode_format": "jpg", "encode_quality": args.quality, "extract_exif": False,
        "compute_hash": "sha256", "verify_hash": ["sha256", "sha256"] if plan.hashed else None,
        "user_agent_token": args.user_agent, "disallowed_header_directives": [] if args.ignore_opt_out else None,
        "enable_wandb": False,
    }  # fmt: skip
    for _ in range(ATTEMPTS):
        _publish(args, output, first)  # what an interrupted run left ready
        done = sum(1 for _ in output.glob("*_stats.json")) if output.exists() else 0
        if done < expected:
            log = args.out / STATE / "img2dataset.log"
            with _progress.bar(plan.rows, doing="fetch", unit="url") as bar:
                _img2dataset.download(python, options, log=log, expected=expected, progress=bar.update)
        if not _publish(args, output, first):
            return
    raise shards.ShardError(f"{args.out}: shards were damaged {ATTEMPTS} times over; check the disk and run again")


def _publish(args: argparse.Namespace, output: Path, first: int) -> int:
    """Give finished tars their names and indexes; return how many were damaged, which will be fetched again."""
    damaged = 0
    for stats in sorted(output.glob("*_stats.json")):
        name = stats.name.removesuffix("_stats.json")
        raw, path = output / f"{name}.tar", args.out / f"{args.prefix}-{first + int(name):05d}.tar"
        try:
            if raw.exists():
                entries = headers.scan(raw)
                if entries:
                    raw.replace(path)
                else:
                    raw.unlink()
            if path.exists() and not shards.index_path(path).exists():
                shards.write_index(path, headers.scan(path))
        except shards.ShardError as error:
            print(f"{error}; fetching it again", file=sys.stderr)
            damaged += 1
            for broken in (stats, raw, path):
                broken.unlink(missing_ok=True)
    return damaged


def _finish(args: argparse.Namespace, state: Path, plans: list[_urls.Plan]) -> int:
    """Write report and manifest and say what became of the URLs."""
    report = summary(list(_told(state, len(plans))), plans)
    shards.write_atomic(args.out / REPORT, json.dumps(report, indent=1, ensure_ascii=False).encode() + b"\n")
    print(
        f"{args.out}: {report['samples']} samples of {report['urls']} URLs ({report['success_rate']:.1%}), "
        f"{report['urls_per_s']:.0f} URLs/s"
    )
    for reason, number in [*report["left_out"].items(), *list(report["reasons"].items())[:10]]:
        print(f"  {number:>8}  {reason}")
    counts = {
        path.name: (len(shards.read_index(path)), path.stat().st_size, shards.sha256_of(path))
        for path in sorted(args.out.glob(f"{args.prefix}-*.tar"))
    }
    if not counts:
        raise shards.ShardError(f"{args.table}: no URL gave a picture; {args.out / REPORT} says why")
    for number in range(len(plans)):  # the scratch of img2dataset, where there is any
        shutil.rmtree(state / f"pass-{number}" / "img2dataset" / "_tmp", ignore_errors=True)
    meta = {"source": args.table.name, "fetched_with": f"img2dataset {_img2dataset.VERSION}", "size": args.size}
    shards.write_manifest(args.out, counts, meta)
    return 0


def _told(state: Path, passes: int) -> Iterator[dict[str, Any]]:
    for number in range(passes):
        for path in sorted((state / f"pass-{number}" / "img2dataset").glob("*_stats.json")):
            yield json.loads(path.read_bytes())


def summary(told: list[dict[str, Any]], plans: list[_urls.Plan]) -> dict[str, Any]:
    """Return the report: counts, reasons of all passes, and the rate over the time in which anything ran."""
    reasons: Counter[str] = Counter()
    for row in told:
        for reason, number in row["status_dict"].items():
            if reason != "success":
                reasons[reason if reason.startswith("HTTP Error") else re.sub(r"\d+", "N", reason)] += number
    busy, until = 0.0, -math.inf
    for begin, end in sorted((row["start_time"], row["end_time"]) for row in told):
        busy += max(0.0, end - max(begin, until))
        until = max(until, end)
    asked, samples = sum(row["count"] for row in told), sum(row["successes"] for row in told)
    urls = plans[0].rows
    return {
        "urls": urls,
        "samples": samples,
        "success_rate": samples / urls if urls else 0.0,
        "passes": [plan.rows for plan in plans],
        "failed_to_download": sum(row["failed_to_download"] for row in told),
        "failed_to_resize": sum(row["failed_to_resize"] for row in told),
        "reasons": dict(reasons.most_common(50)),
        "left_out": plans[0].left_out,
        "seconds": round(busy, 1),
        "urls_per_s": round(asked / busy, 1) if busy else 0.0,
    }
