"""A small VQ-VAE as image tokenizer: three strided convolutions, a codebook that follows by moving averages.

van den Oord et al. 2017 (arXiv:1711.00937): loss = squared error of the picture + 0.25 |z - sg(e)|^2, gradients pass
the codebook straight through. The codebook follows its vectors by exponential moving averages (the paper's appendix
A.1); a code that is hardly used is put on a vector of the batch (Dhariwal et al. 2020, arXiv:2005.00341). Neither
perceptual nor adversarial losses: it is for training from scratch and for tests, not for photographs' last detail.

Shapes: N = images, C H W = channels, height, width, M = vectors of a batch, K = codes, D = width of the codebook.
"""

from collections.abc import Iterable

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from pretrain import dist
from pretrain.models import image_codes

COMMITMENT = 0.25


class Config(image_codes.Config):
    """Sizes and the fit."""

    width: int = Field(default=64, gt=0)  #: channels of the convolutions
    code_width: int = Field(default=32, gt=0)  #: numbers of a code's vector
    lr: float = Field(default=1e-3, gt=0)
    decay: float = Field(default=0.99, gt=0, lt=1)  #: of the moving averages
    revive: float = Field(default=0.1, ge=0)  #: a code with less than this share of the mean count is moved


class Residual(nn.Module):
    """Two convolutions beside a shortcut."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.ReLU(), nn.Conv2d(width, width, 3, 1, 1), nn.ReLU(), nn.Conv2d(width, width, 1))

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Return [N, C, H, W]."""
        return x_NCHW + self.body(x_NCHW)


class Tokenizer(image_codes.ImageTokenizer):
    """Encoder, codebook, decoder."""

    kind = "vqvae"

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        width, inner = config.width, config.code_width
        down = [nn.Conv2d(inputs, width, 4, 2, 1) for inputs in (3, width, width)]
        up = [nn.ConvTranspose2d(width, outputs, 4, 2, 1) for outputs in (width, width, 3)]
        self.encoder = nn.Sequential(
            down[0], nn.ReLU(), down[1], nn.ReLU(), down[2], Residual(width), nn.ReLU(), nn.Conv2d(width, inner, 1)
        )
        self.decoder = nn.Sequential(
            nn.Conv2d(inner, width, 3, 1, 1), Residual(width), nn.ReLU(), up[0], nn.ReLU(), up[1], nn.ReLU(), up[2]
        )
        self.register_buffer("code_KD", torch.zeros(config.codes, inner))
        self.register_buffer("count_K", torch.zeros(config.codes))
        self.register_buffer("sum_KD", torch.zeros(config.codes, inner))

    def encode(self, image_NCHW: Tensor) -> Tensor:
        """Return the number of the nearest vector at each place."""
        return self._nearest(self._vectors(self.encoder(image_NCHW))).view(len(image_NCHW), -1)

    def decode(self, codes_NP: Tensor) -> Tensor:
        """Return pictures in [-1, 1]."""
        side = image_codes.side_of(codes_NP)
        vector_NDHW = self.code_KD[codes_NP].transpose(1, 2).unflatten(2, (side, side))
        return self.decoder(vector_NDHW).clamp(-1, 1)

    def _vectors(self, z_NDHW: Tensor) -> Tensor:
        return z_NDHW.permute(0, 2, 3, 1).flatten(0, 2)

    def _nearest(self, z_MD: Tensor) -> Tensor:
        code_KD = self.code_KD.double()
        return (code_KD.square().sum(1) - 2 * z_MD.double() @ code_KD.T).argmin(1)

    def fit(self, batches: Iterable[Tensor]) -> dict[str, float]:
        """Train on batches from freshly drawn weights; return the squared error of the last batch's pixels."""
        dist.seed_step(self.config.seed, "vqvae")
        self.apply(lambda part: part.reset_parameters() if hasattr(part, "reset_parameters") else None)
        self.train()
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.config.lr, weight_decay=0.0)
        error = float("nan")
        for number, image_NCHW in enumerate(batches):
            z_NDHW = self.encoder(image_NCHW)
            z_MD = self._vectors(z_NDHW)
            with torch.no_grad():
                self._follow(z_MD, number)
                quantised_MD = self.code_KD[self._nearest(z_MD)]
            straight_MD = z_MD + (quantised_MD - z_MD).detach()
            shape = (len(z_NDHW), *z_NDHW.shape[2:], -1)
            picture_NCHW = self.decoder(straight_MD.view(shape).permute(0, 3, 1, 2))
            found = F.mse_loss(picture_NCHW, image_NCHW)
            loss = found + COMMITMENT * F.mse_loss(z_MD, quantised_MD)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            error = float(found.detach())
        self.eval()
        return {"squared error": error, "codes in use": float((self.count_K > 1e-3).sum())}

    def _follow(self, z_MD: Tensor, number: int) -> None:
        """Move each code towards the mean of its vectors; put those that are hardly used on vectors of the batch."""
        draw = torch.Generator().manual_seed(dist.hash64(self.config.seed, "vqvae codes", number))
        order_M = torch.randperm(len(z_MD), generator=draw).to(z_MD.device)
        if not number:
            self.code_KD.copy_(z_MD[order_M[torch.arange(self.codebook_size) % len(z_MD)]])
            self.count_K.fill_(len(z_MD) / self.codebook_size)
            self.sum_KD.copy_(self.code_KD * self.count_K[:, None])
        index_M = self._nearest(z_MD)
        new_K = torch.bincount(index_M, minlength=self.codebook_size).to(self.count_K)
        self.count_K.lerp_(new_K, 1 - self.config.decay)
        self.sum_KD.lerp_(torch.zeros_like(self.sum_KD).index_add_(0, index_M, z_MD), 1 - self.config.decay)
        self.code_KD.copy_(self.sum_KD / self.count_K.clamp(min=1e-5)[:, None])
        least = self.config.revive * self.count_K.mean()
        poor_K = (self.count_K < least).nonzero().flatten()[: len(z_MD)]
        self.code_KD[poor_K] = z_MD[order_M[: len(poor_K)]]
        self.count_K[poor_K] = least  # it is moved again in the next step if nothing is near to it now either
        self.sum_KD[poor_K] = least * self.code_KD[poor_K]
