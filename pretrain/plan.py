"""What a config will need, before anything is launched: memory a rank, steps, data, time. Builds no weights.

    python pretrain/plan.py CONFIG [section.key=value ...] [--gpus 8 --nodes 4 --gpu H100 --gpu-memory 80] [--json]

A step is rehearsed on tensors without contents (planning/rehearsal.py); DeepSpeed's part is added (planning/memory.py).
"""

import argparse
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from pretrain import command, config, dist
from pretrain import recipe as recipes
from pretrain.config import ConfigError
from pretrain.data.tokenizer import Tokenizer
from pretrain.engine import peak
from pretrain.engine.monitor import clock
from pretrain.models import base as models
from pretrain.planning import cautions, memory, outlook, rehearsal
from pretrain.planning.memory import GIB
from pretrain.recipe import Recipe

EXAMPLE = """example:
  python pretrain/plan.py pretrain/configs/clip_vit_b32.yaml --gpus 8 --gpu H100 --gpu-memory 80"""
LIBRARIES = 0.55 * GIB  # a CPU rank before its first tensor (torch, DeepSpeed, timm), and what its allocator keeps


@dataclass(frozen=True)
class Machines:
    """Where a run is to be: ranks, the nodes they are spread over, and what each device can do."""

    world: int = 1
    nodes: int = 1
    cpu: bool = True
    gpu: str | None = None
    memory: float | None = None  #: GiB of a device
    throughput: float | None = None  #: pairs a second of all ranks together


@dataclass(frozen=True)
class Plan:
    """A config's needs on some machines."""

    machines: Machines
    batch_size: int
    precision: str
    stage: int
    length: int  #: tokens of the longest text
    length_read: bool  #: taken from captions; else the whole context is assumed
    step: rehearsal.Step
    memory: memory.Memory
    resident: int | None  #: bytes of a CPU rank's process, libraries included
    outlook: outlook.Outlook
    pairs_per_s: float | None
    estimated: bool  #: from the device's peak, not from a given throughput
    seconds: float | None
    warnings: list[str]

    def tree(self) -> dict[str, Any]:
        """Return the plan as a tree that JSON can hold; bytes, seconds and counts."""
        tree = asdict(self)
        tree["memory"]["peak"] = self.memory.peak
        return tree

    def text(self) -> str:
        """Return the plan as people read it."""
        return "\n".join(
            [*_parameters(self), *_memory(self), *_length(self), *(f"warning: {w}" for w in self.warnings)]
        )


def resolve(recipe: Recipe, machines: Machines | None = None) -> Plan:
    """Return the plan of a config on some machines; None: this process's ranks and device.

    Raises:
        ConfigError: a model, reader or tokenizer that cannot be built.
    """
    here = machines or Machines(world=dist.world(), cpu=not torch.cuda.is_available())
    words, vocabulary, missing = _words(recipe.model)
    read = outlook.text_length(recipe, words) if words else None
    length = read or recipe.model.lengths[0]
    rows = max(1, recipe.train.batch_size // here.world)
    micro = min(recipe.train.micro_batch_size or rows, rows)
    step = rehearsal.rehearse(recipe, vocabulary, rows=micro, length=length)
    found = outlook.look(recipe, world=here.world)
    parts = -(-rows // micro)
    loss = memory.compared(rows=rows, world=here.world, width=recipe.model.joint_width, parts=parts)
    saves = bool(recipe.checkpoint.every_minutes) or (recipe.checkpoint.every_steps or 10**12) < (found.steps or 0)
    needs = memory.forecast(recipe, step, world=here.world, loss=loss, cpu=here.cpu, batches=parts, saves=saves)
    top = peak.of_name(here.gpu, recipe.train.precision) if here.gpu else None
    if here.cpu and not here.throughput:
        top = peak.measured(recipe.train.precision)
    rate = here.throughput or outlook.rate(step.flops, top, world=here.nodes if here.cpu else here.world, cpu=here.cpu)
    return Plan(
        machines=here,
        batch_size=recipe.train.batch_size,
        precision=recipe.train.precision,
        stage=recipe.zero.stage,
        length=length,
        length_read=read is not None,
        step=step,
        memory=needs,
        resident=int(LIBRARIES + needs.peak) if here.cpu else None,
        outlook=found,
        pairs_per_s=rate,
        estimated=not here.throughput,
        seconds=outlook.seconds(found, batch_size=recipe.train.batch_size, pairs_per_s=rate),
        warnings=missing
        + cautions.cautions(recipe, found, needs, world=here.world, nodes=here.nodes, limit=here.memory),
    )


def _words(section: models.Config) -> tuple[Tokenizer | None, models.Vocabulary, list[str]]:
    """Return the tokenizer, its vocabulary and what to warn of.

    A tokenizer's folder that is not here is no obstacle where the config fixes the number of ids.
    """
    size, name = section.vocabulary_size, section.tokenizer
    if size is None or name == "clip" or Path(name).is_dir():
        words = recipes.build_tokenizer(section)
        return words, recipes.vocabulary(words), []
    warning = f"model.tokenizer: {name} does not exist; planned with the {size} ids that the config fixes"
    return None, models.Vocabulary(size, end=size - 1, pad=0, start=0, mask=0), [warning]


def _row(name: str, value: str, note: str = "") -> str:
    return f"{name:>18} {value:>15}" + (f"  {note}" if note else "")


def _parameters(plan: Plan) -> list[str]:
    step = plan.step
    rows = [_row(name, f"{count:,}") for name, count in step.parts.items()]
    rows.append(_row("parameters", f"{step.trained + step.frozen:,}", f"{step.trained:,} of them trained"))
    rows.append(_row("compute", f"{step.flops / 1e9:,.3g}", "GFLOP a sample, forward and backward"))
    seen = "longest of those read" if plan.length_read else "the whole context: no local shard to read texts of"
    return [*rows, _row("text", f"{plan.length}", f"tokens, {seen}")]


def _memory(plan: Plan) -> list[str]:
    needs, where = plan.memory, plan.machines
    unit = GIB if needs.peak >= GIB else 2**20
    word = "GiB" if unit == GIB else "MiB"
    parts = {
        "parameters": needs.parameters, "ZeRO masters": needs.master, "moments": needs.moments,
        "average": needs.average, "gradients": needs.gradients, "buffers": needs.buffers, "buckets": needs.buckets,
        "gathered weights": needs.gathered, "activations": needs.activations, "loss, gathering": needs.loss,
        "batches": needs.data,
    }  # fmt: skip
    out = [
        f"memory of each of {where.world} ranks, {word} (ZeRO {plan.stage}, {plan.precision}, {plan.step.rows} rows)"
    ]
    out += [_row(name, f"{size / unit:,.2f}") for name, size in parts.items() if size >= 0.005 * unit]
    moments = ", ".join(f"{name} {size / unit:,.2f}" for name, size in needs.moment_peaks.items())
    out.append(_row("tensors at most", f"{needs.peak / unit:,.2f}", f"({moments})"))
    if plan.resident:
        out.append(_row("process", f"{plan.resident / unit:,.2f}", "resident, libraries included"))
    host = {"offloaded": needs.host, "a save's copy": 0 if where.cpu else needs.save, "data workers": needs.workers}
    return out + [_row(name, f"{size / unit:,.2f}", "host memory") for name, size in host.items() if size]


def _length(plan: Plan) -> list[str]:
    found, out = plan.outlook, [f"the run: batches of {plan.batch_size:,}"]
    if found.steps:
        epochs = f"{found.epochs:,.3g} epochs of {found.samples:,} samples" if found.samples else "samples not counted"
        out.append(_row("steps", f"{found.steps:,}", epochs))
    out.append(
        _row("shards", f"{found.shards:,}", f"{found.shards_per_rank:,.3g} a rank, {found.remote} of them remote")
    )
    note = f"in {found.open_shards} shards that batches are drawn from at a time"
    if found.working_set is not None:
        out.append(_row("working set", f"{found.working_set / 1e9:,.3g}", f"GB {note}"))
    else:
        out.append(_row("working set", "unknown", f"{note}: their sizes are seen when a run looks at them"))
    if plan.pairs_per_s and plan.seconds:
        share = outlook.PEAK_SHARE["cpu" if plan.machines.cpu else "cuda"]
        how = f"at {share:.0%} of the device's peak: an estimate" if plan.estimated else "as given"
        out.append(_row("time", clock(plan.seconds), f"at {plan.pairs_per_s:,.4g} pairs/s, {how}"))
    return out


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what says where a run is to be."""
    parser.add_argument("--gpus", type=int, metavar="N", help="GPUs of a node; none: a CPU is planned for")
    parser.add_argument("--nodes", type=int, default=1, metavar="M")
    parser.add_argument("--ranks", type=int, metavar="N", help="processes of a node on a CPU")
    parser.add_argument("--gpu", metavar="NAME", help=f"which, for the time: {', '.join(peak.KNOWN)}")
    parser.add_argument("--gpu-memory", type=float, metavar="GIB", help="warn where a rank needs more")
    parser.add_argument("--throughput", type=float, metavar="PAIRS/S", help="of all ranks together, for the time")
    parser.add_argument("--json", action="store_true", help="print a tree for programs")


def machines(args: argparse.Namespace) -> Machines:
    """Return what the command line says of the machines.

    Raises:
        ConfigError: numbers below one, or a GPU that is not in the table.
    """
    for name in ("gpus", "nodes", "ranks", "gpu_memory", "throughput"):
        value = getattr(args, name)
        if value is not None and value <= 0:
            raise ConfigError(f"--{name.replace('_', '-')} {value}: give a number above 0")
    if args.gpu and peak.of_name(args.gpu, "bf16") is None:
        raise ConfigError(f"--gpu {args.gpu}: not in the table; known: {', '.join(peak.KNOWN)}; or give --throughput")
    cpu = not (args.gpus or args.gpu or args.gpu_memory)
    each = (args.ranks if cpu else args.gpus) or 1
    return Machines(each * args.nodes, args.nodes, cpu, args.gpu, args.gpu_memory, args.throughput)


def show(recipe: Recipe, args: argparse.Namespace) -> int:
    """Print the plan of a config; return the exit code."""
    found = resolve(recipe, machines(args))
    print(json.dumps(found.tree(), indent=1) if args.json else found.text())
    return 0


def main(words: list[str] | None = None) -> int:
    """Print the plan of a config; 2 where the config cannot be used."""
    parser = command.parser(__doc__, EXAMPLE)
    parser.add_argument("config", help="a YAML config")
    parser.add_argument("override", nargs="*", help="section.key=value")
    add_arguments(parser)
    args = parser.parse_intermixed_args(words)
    return command.guarded(lambda: show(config.load(Recipe, args.config, args.override), args))


if __name__ == "__main__":
    raise SystemExit(main())
