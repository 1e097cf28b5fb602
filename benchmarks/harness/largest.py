"""The largest micro-batch that a GPU's memory holds."""

from __future__ import annotations

import gc
import re
import time
from collections.abc import Callable, Sequence

import torch

from benchmarks.harness.step_plan import Mix, StepPlan, token_batches
from megatron_nuwa.data.batches import TokenBatch
from megatron_nuwa.errors import UserError
from megatron_nuwa.plan.devices import GIB
from megatron_nuwa.training.engine import Engine

# What `fits` may try beyond the guess, each a forward and a backward pass.
_TRIES = 12


def largest_mix(
    engine: Engine, plan: StepPlan, mix: Mix, step: Callable[[Sequence[TokenBatch]], object]
) -> Mix:
    """The mix with as many clips a micro-batch as the GPU holds, and images in proportion.

    `step` takes a whole optimizer step. Raises `UserError` where not even one clip fits.
    """
    model = plan.model
    with torch.compiler.set_stance("force_eager"):
        # The optimizer's state is there from the first step on.
        step(token_batches(model, mix.scaled(1).sizes(model)))

    def passes(clips: int) -> None:
        # The module itself: DeepSpeed's counters do not take back what an error interrupts.
        sizes = mix.scaled(clips).sizes(model)
        for size in {(s.samples, s.grid): s for s in sizes}.values():
            (batch,) = token_batches(model, [size])
            engine.deepspeed.module(batch.to(engine.device), 0).backward()
            engine.deepspeed.optimizer.zero_grad()

    def fits(clips: int) -> bool:
        started = time.perf_counter()
        fitted = fits_in_memory(lambda: passes(clips))
        engine.deepspeed.optimizer.zero_grad()
        peak = torch.cuda.max_memory_allocated() / GIB
        torch.cuda.reset_peak_memory_stats()
        word = "fit" if fitted else "do NOT fit"
        seconds = time.perf_counter() - started
        print(f"{clips} clips {word}: peak {peak:.2f} GiB, {seconds:.1f} s", flush=True)
        return fitted

    memory = torch.cuda.mem_get_info(engine.device)[1]
    guess = plan.most_clips(mix, memory)
    print(f"plan thinks that {guess} clips fit in {memory / GIB:.2f} GiB", flush=True)
    # Every shape would be compiled anew.
    with torch.compiler.set_stance("force_eager"):
        clips = largest(fits, guess)
    # Compiled code, where there is any, may need a little more.
    while clips > 1 and not fits(clips):
        clips -= 1
    if not clips:
        raise UserError("not even one clip a micro-batch fits; choose another recomputation")
    return mix.scaled(clips)


def largest(fits: Callable[[int], bool], guess: int) -> int:
    """The largest number for which `fits` is true, tried out from a guess on; 0 where not even 1.

    `fits` must be true up to some number and false from there on. After `_TRIES` tries the largest
    that was seen to fit is taken.
    """
    known, too_many, number = 0, None, max(guess, 1)
    # Ever farther away from the guess until it lies between two tries, then halfway.
    stride = max(1, number // 8)
    for _ in range(_TRIES):
        if fits(number):
            known = number
        else:
            too_many = number
        if too_many is None:
            number, stride = known + stride, 2 * stride
        elif too_many - known <= 1:
            break
        elif known:
            number = (known + too_many) // 2
        else:
            number, stride = max(1, too_many - stride), 2 * stride
    return known


def fits_in_memory(work: Callable[[], object]) -> bool:
    """Run `work`; False where the GPU's memory did not suffice, which is then free again."""
    torch.cuda.empty_cache()
    try:
        work()
        torch.cuda.synchronize()
    except RuntimeError as error:
        # cuBLAS, and operators of another library, raise errors of their own.
        if not re.search("out of memory|alloc_failed", str(error), re.IGNORECASE):
            raise
        fitted = False
    else:
        fitted = True
    # Outside of the handler: the error holds the frames, and so the tensors, that it went through.
    gc.collect()
    torch.cuda.empty_cache()
    return fitted
