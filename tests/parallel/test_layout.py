"""A layout that cannot work is refused with its reason and with the nearest that can."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import pytest
from helpers import ROOT
from hypothesis import given
from hypothesis import strategies as st

from megatron_nuwa.errors import UserError
from megatron_nuwa.models.nuwa import NuwaConfig
from megatron_nuwa.parallel.deepspeed_config import check_deepspeed_config, communication_dtype
from megatron_nuwa.parallel.groups import import_deepspeed
from megatron_nuwa.parallel.layout import (
    GradientDtype,
    ParallelSettings,
    bf16_settings,
    check_layout,
    nearest_layouts,
    read_layout,
)

PAPER = NuwaConfig()
ZERO1 = {"zero_optimization": {"stage": 1}}
OFFLOAD = {"zero_optimization": {"stage": 1, "offload_optimizer": {"device": "cpu"}}}
FILES = sorted((ROOT / "ds_configs").glob("*.json"))


def refusal(
    settings: dict[str, Any], deepspeed: dict[str, Any], ranks: int, model: NuwaConfig = PAPER
) -> str:
    with pytest.raises(UserError) as caught:
        check_layout(ParallelSettings(**settings), deepspeed, model, ranks)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_layout_says_itself_in_one_word() -> None:
    layout = check_layout(
        ParallelSettings(pipeline=4, tensor=2), {**ZERO1, "bf16": {"enabled": True}}, PAPER, 64
    )
    assert (layout.name, layout.world_size) == ("pp4_tp2_dp8_zero1_bf16", 64)
    assert layout.data == 8
    split = check_layout(ParallelSettings(tensor=2, sequence_parallel=True), OFFLOAD, PAPER, 2)
    assert split.name == "pp1_tp2_sp_dp1_zero1_offload_fp32"


def test_a_stage_may_be_a_single_layer() -> None:
    assert check_layout(ParallelSettings(pipeline=38), ZERO1, PAPER, 38).pipeline == 38


def test_offloading_to_no_device_is_none() -> None:
    zero = {"stage": 1, "offload_optimizer": {"device": "none"}, "offload_param": {}}
    assert not check_layout(ParallelSettings(), {"zero_optimization": zero}, PAPER, 1).offload


@pytest.mark.parametrize(
    ("settings", "deepspeed", "ranks", "reason"),
    [
        ({"pipeline": 4, "tensor": 2}, ZERO1, 12, "12 processes do not divide by"),
        ({"tensor": 8}, ZERO1, 64, "model.heads 20 do not divide by parallel.tensor 8"),
        ({"pipeline": 64}, ZERO1, 64, "pipeline 64 is more than the 38 stages"),
        ({"pipeline": 2}, {"zero_optimization": {"stage": 2}}, 8, "stage 1 only, not 2"),
        ({"pipeline": 2}, {"zero_optimization": {"stage": 3}}, 8, "stage 1 only, not 3"),
        ({"pipeline": 2}, OFFLOAD, 8, "without offloading to the CPU only"),
        ({"sequence_parallel": True}, ZERO1, 8, "sequence_parallel needs parallel.tensor"),
    ],
)
def test_refusals_name_the_reason_and_the_nearest_layouts(
    settings: dict[str, Any], deepspeed: dict[str, Any], ranks: int, reason: str
) -> None:
    message = refusal(settings, deepspeed, ranks)
    assert reason in message
    assert f"the nearest layouts of {ranks} processes that work: pipeline " in message
    assert message.count("× data") == 3


def test_refusals_that_depend_on_the_models_sizes() -> None:
    odd = NuwaConfig(width=6, heads=2, feed_forward_ratio=1.5)
    assert "the feed-forward's width 9" in refusal({"tensor": 2}, ZERO1, 2, odd)
    few = NuwaConfig(width=16, heads=4, codebook_size=3)
    assert "model.codebook_size 3 is less than" in refusal({"tensor": 4}, ZERO1, 4, few)
    words = NuwaConfig(width=16, heads=4, text_vocabulary=2)
    assert "model.text_vocabulary 2 is less than" in refusal({"tensor": 4}, ZERO1, 4, words)
    maps = NuwaConfig(width=16, heads=4, sketch_codebook_size=3)
    assert "model.sketch_codebook_size 3 is less" in refusal({"tensor": 4}, ZERO1, 4, maps)


def test_two_precisions_at_once_are_refused_whatever_the_processes() -> None:
    both = {**ZERO1, "bf16": {"enabled": True}, "fp16": {"enabled": True}}
    message = refusal({}, both, 8)
    assert "exclude each other" in message
    assert "nearest" not in message


def test_nearest_comes_first() -> None:
    settings = ParallelSettings(pipeline=4, tensor=8)
    assert nearest_layouts(settings, ZERO1, PAPER, 64) == [(4, 4, 4), (2, 4, 8), (4, 2, 8)]
    # 4 is a factor of 1.33 from 3, and 2 one of 1.5.
    settings = ParallelSettings(tensor=3)
    assert nearest_layouts(settings, ZERO1, PAPER, 64) == [(1, 4, 16), (1, 2, 32), (2, 4, 8)]


@given(
    pipeline=st.integers(1, 48),
    tensor=st.integers(1, 48),
    sequence_parallel=st.booleans(),
    ranks=st.integers(1, 256),
    stage=st.integers(1, 3),
    heads=st.sampled_from([1, 4, 6, 20]),
    layers=st.integers(1, 6),
)
def test_every_proposed_layout_works_and_uses_exactly_the_processes_given(
    pipeline: int,
    tensor: int,
    sequence_parallel: bool,
    ranks: int,
    stage: int,
    heads: int,
    layers: int,
) -> None:
    settings = ParallelSettings(
        pipeline=pipeline, tensor=tensor, sequence_parallel=sequence_parallel
    )
    deepspeed = {"zero_optimization": {"stage": stage}}
    model = NuwaConfig(
        width=4 * heads, heads=heads, encoder_layers=1, decoder_layers=layers, codebook_size=8
    )
    proposed = nearest_layouts(settings, deepspeed, model, ranks)
    for pipelines, tensors, data in proposed:
        changed = settings.model_copy(update={"pipeline": pipelines, "tensor": tensors})
        layout = check_layout(changed, deepspeed, model, ranks)
        assert (layout.pipeline, layout.tensor, layout.data) == (pipelines, tensors, data)
        assert layout.world_size == ranks
    try:
        check_layout(settings, deepspeed, model, ranks)
    except UserError as error:
        listed = str(error).count("× data")
        assert listed == len(proposed)
        if not sequence_parallel:
            assert proposed, "one process a replica always works"
    else:
        assert proposed[0][:2] == (pipeline, tensor), "what works is its own nearest"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_layout_file_is_what_its_name_says_and_deepspeed_takes_it(path: Path) -> None:
    settings, deepspeed = read_layout(path)
    layout = check_layout(settings, deepspeed, PAPER, 8)
    parts = [part for part in layout.name.split("_") if part not in ("pp1", "tp1")]
    assert path.stem == "_".join(part for part in parts if not part.startswith("dp"))
    check_deepspeed_config(deepspeed, str(path))
    assert communication_dtype(deepspeed) == ("fp32" if "zero1_bf16" in path.stem else None)


def test_bf16_is_read_as_deepspeed_reads_it() -> None:
    """Where both of its names are there, the newer one counts, whatever it holds."""
    import_deepspeed()
    from deepspeed.runtime.config import DeepSpeedConfig

    off, on = {"enabled": False}, {"enabled": True}
    for config in ({"bf16": off, "bfloat16": on}, {"bf16": on, "bfloat16": off}):
        layout = {**config, "zero_optimization": {"stage": 1}}
        assert bf16_settings(layout) == config["bf16"]
        read = DeepSpeedConfig({"train_micro_batch_size_per_gpu": 1, **layout})
        assert read.bfloat16_config.enabled == config["bf16"]["enabled"]
    assert bf16_settings({"bf16": None, "bfloat16": on}) == on
    assert bf16_settings({}) == {}


def test_a_layout_may_choose_in_what_gradients_are_summed() -> None:
    bf16 = {"bf16": {"enabled": True}, "zero_optimization": {"stage": 1}}
    assert communication_dtype(bf16) is None
    assert communication_dtype({**bf16, "data_types": {"grad_accum_dtype": "fp32"}}) == "fp32"
    wide: dict[str, Any] = {**bf16, "data_types": {"grad_accum_dtype": "float32"}}
    assert communication_dtype(wide) == "fp32"
    # In these words, too, DeepSpeed would sum in fp32.
    older = {"bfloat16" if key == "bf16" else key: value for key, value in wide.items()}
    assert communication_dtype(older) == "fp32"
    assert communication_dtype({**wide, "bf16": {"enabled": False}}) is None
    for device, expected in (("none", "fp32"), ("cpu", None)):
        zero = {"stage": 1, "offload_optimizer": {"device": device}}
        assert communication_dtype({**wide, "zero_optimization": zero}) == expected
    for stage in (1, 2):
        chosen = {**bf16, "zero_optimization": {"stage": stage}, "communication_data_type": "FP16"}
        assert communication_dtype(chosen) == "fp16"
        check_deepspeed_config(chosen, "layout.json")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"zero_optimisation": {"stage": 1}}, "did you mean 'zero_optimization'?"),
        ({"zero_optimization": {"stage": 1, "overlap": True}}, "overlap"),
        ({"zero_optimization": {"stage": 7}}, "refuses it: zero_optimization.stage must be 0, 1"),
        ({"bf16": {"enable": True}}, "unknown key 'bf16.enable'"),
        ({"bf16": {"enabled": True, "loss_scale": 4}}, "loss_scale"),
        # The same field stands in two sections.
        (
            {"bf16": {"enabled": True}, "compile": {"enabled": True}},
            "unknown key 'compile.enabled'",
        ),
        (
            {"bf16": {"enabled": True}, "fp16": {"enabled": "maybe"}},
            "fp16.enabled must be true or false, not 'maybe'",
        ),
        # DeepSpeed reads them together.
        (
            {"bf16": {"enabled": True}, "wandb": {"enabled": "maybe"}},
            "wandb.enabled must be true or false, not 'maybe'",
        ),
        ({"checkpoint": 5}, "refuses 'checkpoint'"),
        # Keys that older guides use.
        *(
            ({key: {"enabled": True}}, f"refuses '{key}': ")
            for key in (
                *("elasticity", "nebula", "amp", "curriculum_learning", "eigenvalue"),
                *("sparse_attention", "quantize_training", "compression_training"),
            )
        ),
        ({"sparse_gradients": False}, "refuses 'sparse_gradients': "),
    ],
)
def test_what_deepspeed_would_ignore_or_refuse_is_named(
    change: dict[str, Any], reason: str
) -> None:
    with pytest.raises(UserError, match=r"^layout\.json: DeepSpeed ") as caught:
        check_deepspeed_config({**ZERO1, **change}, "layout.json")
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


def test_gradients_may_be_summed_in_what_deepspeed_has_names_for() -> None:
    import_deepspeed()
    from deepspeed.runtime.config import DtypeEnum

    named = DtypeEnum._value2member_map_.items()
    words = {name for name, dtype in named if isinstance(name, str) and dtype != DtypeEnum.int8}
    assert set(get_args(GradientDtype)) == words


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{", "is not valid JSON"),
        ("[]", "must hold one JSON object"),
        ('{"optimizer": {}}', "'optimizer' is set by the recipe's optimizer"),
        ('{"pipeline": {}}', "'pipeline' is filled in from 'parallel'"),
        ('{"parallel": {"pipelines": 2}}', "did you mean 'pipeline'?"),
        ('{"parallel": {"tensor": 0}}', "tensor must be at least 1, not 0"),
        ('{"bf16": true}', "bf16 must be a group of fields, not true"),
        ('{"bf16": {"enabled": 1}}', "bf16.enabled must be true or false, not 1"),
        ('{"bfloat16": {"enabled": "auto"}}', "bfloat16.enabled must be true or false, not 'auto'"),
        ('{"fp16": {"enabled": null}}', "fp16.enabled must be true or false, not null"),
        ('{"data_types": {"grad_accum_dtyp": "fp32"}}', "did you mean 'grad_accum_dtype'?"),
        ('{"data_types": {"grad_accum_dtype": "fp33"}}', "grad_accum_dtype must be 'fp32', "),
        (
            '{"activation_checkpointing": {"partition_activations": true}}',
            "'activation_checkpointing' is set by the recipe's training.checkpoint_activations",
        ),
        ('{"parallel": 2}', "'parallel'"),
    ],
)
def test_a_file_that_is_no_layout_is_refused_by_name(
    content: str, reason: str, tmp_path: Path
) -> None:
    path = tmp_path / "layout.json"
    path.write_text(content)
    with pytest.raises(UserError) as caught:
        read_layout(path)
    assert str(path) in str(caught.value)
    assert reason in str(caught.value)


def test_the_parallel_key_is_taken_out_before_deepspeed_sees_the_file(tmp_path: Path) -> None:
    path = tmp_path / "layout.json"
    path.write_text(json.dumps({"parallel": {"pipeline": 2, "cut": "uniform"}, **ZERO1}))
    settings, deepspeed = read_layout(path)
    assert settings == ParallelSettings(pipeline=2, cut="uniform")
    assert deepspeed == ZERO1


@pytest.mark.parametrize(
    ("zero", "reason"),
    [
        ({}, "stage must be 1, 2 or 3, and the layout does not name it; on one process, too"),
        ({"zero_optimization": {"stage": 0}}, "stage must be 1, 2 or 3, not 0; on one process"),
        (
            {"zero_optimization": {"stage": 1, "compute_grad_norm": False}},
            "compute_grad_norm must not be false",
        ),
    ],
)
def test_what_training_cannot_do_without_is_named(zero: dict[str, Any], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        check_layout(ParallelSettings(), zero, NuwaConfig(), 1)


def test_a_byte_order_mark_at_the_beginning_of_a_file_is_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "layout.json"
    path.write_text(json.dumps({"parallel": {"pipeline": 2}, **ZERO1}), encoding="utf-8-sig")
    settings, deepspeed = read_layout(path)
    assert settings.pipeline == 2
    assert deepspeed == ZERO1
