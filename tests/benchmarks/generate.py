"""Writing with a cache beside writing without and beside transformers' generate: tokens a second, and the same texts.

python -m tests.benchmarks.generate [--width 512] [--layers 6] [--rows 16] [--tokens 32] [--laps 3] [--out FILE.md]

VL-T5 without pictures is T5, so both libraries have the same random weights and must write the same tokens. Each text
has exactly `--tokens` tokens. Seconds are of the processor (one thread), laps take turns, the encoder's time included.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import T5Config, T5ForConditionalGeneration

from pretrain.batch import Batch
from pretrain.models import base, vlt5
from pretrain.models.generate import generate
from pretrain.models.writing import Options
from tests.benchmarks.race import machine

VOCABULARY, LENGTH = 32200, 20
BEAMS = (1, 5)


def both(width: int, layers: int) -> tuple[vlt5.VLT5, T5ForConditionalGeneration]:
    """Return our model and transformers', with the same weights."""
    torch.manual_seed(0)
    sizes = {"d_model": width, "d_kv": 64, "d_ff": 4 * width, "num_layers": layers, "num_heads": width // 64}
    theirs = T5ForConditionalGeneration(
        T5Config(vocab_size=VOCABULARY, decoder_start_token_id=0, pad_token_id=0, eos_token_id=1, **sizes)
    ).eval()
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        text = {"backbone": "t5", "width": width, "layers": layers, "heads": width // 64, "hidden": 4 * width,
                "vocab_size": VOCABULARY, "dropout": 0.0, "target_length": 512, "weights": f"hf:{folder}"}  # fmt: skip
        section = vlt5.Config.model_validate({"text": text})
        ours = vlt5.VLT5.build(section, base.Vocabulary(VOCABULARY, end=1, pad=0)).eval()
    return ours, theirs


def ways(width: int, layers: int, rows: int, tokens: int, beams: int) -> dict[str, Callable[[], list[list[int]]]]:
    """Return each way of writing; all return the best text of each row."""
    ours, theirs = both(width, layers)
    draw = torch.Generator().manual_seed(1)
    tokens_BT = torch.randint(2, VOCABULARY - 200, (rows, LENGTH), generator=draw)
    valid_BT = torch.ones_like(tokens_BT, dtype=torch.bool)
    batch = Batch(keys=[str(n) for n in range(rows)], tokens_BT=tokens_BT, valid_BT=valid_BT)
    options = Options(beams=beams, max_tokens=tokens, min_tokens=tokens)

    def write(*, cached: bool) -> list[list[int]]:
        return [kept[0].tokens for kept in generate(ours, batch, options, cached=cached)]

    def transformers() -> list[list[int]]:
        how = {"num_beams": beams, "do_sample": False, "max_new_tokens": tokens, "min_new_tokens": tokens}
        out = theirs.generate(input_ids=tokens_BT, attention_mask=valid_BT.long(), **how)
        return [row[1:] for row in out.tolist()]

    return {
        "ours": lambda: write(cached=True),
        "ours, without a cache": lambda: write(cached=False),
        "transformers": transformers,
    }


def main() -> None:
    """Print the report, or write it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--laps", type=int, default=3)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    lines = ["| beams | | tokens/s, best lap | of transformers' | same texts |", "|---|---|---|---|---|"]
    for beams in BEAMS:
        made = ways(args.width, args.layers, args.rows, args.tokens, beams)
        seconds: dict[str, list[float]] = {name: [] for name in made}
        texts = {}
        for lap in range(args.laps + 1):
            for name, way in made.items():
                begin = time.process_time()
                texts[name] = way()
                if lap:  # the first is for lazy loading
                    seconds[name].append(time.process_time() - begin)
        rate = {name: args.rows * args.tokens / min(laps) for name, laps in seconds.items()}
        for name in made:
            same = sum(a == b for a, b in zip(texts[name], texts["transformers"]))
            of = rate[name] / rate["transformers"]
            lines.append(f"| {beams} | {name} | {rate[name]:,.0f} | {of:.2f} | {same} of {args.rows} |")
    command = " ".join(f"--{key} {getattr(args, key)}" for key in ("width", "layers", "rows", "tokens", "laps"))
    head = ["# Writing", "", f"`python -m tests.benchmarks.generate {command}`", "", machine(), ""]
    size = f"{args.layers} + {args.layers} layers, width {args.width}, vocabulary {VOCABULARY:,}"
    about = f"T5 of {size}; fp32, one thread, seconds of the processor."
    text = "\n".join([*head, about, "", *lines]) + "\n"
    print(text)
    if args.out:
        args.out.write_text(text)


if __name__ == "__main__":
    main()
