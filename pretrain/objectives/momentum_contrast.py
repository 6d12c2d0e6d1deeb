"""ALBEF: pictures against captions as a trailing copy of the towers sees them (Li et al. 2021, arXiv:2107.07651).

    L = 1/2 [ CE(s_i2t, y_i2t) + CE(s_t2i, y_t2i) ],   s = <own feature, key> / tau,   y = (1 - a) hard + a softmax(s_m)

Keys are features that the copy (models/momentum.py) makes of the rows of all ranks, and with `queue` those of earlier
steps: more to tell apart than a batch holds, without a gradient to them. s_m compares the copy's own features with
the keys. The copy moves once a step, before its forward; at the first it takes the weights as they are. ALBEF compares
a rank's rows with its own keys and the queue, here they are compared with the keys of all ranks: the loss does not
depend on how many there are. tau is the model's.

Shapes: B = rows, K = keys, Q = places of the queue, E = joint embedding width.
"""

import torch
from pydantic import Field
from torch import Tensor

from pretrain import dist
from pretrain.losses.momentum import towards_keys
from pretrain.models.momentum import MomentumTowers
from pretrain.models.vlm import VLM, Encodings
from pretrain.objectives import base

EMPTY = -1  #: stands for the caption of a place of the queue without a key; hashes are not negative


class Config(base.Config):
    """`objectives.momentum_contrast`."""

    momentum: float = Field(default=0.995, ge=0, lt=1)  #: what a step leaves of the copy
    alpha: float = Field(default=0.4, ge=0, le=1)  #: share of the targets that the copy sets
    ramp: int = Field(default=1000, ge=0)  #: steps in which alpha grows from 0; ALBEF: those of the first epoch
    queue: int = Field(default=0, ge=0)  #: keys of earlier steps that are kept for each side; ALBEF: 65536
    equal_captions: bool = True  #: keys with the same caption are positives of each other, not false negatives


class Objective(base.Contrast):
    """Two softmax losses against keys, the targets of which are partly soft."""

    needs = ("image", "text")
    config: Config
    copy: MomentumTowers

    def attach(self, model: VLM) -> None:
        """Take the form of the towers, and room for the queue."""
        self.copy = MomentumTowers(model)
        self.alpha = 0.0
        if self.config.queue:
            for side in ("image", "text"):
                self.register_buffer(f"{side}_QE", torch.zeros(self.config.queue, model.config.joint_width))
            self.register_buffer("caption_Q", torch.full((self.config.queue,), EMPTY, dtype=torch.long))

    def begin(self, model: VLM, step: int) -> None:
        """Move the copy, and set what the step takes of its targets."""
        self.copy.follow(model, self.config.momentum if step else 0.0)
        self.alpha = self.config.alpha * min(1.0, step / self.config.ramp if self.config.ramp else 1.0)

    def features(self, encodings: Encodings) -> dict[str, Tensor]:
        """Return both sides and, where the batch has them, hashes of captions."""
        return encodings.sides

    def keys(self, encodings: Encodings) -> dict[str, Tensor]:
        """Return both sides as the copy sees them."""
        image, text = self.copy.sides(encodings)
        return {"image key": image, "text key": text}

    def loss_from_features(self, model: VLM, features: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss, the temperature and the share of soft targets; put the step's keys into the queue."""
        own = {side: features[f"{side} key"].detach().float() for side in ("image", "text")}
        caption_B = features.get("caption")
        if caption_B is None:
            caption_B = torch.zeros(len(own["text"]), dtype=torch.long, device=own["text"].device)
        fresh = {"image": dist.gather(own["image"]), "text": dist.gather(own["text"])}
        caption_K = dist.gather(caption_B)
        keys, absent_K = fresh, None
        if self.config.queue:
            keys = {side: torch.cat([key, getattr(self, f"{side}_QE")]) for side, key in fresh.items()}
            caption_K = torch.cat([caption_K, self.caption_Q])
            absent_K = caption_K == EMPTY
        hard = self.config.equal_captions and "caption" in features
        losses = [
            towards_keys(
                features[side],
                own[side],
                keys[other],
                scale=model.scale,
                alpha=self.alpha,
                same_K=caption_K if hard else None,
                absent_K=absent_K,
            )
            for side, other in (("image", "text"), ("text", "image"))
        ]
        if self.config.queue and self.training:
            self._enqueue({**{f"{side}_QE": key for side, key in keys.items()}, "caption_Q": caption_K})
        return torch.stack(losses).mean(), {
            "scale": base.scalar(model.scale),
            "alpha": losses[0].new_full((), self.alpha),
        }

    @torch.no_grad()
    def _enqueue(self, newest_first: dict[str, Tensor]) -> None:
        """Keep the newest, in the order of steps; within a step in that of the rows, however many ranks hold them."""
        for name, values in newest_first.items():
            self.get_buffer(name).copy_(values[: self.config.queue])
