"""Write a trained model as a folder that another library loads, and keep it only if that library agrees with us.

python pretrain/export.py MODEL OUT --format hf|dual_encoder|open_clip|diptych [--step N] [--pairs SHARDS]
"""

import argparse
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from safetensors import SafetensorError

from pretrain import config, pretrained, registry, verification
from pretrain.config import ConfigError
from pretrain.data.format import ShardError
from pretrain.engine.checkpoint import CheckpointError
from pretrain.exports import base
from pretrain.pretrained import Pretrained
from pretrain.verification import ExportError, Pairs

MARK = "diptych_export.json"  #: says that a folder is an export of ours, which a new one may replace
PACKAGE = "pretrain.exports"


def export(model: Pretrained, out: str | Path, *, format: str, pairs: Pairs | None = None) -> dict[str, float]:
    """Write `model` to the folder `out`, verified; return the largest differences that were found.

    Raises:
        ConfigError: the format cannot hold the model, or `out` holds something else.
        ExportError: the library of the format reads it differently; nothing is kept.
    """
    out = Path(out).absolute()
    if out.exists() and not (out / MARK).is_file():
        raise ConfigError(f"{out} exists and is no export of ours; choose another folder or remove it")
    plug: base.Format = registry.find(PACKAGE, format).Format()
    if model.config.file not in plug.holds:
        raise ConfigError(
            f"export to {format}: it holds two towers, {model.source} is a {model.config.file}; "
            "--format diptych holds every model"
        )
    part = out.with_name(f".{out.name}.{os.urandom(4).hex()}.part") / out.name  # same name: the card's snippet shows it
    try:
        part.mkdir(parents=True)
        plug.write(model, part)
        try:
            found = verification.verify(model, plug.read(part), pairs or verification.drawn())
        except (ConfigError, ExportError):
            raise
        except Exception as error:  # whatever the library raises on a folder that it cannot load
            raise ExportError(f"{format} cannot load it ({type(error).__name__}: {error})") from error
        plug.settle(part, out)
        (part / "README.md").write_text(_card(model, plug, out.name, found), encoding="utf-8")
        mark = {"format": format, "weights_hash": model.weights_hash, "source": model.source, "verified": found}
        (part / MARK).write_text(json.dumps(mark, indent=1) + "\n", encoding="utf-8")
        for file in part.rglob("*.safetensors"):
            shutil.copymode(part / MARK, file)  # safetensors lets only its owner read; others may use the export too
        _publish(part, out)
    finally:
        shutil.rmtree(part.parent, ignore_errors=True)
    return found


def _publish(part: Path, out: Path) -> None:
    """Give a finished folder its name; an earlier one leaves only when the new one is complete."""
    old = part.with_name("earlier")
    if out.exists():
        os.rename(out, old)
    try:
        os.rename(part, out)
    except OSError:
        if old.exists():
            os.rename(old, out)
        raise


def _card(model: Pretrained, plug: base.Format, name: str, found: dict[str, float]) -> str:
    about = _writes(model, plug, found) if "logits" in found else _compares(model, plug, found)
    tags = "\n".join(f"- {tag}" for tag in about.tags)
    count = sum(p.numel() for p in model.model.parameters())
    rows = {**about.rows, "parameters": f"{count:,}", "weights hash": model.weights_hash}
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    return f"""---
tags:
{tags}
pipeline_tag: {about.task}
---
# {name}

{about.does}, trained with diptych. {(plug.__doc__ or "").splitlines()[0]}

| | |
|---|---|
{table}

Run beside the folder:

```python
{about.snippet.format(folder=name)}```

Before this folder was kept it was loaded with that code's library: {about.checked}. Feed it what
training saw: captions with mojibake repaired and HTML entities resolved (ftfy.fix_text, html.unescape), pictures with
transparency put over white.
"""


class About(NamedTuple):
    """What a model card says of the model."""

    does: str
    task: str  #: as the hubs call it
    tags: tuple[str, ...]
    rows: dict[str, str]
    snippet: str
    checked: str


def _compares(model: Pretrained, plug: base.Format, found: dict[str, float]) -> About:
    section, apart = model.config, max(found["image_features"], found["text_features"])
    words = f"{section.text.name}, {section.text.layers} layers, at most {section.text.context_length} tokens"
    return About(
        does="A model that compares pictures and texts",
        task="zero-shot-image-classification",
        tags=plug.tags,
        rows={
            "vision tower": f"{section.vision.name} {section.vision.args or ''}, {section.vision.image_size} pixels",
            "text tower": words,
            "joint width": str(section.embed_dim),
        },
        snippet=plug.snippet,
        checked=f"unit-norm features differed by at most\n{apart:.1e}; features of pictures prepared by its own "
        f"processor had a\ncosine of at least {found['cosine']:.6f}; the ids of {found['captions']:.0f} captions were "
        "equal",
    )


def _writes(model: Pretrained, plug: base.Format, found: dict[str, float]) -> About:
    given, written = model.config.lengths
    return About(
        does="A model that reads a picture and a text, and writes",
        task="image-text-to-text",
        tags=plug.writing_tags,
        rows={
            "model": model.config.file,
            "text": f"reads at most {given} tokens, writes {written}; {model.tokenizer.vocab_size:,} ids",
        },
        snippet=plug.writing_snippet,
        checked=f"of {found['captions']:.0f} pictures and texts\nas its own code prepares them, logits differed by at "
        f"most {found['logits']:.1e} of the largest",
    )


def main(words: list[str] | None = None) -> int:
    """Export by command line: 0 when the folder is there and verified, 1 when it was not kept, 2 for bad usage."""
    parser = argparse.ArgumentParser(
        prog="python pretrain/export.py",
        description="Write a trained model as a folder that another library loads; verified before it is kept.",
        epilog="example: python pretrain/export.py runs/clip_iconcaps runs/clip_iconcaps/export/open_clip "
        "--format open_clip",
    )
    parser.add_argument("model", help="run folder, checkpoint, or export")
    parser.add_argument("out", help="folder to make; an earlier export there is replaced")
    parser.add_argument("--format", required=True, choices=registry.names(PACKAGE))
    parser.add_argument("--step", type=int, help="of a run: this checkpoint instead of the newest")
    parser.add_argument(
        "--pairs", metavar="SHARDS", help="compare on the first 32 pairs of these tars, not on drawings"
    )
    parser.add_argument("--no-ema", action="store_true", help="the last weights of a run, though it kept an average")
    args = parser.parse_args(words)
    return report(lambda: pretrained.load(args.model, step=args.step, average=not args.no_ema), args)


def report(load: Callable[[], Pretrained], args: argparse.Namespace) -> int:
    """Export what `load` gives as `args` say (out, format, pairs); print how far it is from the model, return 0."""
    try:
        pairs = verification.real(args.pairs) if args.pairs else None
        found = export(load(), args.out, format=args.format, pairs=pairs)
    except (ConfigError, ShardError, ValueError) as error:
        config.exit_with(error)
    except (ExportError, CheckpointError, OSError, SafetensorError) as error:
        config.exit_with(RuntimeError(f"export {args.out}: {error}; nothing was kept"), code=1)
    figures = ", ".join(f"{name} {value:.3g}" for name, value in found.items())
    print(f"{args.out}: {args.format}, verified ({figures})")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
