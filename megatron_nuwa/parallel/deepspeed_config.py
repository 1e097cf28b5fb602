"""DeepSpeed's part of a layout file, checked by DeepSpeed itself."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from megatron_nuwa.errors import UserError
from megatron_nuwa.mistakes import explain
from megatron_nuwa.parallel.groups import import_deepspeed
from megatron_nuwa.parallel.layout import bf16_settings

# DeepSpeed's words for `data_types.grad_accum_dtype`.
FP32_NAMES = ("fp32", "float32", "float", "torch.float32")


class _Watched(dict[str, Any]):
    """A dictionary that remembers which keys were asked for, and in which order."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        super().__init__(values)
        self.asked: list[str] = []

    def get(self, key: str, default: Any = None) -> Any:
        self.asked.append(key)
        return super().get(key, default)

    def __contains__(self, key: object) -> bool:
        self.asked.append(str(key))
        return super().__contains__(key)

    def __getitem__(self, key: str) -> Any:
        self.asked.append(key)
        return super().__getitem__(key)


def check_deepspeed_config(config: Mapping[str, Any], origin: str) -> None:
    """Have DeepSpeed parse its part of a layout file before anything is allocated.

    Raises `UserError` that names `origin` for a key that DeepSpeed does not know, which it would
    ignore at the top level, and for a value that it refuses. A batch size that the recipe fills
    in later may be missing.
    """
    import_deepspeed()
    from deepspeed.runtime.config import DeepSpeedConfig, DeepSpeedConfigError

    watched = _Watched({"train_micro_batch_size_per_gpu": 1, **config})
    try:
        DeepSpeedConfig(watched)
    except ValidationError as error:
        reason = _explain(error, config, watched.asked[-1])
        raise UserError(f"{origin}: DeepSpeed refuses it: {reason}") from error
    except (DeepSpeedConfigError, AttributeError) as error:
        # A key that was removed, or a value that is no group; both come when the key is asked for.
        raise UserError(f"{origin}: DeepSpeed refuses '{watched.asked[-1]}': {error}") from error
    except (AssertionError, ValueError, TypeError, KeyError, NotImplementedError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{origin}: DeepSpeed refuses it: {reason}") from error
    for key in config:
        if key not in watched.asked:
            near = difflib.get_close_matches(key, sorted(set(watched.asked)), n=1)
            hint = f"; did you mean '{near[0]}'?" if near else ""
            raise UserError(f"{origin}: DeepSpeed does not know the key '{key}'{hint}")


def communication_dtype(config: Mapping[str, Any]) -> str | None:
    """`communication_data_type` of a layout's DeepSpeed part, fp32 where nothing speaks against it.

    That is where ZeRO 1 sums bf16's gradients over the replicas once a step, from the fp32 sums of
    the micro-batches. DeepSpeed would round them to bf16 first and sum them so, which for 64
    replicas costs up to 1 % of each. None leaves the choice to DeepSpeed, which takes the weights'
    precision: ZeRO 2 and 3 send gradients after every micro-batch, and twice as much in fp32.
    """
    if chosen := config.get("communication_data_type"):
        return str(chosen).lower()
    zero = config.get("zero_optimization") or {}
    accumulated = (config.get("data_types") or {}).get("grad_accum_dtype")
    is_bf16 = bf16_settings(config).get("enabled")
    offload = (zero.get("offload_optimizer") or {}).get("device")
    is_once = zero.get("stage") == 1 and offload in (None, "none")
    return "fp32" if is_bf16 and is_once and accumulated in FP32_NAMES else None


def _explain(error: ValidationError, config: Mapping[str, Any], reading: str) -> str:
    """The mistake, with the section that it is in, which DeepSpeed's models do not know.

    `reading` is the key that DeepSpeed asked for last.
    """
    section = config.get(reading)
    if isinstance(section, Mapping) and any(
        set(e["loc"][:1]) & set(section) for e in error.errors()
    ):
        return explain(error, section, section=reading)
    return explain(error, config)
