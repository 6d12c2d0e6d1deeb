"""What a config asks for that will disappoint: sentences with the key, the reason and what to write instead."""

from pretrain.engine import optim
from pretrain.planning.memory import GIB, Memory
from pretrain.planning.outlook import Outlook
from pretrain.recipe import Recipe


def cautions(
    recipe: Recipe, outlook: Outlook, memory: Memory, *, world: int, nodes: int, limit: float | None
) -> list[str]:
    """Return warnings; `limit` is the memory of a device in GiB.

    A run that cannot start at all (a batch that ranks cannot share) is in them too: a plan shows all problems at once.
    """
    batch, data = recipe.train.batch_size, recipe.data
    out = []
    if outlook.missing:
        out.append(f"data.shards: {outlook.missing} of {outlook.shards} shards do not exist; check the pattern")
    if outlook.steps:
        out += optim.warnings(
            recipe.optim, steps=outlook.steps, batch_size=batch, from_scratch=recipe.model.from_scratch
        )
        if recipe.checkpoint.every_steps is None and recipe.checkpoint.every_minutes is None:
            out.append("checkpoint: nothing is saved before the end; set checkpoint.every_steps or every_minutes")
    if batch % world:
        low = max(1, batch // world) * world
        out.append(f"train.batch_size: {batch} rows cannot be shared by {world} ranks; use {low} or {low + world}")
    if outlook.samples is not None and batch > outlook.samples:
        out.append(f"train.batch_size: {batch} rows, but an epoch has {outlook.samples}; rows repeat within a batch")
    if data.order == "stream" and outlook.shards < world * max(1, data.workers):
        out.append(
            f"data.shards: {outlook.shards} shards for {world} ranks of {max(1, data.workers)} workers; with "
            "data.order=stream some have nothing to read: build smaller shards or lower data.workers"
        )
    if outlook.remote and outlook.working_set and outlook.working_set / nodes > data.cache_gb * 1e9:
        out.append(
            f"data.cache_gb: batches are drawn from {outlook.open_shards} shards at a time, "
            f"{outlook.working_set / nodes / 1e9:.3g} GB a node, over {data.cache_gb:g}; raise it or lower data.lanes"
        )
    if limit is not None and memory.peak > 0.92 * limit * GIB:
        out.append(
            f"memory: {memory.peak / GIB:.1f} GiB a rank do not fit {limit:g} GiB with 8 % to spare; {relief(recipe)}"
        )
    return out


def relief(recipe: Recipe) -> str:
    """Return what lowers memory from here, the cheapest first."""
    ways = []
    if recipe.train.precision == "fp32":
        ways.append("train.precision=bf16")
    if recipe.zero.stage < 3:
        ways.append(f"zero.stage={recipe.zero.stage + 1}")
    ways += recipe.model.recomputable
    if recipe.train.micro_batch_size is None:
        ways.append("train.micro_batch_size")
    if recipe.zero.offload == "none":
        ways.append("zero.offload=optimizer")
    ways.append("a smaller train.batch_size or more ranks")
    return "try " + ", ".join(ways)
