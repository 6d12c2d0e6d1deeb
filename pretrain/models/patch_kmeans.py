"""An image tokenizer without a net: 8 x 8 patches and their nearest of K centres, fitted by mini-batch k-means.

Sculley 2010 (Web-scale k-means clustering); centres start as differing patches of the first batch that has enough of
them, and one that nothing is near to is put on the patch that is worst served. Minutes on a CPU; a decoded picture is
made of centres, so that encoding it again gives the same codes.

Shapes: N = images, P = patches of an image, M = patches of a batch, K = codes, F = numbers of a patch (192).
"""

from collections.abc import Iterable

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from pretrain.config import ConfigError
from pretrain.dist import hash64
from pretrain.models import image_codes

NUMBERS = 3 * image_codes.PIXELS**2
CHUNK = 1 << 14  #: patches that are compared with all centres at a time


class Config(image_codes.Config):
    """Options of the fit."""

    revive: float = Field(default=0.1, ge=0, lt=1)  #: a centre with less than this share of the mean count is moved


class Tokenizer(image_codes.ImageTokenizer):
    """Centres and how many patches each has seen."""

    kind = "patch_kmeans"

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.register_buffer("centre_KF", torch.zeros(config.codes, NUMBERS))
        self.register_buffer("count_K", torch.zeros(config.codes, dtype=torch.float64))

    def encode(self, image_NCHW: Tensor) -> Tensor:
        """Return the number of the nearest centre of each patch; of equally near ones the first."""
        patch_MF = patches(image_NCHW).flatten(0, 1)
        return self._nearest(patch_MF)[0].view(len(image_NCHW), -1)

    def decode(self, codes_NP: Tensor) -> Tensor:
        """Return pictures put together of centres."""
        side = image_codes.side_of(codes_NP)
        size = side * image_codes.PIXELS
        return F.fold(self.centre_KF[codes_NP].transpose(1, 2), size, image_codes.PIXELS, stride=image_codes.PIXELS)

    def _nearest(self, patch_MF: Tensor) -> tuple[Tensor, Tensor]:
        """Return each patch's nearest centre and its squared distance, in float64: a centre is nearest to itself."""
        centre_KF = self.centre_KF.double()
        norm_K = centre_KF.square().sum(1)
        found = []
        for part_MF in patch_MF.split(CHUNK):
            part_MF = part_MF.double()
            distance_MK = norm_K - 2 * part_MF @ centre_KF.T + part_MF.square().sum(1, keepdim=True)
            found.append(distance_MK.min(1))
        return torch.cat([f.indices for f in found]), torch.cat([f.values for f in found])

    @torch.no_grad()
    def fit(self, batches: Iterable[Tensor]) -> dict[str, float]:
        """Move centres towards the means of their patches; return the mean squared error of the last batch's pixels.

        Raises:
            ConfigError: the pictures have fewer differing patches than there are codes.
        """
        error, started, seen_MF = float("nan"), False, torch.zeros(0, NUMBERS)
        for number, image_NCHW in enumerate(batches):
            patch_MF = patches(image_NCHW).flatten(0, 1)
            if not started:
                seen_MF = torch.cat([seen_MF.to(patch_MF), patch_MF]).unique(dim=0)
                if len(seen_MF) < self.config.codes:
                    continue
                self.centre_KF.copy_(seen_MF[self._order(len(seen_MF), 0)[: self.config.codes]])
                started = True
            error = self._step(patch_MF, number)
        if not started:
            raise ConfigError(
                f"codes: {self.config.codes}, the pictures have {len(seen_MF)} differing patches; ask for fewer codes "
                "or give more pictures"
            )
        return {"squared error": error}

    def _step(self, patch_MF: Tensor, number: int) -> float:
        index_M, distance_M = self._nearest(patch_MF)
        new_K = torch.bincount(index_M, minlength=self.config.codes).to(self.count_K)
        sum_KF = torch.zeros_like(self.centre_KF, dtype=torch.float64).index_add_(0, index_M, patch_MF.double())
        self.count_K += new_K
        moved_K = new_K > 0
        mean_KF = sum_KF[moved_K] / new_K[moved_K, None]
        share_K1 = (new_K / self.count_K.clamp(min=1))[moved_K, None]
        self.centre_KF[moved_K] = self.centre_KF[moved_K].double().lerp(mean_KF, share_K1).to(self.centre_KF)
        self._revive(patch_MF, distance_M, number)
        return float(distance_M.clamp(min=0).mean()) / NUMBERS

    def _revive(self, patch_MF: Tensor, distance_M: Tensor, number: int) -> None:
        """Put centres that are hardly used on the patches that are farthest from theirs."""
        poor_K = (self.count_K < self.config.revive * self.count_K.mean()).nonzero().flatten()
        worst_MF = patch_MF[distance_M.argsort(descending=True, stable=True)]
        worst_MF = worst_MF[: 4 * len(poor_K)].unique(dim=0)
        worst_MF = worst_MF[self._order(len(worst_MF), number + 1)][: len(poor_K)]
        taken_K = poor_K[: len(worst_MF)]
        self.centre_KF[taken_K] = worst_MF.to(self.centre_KF)
        self.count_K[taken_K] = self.count_K.mean()

    def _order(self, size: int, number: int) -> Tensor:
        """Return a permutation that is a function of the seed and a number."""
        draw = torch.Generator().manual_seed(hash64(self.config.seed, "patch_kmeans", number))
        return torch.randperm(size, generator=draw).to(self.centre_KF.device)


def patches(image_NCHW: Tensor) -> Tensor:
    """Return the patches [N, P, F] of pictures, in raster order."""
    return F.unfold(image_NCHW, image_codes.PIXELS, stride=image_codes.PIXELS).transpose(1, 2)
