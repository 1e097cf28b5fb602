"""The processes of a layout, and the groups in which they speak to each other."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from dataclasses import dataclass
from typing import Any

from megatron_nuwa.parallel.accelerator import deepspeeds_choice, on_gpu
from megatron_nuwa.parallel.layout import Layout
from megatron_nuwa.parallel.tensor import TensorGroup


def import_deepspeed() -> Any:
    """DeepSpeed, told to be quiet and not to compile what CPUs do not need."""
    # DeepSpeed calls collectives by the names that torch is about to rename.
    warnings.filterwarnings("ignore", message=r".*torch\.distributed\..* is deprecated.*")
    with deepspeeds_choice():
        import deepspeed
        from deepspeed.accelerator import get_accelerator
        from deepspeed.runtime.zero.config import ZeroStageEnum
        from deepspeed.utils import logger

        get_accelerator()

    logger.setLevel(logging.WARNING)
    # Python 3.11.0 to 3.11.3 would pickle it as a call of getattr, which no safe reader allows.
    ZeroStageEnum.__reduce_ex__ = lambda stage, _protocol: (ZeroStageEnum, (stage.value,))
    if not on_gpu():
        # Its shared-memory collectives take a minute to compile and bring nothing to gloo runs.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


@dataclass(frozen=True)
class Place:
    """One process's place in a layout.

    `mpu` is what DeepSpeed asks for its groups, `topology` what it builds pipelines from.
    """

    layout: Layout
    stage: int
    replica: int
    tensor: TensorGroup
    mpu: Any
    topology: Any

    @property
    def is_last_stage(self) -> bool:
        """Whether losses are computed here."""
        return self.stage == self.layout.pipeline - 1

    @property
    def reads_data(self) -> bool:
        """Whether micro-batches are needed here: their inputs, or their targets."""
        return self.stage == 0 or self.is_last_stage


def find_place(layout: Layout) -> Place:
    """Build the groups of a layout; every process of the run calls it."""
    deepspeed = import_deepspeed()
    from deepspeed.runtime.pipe.topology import PipelineParallelGrid, PipeModelDataParallelTopology

    deepspeed.init_distributed(dist_init_required=False)
    topology = PipeModelDataParallelTopology(
        num_pp=layout.pipeline, num_mp=layout.tensor, num_dp=layout.data
    )
    # DeepSpeed prints the whole topology.
    with contextlib.redirect_stdout(io.StringIO()):
        mpu = PipelineParallelGrid(topology=topology)
    group = mpu.get_slice_parallel_group() if layout.tensor > 1 else None
    tensor = TensorGroup(group, mpu.get_slice_parallel_rank(), layout.tensor)
    return Place(layout, mpu.get_stage_id(), mpu.get_data_parallel_rank(), tensor, mpu, topology)
