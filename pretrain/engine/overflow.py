"""What older releases of DeepSpeed lack in fp32: a step whose gradient is not finite is skipped on all ranks."""

from types import MethodType
from typing import Any


def skip_on_all_ranks(optimizer: Any, stage: int) -> None:
    """Make the ZeRO optimizer of stages 1 to 3 skip such a step and say so in `overflow`, where it does not by itself.

    0.19.8 looks at the gradient's norm. 0.17.5 to 0.19.0 look for overflows in fp16 only: in fp32 one infinite gradient
    made weights of all ranks not-a-number, under a norm that was reported as finite.
    """
    from deepspeed.runtime.zero import stage_1_and_2

    if hasattr(stage_1_and_2, "is_invalid_grad_norm"):
        return
    if stage == 3:
        update = optimizer._overflow_check_and_loss_scale_update

        def check_and_update(self: Any) -> bool:
            self.check_overflow()
            return bool(update())

        optimizer._overflow_check_and_loss_scale_update = MethodType(check_and_update, optimizer)
    else:
        check = optimizer.check_overflow

        def check_overflow(self: Any, partition_gradients: bool = True) -> None:  # noqa: FBT001, FBT002 (theirs)
            check(partition_gradients=True)  # stage 1 would not ask the other ranks, yet holds only its part

        optimizer.check_overflow = MethodType(check_overflow, optimizer)
        optimizer.check_grad_overflow = True
