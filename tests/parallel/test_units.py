"""The model as units: the same function, wherever it is cut, recomputed or packed."""

from __future__ import annotations

import shutil
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_nuwa.grid import Grid
from megatron_nuwa.models.nuwa import Context, Nuwa, NuwaConfig
from megatron_nuwa.parallel.units import NOTES, Flow, Recomputation, Units

GRID = Grid(4, 3, 2)
needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="no C++ compiler on PATH"
)


def small(**changes: object) -> Nuwa:
    torch.manual_seed(0)
    settings = {
        "width": 16,
        "heads": 2,
        "encoder_layers": 2,
        "decoder_layers": 3,
        "codebook_size": 40,
        "code_dim": 8,
        "text_vocabulary": 30,
        "position_grid": (4, 3, 2),
    }
    return Nuwa(NuwaConfig.model_validate({**settings, **changes}))


def text() -> Context:
    torch.manual_seed(1)
    mask = torch.arange(77).expand(2, 77) < 6
    return Context("text", torch.randint(0, 30, (2, 77)), Grid(1, 1, 77), mask)


def still() -> Context:
    torch.manual_seed(1)
    return Context("visual", torch.randint(0, 40, (2, 12)), Grid(4, 3, 1))


def sketch() -> Context:
    torch.manual_seed(1)
    return Context("sketch", torch.randint(0, 20, (2, 24)), GRID)


def target() -> Tensor:
    torch.manual_seed(2)
    return torch.randint(0, 40, (2, GRID.cells))


def through_every_cut(units: Units, flow: Flow) -> Tensor:
    """Packed and unpacked between any two units."""
    for unit in range(len(units)):
        flow = units.run(flow, unit, unit + 1)
        flow = Flow.unpack(flow.pack(), flow.notes)
    return flow.x


@pytest.mark.parametrize("context", [text, still, sketch])
@pytest.mark.parametrize("tied", [False, True])
def test_units_in_a_row_are_the_model(context: object, tied: bool) -> None:
    assert callable(context)
    model = small(tie_head=tied, sketch_codebook_size=20)
    expected = model(context(), target(), GRID)
    flow = Flow.of(context(), target(), GRID)
    assert torch.equal(Units(model).run(flow).x, expected)
    assert torch.equal(through_every_cut(Units(model), flow), expected)


@pytest.mark.parametrize("recompute", ["selective", "layer"])
def test_recomputation_changes_no_gradient(recompute: Recomputation) -> None:
    model = small(dropout=0.2)
    gradients = []
    for kind in ("none", recompute):
        model.zero_grad()
        logits = Units(model, kind).run(Flow.of(text(), target(), GRID, seed=7)).x
        model.cross_entropy(logits, target()).backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert len(gradients[0]) > 60
    for plain, again in zip(*gradients, strict=True):
        assert torch.equal(plain, again)


def test_recomputation_keeps_less() -> None:
    kept = {}
    for kind in ("none", "selective", "layer"):
        model, sizes = small(), {}

        def note(tensor: Tensor, sizes: dict[int, int] = sizes) -> Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            Units(model, kind).run(Flow.of(text(), target(), GRID))
        kept[kind] = sum(sizes.values())
    assert kept["layer"] < kept["none"] / 2


def gradients(model: Nuwa, units: Units) -> dict[str, Tensor]:
    model.zero_grad()
    logits = units.run(Flow.of(text(), target(), GRID, seed=7)).x
    loss = model.cross_entropy(logits, target())
    loss.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {"logits": logits.detach(), "loss": loss.detach(), **grads}


def test_selective_recomputation_repeats_no_matrix_product() -> None:
    products = {}
    for kind in ("none", "selective", "layer"):
        model = small()
        logits = Units(model, kind).run(Flow.of(text(), target(), GRID)).x
        with Products() as counted:
            model.cross_entropy(logits, target()).backward()
        products[kind] = counted.number
    assert products["none"] == products["selective"] < products["layer"]


class Products(TorchDispatchMode):
    """Counts matrix products."""

    number = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.number += function.name().startswith(("aten::mm", "aten::addmm", "aten::bmm"))
        return function(*args, **(kwargs or {}))


def test_notes_tell_all_that_the_shapes_follow_from() -> None:
    """Of a micro-batch at a given unit, which pipelines tell each other once."""
    flows = [
        Flow.of(context, tokens, grid)
        for context in (text(), replace(text(), mask=None), still(), sketch())
        for tokens, grid in ((target(), GRID), (target()[:, :12], Grid(4, 3, 1)))
    ]
    flows += [Flow.of(text(), target()[:1], GRID)]
    assert len({tuple(flow.notes) for flow in flows}) == len(flows)
    assert {len(flow.notes) for flow in flows} == {NOTES}


def test_no_context_is_sent_where_nobody_reads_it() -> None:
    units = Units(small())
    flow = units.run(Flow.of(text(), target(), GRID), 0, len(units) - 2)
    assert flow.context is not None
    last = units.run(flow, len(units) - 2, len(units) - 1)
    assert last.context is None
    assert len(last.pack()) == 2


@pytest.mark.slow
@needs_compiler
def test_compiled_layers_compute_the_same() -> None:
    """With PyTorch's own code generator: one C++ file for each kind of layer and pass."""
    model = small()
    expected = gradients(model, Units(model))
    model.cross_entropy.compile(dynamic=False)
    found = gradients(model, Units(model, compiled=True))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-6, msg=name)


@pytest.mark.parametrize("recompute", ["none", "selective", "layer"])
def test_layers_of_a_kind_are_compiled_once(
    recompute: Recomputation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Graphs alone, without generated code: what is recomputed, and that nothing breaks them."""
    graphs: list[nn.Module] = []
    compile_with = torch.compile

    def counting(function: object, **settings: object) -> object:
        def backend(graph: nn.Module, inputs: object) -> object:
            graphs.append(graph)
            return lookup_backend("aot_eager")(graph, inputs)

        return compile_with(function, backend=backend, fullgraph=True, **settings)

    from torch._dynamo.backends.registry import lookup_backend

    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", counting)
    model = small(dropout=0.2)
    units = Units(model, recompute, compiled=True)
    found = gradients(model, units)
    # Two encoder and three decoder layers.
    assert len(graphs) == 2
    plain = gradients(model, Units(model))
    for name, value in plain.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6, msg=name)
    with torch.no_grad():
        units.run(Flow.of(text(), target()[:, :12], Grid(4, 3, 1)))
    assert len(graphs) == 2


def test_dropout_follows_from_the_seed_and_the_unit_alone() -> None:
    model = small(dropout=0.3)

    def run(seed: int, stream: int = 0) -> Tensor:
        torch.manual_seed(torch.randint(1000, ()).item())
        return through_every_cut(Units(model, stream=stream), Flow.of(text(), target(), GRID, seed))

    assert torch.equal(run(5), Units(model).run(Flow.of(text(), target(), GRID, 5)).x)
    assert not torch.equal(run(5), run(6))
    assert not torch.equal(run(5), run(5, stream=1))
    # The next micro-batch of one process is not the same one of the next process.
    assert not torch.equal(run(6), run(5, stream=1))
    model.eval()
    assert torch.equal(run(5), run(6))


def test_dropout_is_another_in_every_unit_micro_batch_and_stream(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, context, tokens = small(dropout=0.3), text(), target()
    seeds: list[int] = []
    monkeypatch.setattr(torch, "manual_seed", seeds.append)
    # Micro-batches of a step have seeds in a row, and streams are numbered.
    for stream in range(3):
        for seed in range(100, 104):
            Units(model, stream=stream).run(Flow.of(context, tokens, GRID, seed))
    assert len(seeds) >= 12 * 5
    assert len(set(seeds)) == len(seeds)
