"""Leaving out one optimizer step of a DeepSpeed engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


def make_skippable(engine: Any, should_skip: Callable[[], bool]) -> None:
    """Ask `should_skip` whenever a DeepSpeed engine is about to take an optimizer step.

    It is called on every process after the step's last backward pass and the gradients' reduction,
    by plain and pipeline engines alike, and may use collectives; all processes must get the same
    answer. On True the step becomes one that DeepSpeed itself drops for an overflow: gradients are
    cleared, weights, moments, Adam's step counters and the loss scale stay, and
    `engine.was_step_applied()` is False. Works for ZeRO 1 to 3 in fp32, bf16 and fp16.
    """
    optimizer = engine.optimizer
    take_step = optimizer.step

    def step(*arguments: Any, **options: Any) -> None:
        if should_skip():
            _drop(optimizer, take_step)
        else:
            take_step(*arguments, **options)
        if optimizer.overflow:
            _forget_offloaded_gradients(optimizer)

    optimizer.step = step


def _drop(optimizer: Any, take_step: Callable[[], Any]) -> None:
    """Have a DeepSpeed optimizer go the way of an overflow."""
    with _overflow_pretended(optimizer):
        if hasattr(optimizer, "clear_hp_grads"):
            optimizer.overflow, optimizer._global_grad_norm = True, float("inf")
            optimizer.clear_hp_grads()
            optimizer.clear_lp_grads()
        else:
            take_step()


@contextmanager
def _overflow_pretended(optimizer: Any) -> Iterator[None]:
    """Have a DeepSpeed optimizer find an overflow, and leave the loss scale as it is."""

    def overflow(*_: Any, **__: Any) -> bool:
        optimizer.overflow = True
        return True

    pretended = {
        "_update_scale": lambda *_, **__: None,
        # ZeRO 1 and 2 ask the second only where the first says so; ZeRO 3 asks the third.
        "check_grad_overflow": True,
        "check_overflow": overflow,
        "_overflow_check_and_loss_scale_update": overflow,
    }
    own = {name: vars(optimizer)[name] for name in pretended if name in vars(optimizer)}
    vars(optimizer).update(pretended)
    try:
        yield
    finally:
        for name in pretended:
            vars(optimizer).pop(name)
        vars(optimizer).update(own)


def _forget_offloaded_gradients(optimizer: Any) -> None:
    """What ZeRO 1 and 2 leave behind when they drop a step with the optimizer on the CPU.

    DeepSpeed 0.19.8 would add the next step's gradients to them, so one that is not finite would
    have every later step dropped.
    """
    if getattr(optimizer, "cpu_offload", False):
        for gradients in (optimizer.averaged_gradients, optimizer.all_grad_tensors):
            gradients.update(dict.fromkeys(gradients))
