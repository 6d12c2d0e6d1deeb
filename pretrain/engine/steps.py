"""The `train:` section: how many steps a run has, of how many rows, in which precision."""

import math

from pydantic import Field, model_validator

from pretrain import dist
from pretrain.config import ConfigError, Section
from pretrain.engine.precision import Precision


class Config(Section):
    """The `train:` section."""

    steps: int | None = Field(None, ge=1)
    samples: int | None = Field(None, ge=1)
    epochs: float | None = Field(None, gt=0)
    batch_size: int = Field(256, ge=1)  #: of all ranks together
    #: rows of one rank that go through the model at once, to save memory: the step stays that of batch_size; null: all
    micro_batch_size: int | None = Field(None, ge=1)
    precision: Precision = "fp32"
    compile: bool = False  #: torch.compile of every block of the towers; the first step takes a minute or more

    @model_validator(mode="after")
    def _one_length(self) -> "Config":
        given = [n for n in ("steps", "samples", "epochs") if getattr(self, n) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of steps, samples, epochs (got {', '.join(given) or 'none'})")
        return self

    def total_steps(self, samples_per_epoch: int) -> int:
        """Return the length of the run in steps of the global batch, rounded up.

        Raises:
            ConfigError: no sample to train on.
        """
        if self.steps is not None:
            return self.steps
        if self.samples is None and samples_per_epoch < 1:
            raise ConfigError("train: the data has no samples; check data.shards")
        samples = self.samples if self.samples is not None else float(self.epochs or 0) * samples_per_epoch
        return max(1, math.ceil(samples / self.batch_size))

    def rows_per_rank(self) -> int:
        """Return the batch size of one rank.

        Raises:
            ConfigError: the ranks do not divide the batch.
        """
        rows, rest = divmod(self.batch_size, dist.world())
        if rest or not rows:
            near = dist.world() * max(1, rows)
            raise ConfigError(
                f"train.batch_size: {self.batch_size} is not divisible by {dist.world()} ranks; try {near}"
            )
        micro = self.micro_batch_size
        if micro is not None and rows % micro:
            near = max(n for n in range(1, min(micro, rows) + 1) if rows % n == 0)
            raise ConfigError(
                f"train.micro_batch_size: {micro} does not divide the {rows} rows of a rank "
                f"(batch_size {self.batch_size} over {dist.world()} ranks); try {near}"
            )
        return rows
