"""Bytes that one rank holds at the dearest moment of a run, by what they are for.

P = bytes of trained fp32 parameters, W = ranks. Parameters, gradients and moments are fp32 at every stage and precision
(engine/precision.py). What DeepSpeed 0.19.8 holds was read off torch's allocator on 1 and 2 ranks (CPU):

| stage | always                                | backward adds                | the optimizer's step adds      |
|-------|---------------------------------------|------------------------------|--------------------------------|
| 0     | P + moments                           | gradients P                  | gradients P                    |
| 1, 2  | P + (master + moments) / W            | gradients P + a bucket       | gradients P / W, twice         |
| 3     | (P + master + moments + gradients) / W + a bucket | gathered weights P + gradients P | gradients P / W    |

AdamW is torch's fused one, which adds nothing; SGD adds a temporary of the largest tensor that it steps (a whole
group's partition at stages 1 to 3). A save copies weights and moments to host memory, each rank its own part. Buffers
are held twice, as they are and as they were before the step (engine/rollback.py), and saved by rank 0.
"""

from dataclasses import dataclass

from pretrain.data.loader import PREFETCH
from pretrain.engine.deepspeed_config import BUCKET
from pretrain.engine.optim import MOMENTS
from pretrain.planning.rehearsal import Step
from pretrain.recipe import Recipe

GIB = 2**30
FLOAT = 4


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank. The moments of a step differ in what is alive, so the parts do not all add up to `peak`."""

    parameters: int
    master: int  #: ZeRO's own copy of what it steps
    moments: int
    average: int  #: the moving average of the weights
    gradients: int
    buffers: int  #: a trailing copy of towers, statistics of batch norms, tables
    buckets: int  #: through which gradients travel
    gathered: int  #: ZeRO-3's whole weights while they are used
    activations: int  #: what backward needs of forward
    loss: int  #: features of other ranks and tiles of logits
    data: int  #: batches in the hands of this rank
    moment_peaks: dict[str, int]  #: backward, step, save -> bytes on the device then
    host: int  #: host memory of what zero.offload takes off the device
    save: int  #: host memory that a save takes
    workers: int  #: host memory of batches that loader processes have ready

    @property
    def peak(self) -> int:
        """Return the bytes of tensors at the dearest moment."""
        return max(self.moment_peaks.values())


def forecast(
    recipe: Recipe, step: Step, *, world: int, loss: int, cpu: bool, batches: int = 1, saves: bool = False
) -> Memory:
    """Return what a rank of `world` holds; on a CPU a save's copies are taken from the same memory.

    `batches` are the micro-batches of a step; `saves`: training goes on after a save, whose copy an asynchronous one
    keeps for the next.
    """
    stage = recipe.zero.stage
    whole, frozen = FLOAT * step.trained, FLOAT * step.frozen
    part = -(-whole // world) if stage else whole
    moments = len(MOMENTS[recipe.optim.optimizer]) * part
    bucket = FLOAT * bucket_elements(recipe, step.trained) if stage else 0  # stage 0 sends in place: reduction.py
    weights = -(-(whole + frozen) // world) if stage == 3 else whole + frozen
    master = part if stage else 0
    average = part if recipe.ema.decay else 0
    buffers = 2 * step.buffers
    away = 0 if cpu or recipe.zero.offload == "none" else master + moments
    away += weights if recipe.zero.offload == "all" and not cpu else 0
    steady = weights + master + moments + average - away + buffers + step.batch * 2 * batches
    if stage == 3:
        steady += part + bucket
    plain = cpu and recipe.optim.optimizer == "sgd"
    temporary = (FLOAT * step.group // world if stage else FLOAT * step.largest) if plain else 0
    gathered = whole + frozen if stage == 3 else 0
    backward = steady + gathered + loss + step.peak + (bucket if stage in (1, 2) else 0)
    flat = FLOAT * step.group // world if stage else 0
    update = steady + (part if stage in (1, 2) else whole if not stage else 0) + flat + temporary
    copies = 1 + len(MOMENTS[recipe.optim.optimizer]) + bool(recipe.ema.decay)
    save = (copies * whole + frozen * bool(recipe.checkpoint.frozen)) // world + step.buffers
    peaks = {"backward": backward, "optimizer step": update}
    if cpu:
        peaks["save"] = steady + save
        if saves and recipe.checkpoint.asynchronous:
            peaks = {name: size + save * (name != "save") for name, size in peaks.items()}
    return Memory(
        parameters=weights,
        master=master,
        moments=moments,
        average=average,
        gradients=whole,
        buffers=buffers,
        buckets=bucket,
        gathered=gathered,
        activations=step.kept,
        loss=loss,
        data=2 * step.batch * batches,
        moment_peaks=peaks,
        host=away,
        save=save,
        workers=worker_bytes(recipe, step) * batches,
    )


def compared(*, rows: int, world: int, width: int, parts: int) -> int:
    """Return the bytes by which comparing features of `width` numbers exceeds a rehearsal, which is one rank's step.

    The texts of the other ranks are gathered and get a gradient, and of the column of each of their rows the logsumexp
    is put together (losses/contrastive.py); a tile of logits is as large as ever. Where a rank's `rows` go through the
    model in several `parts`, both features of all its rows lie there, with their gradients and the loss's own.
    """
    features = 2 * width * rows
    gathered = (world - 1) * (features + 4 * rows)
    return FLOAT * (gathered + (3 * features if parts > 1 else 0))


def bucket_elements(recipe: Recipe, trained: int) -> int:
    """Return the elements of the buffer through which gradients travel at stages 1 to 3."""
    given = (recipe.zero.extra.get("zero_optimization") or {}).get("reduce_bucket_size")
    return int(float(given)) if given else min(BUCKET, trained)


def worker_bytes(recipe: Recipe, step: Step) -> int:
    """Return the bytes of batches that the loader's processes of one rank have ready, in shared memory."""
    return recipe.data.workers * PREFETCH * step.batch
