"""Learn from scores of what was written: each text against the others of its picture (Rennie et al. 2017, SCST).

    L = (1 / tokens) sum over texts k of sum over tokens t of -log p(y_kt) (r_k - mean of the other texts' r)

(arXiv:1612.00563; with the mean of the others as the baseline in Wang et al. 2022, OFA, arXiv:2202.03052). Rewards
such as CIDEr-D come from metrics/caption.py, whose document frequencies must be those of a corpus, not of a batch.

Shapes: B = pictures, K = texts of each, R = B K rows, a picture's texts one after the other, T = tokens.
"""

from torch import Tensor


def advantages(rewards_BK: Tensor) -> Tensor:
    """Return each reward less the mean of the others of its picture, [B, K]; a picture's sum up to zero."""
    texts = rewards_BK.shape[1]
    assert texts > 1, "a text is judged against others of its picture"
    return rewards_BK - (rewards_BK.sum(1, keepdim=True) - rewards_BK) / (texts - 1)


def self_critical(losses_RT: Tensor, rewards_BK: Tensor) -> Tensor:
    """Return each row's loss [R]; their sum is to be divided by the number of tokens of all ranks.

    Args:
        losses_RT: -log p of each token that was written, 0 on padding (losses/tokens.py).
        rewards_BK: of each text, without a gradient.
    """
    return losses_RT.sum(1) * advantages(rewards_BK.detach()).flatten()
