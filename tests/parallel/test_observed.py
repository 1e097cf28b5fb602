"""What is noted of a run shows what it is there to show."""

from __future__ import annotations

from observed import Call, Observed, half_sums, rehearse


def said(operation: str, ranks: tuple[int, ...], size: int = 8, dtype: str = "bfloat16") -> Call:
    reduction = "SUM" if operation == "allreduce" else ""
    return Call(ranks, operation, (f"torch.{dtype}",), (size,), reduction, True)


def world(*calls: list[Call]) -> list[Observed]:
    return [Observed(calls=of_one) for of_one in calls]


def test_a_rehearsal_halts_where_processes_would_wait_for_ever() -> None:
    send, receive, together = said("send", (1,)), said("recv", (0,)), said("allreduce", (0, 1))
    assert rehearse(world([send, together], [receive, together])) == ""
    assert rehearse(world([send, together], [together, receive]))
    # Both send first, one receives another number of values, one comes once more.
    assert rehearse(world([send, said("recv", (1,))], [said("send", (0,)), receive]))
    assert rehearse(world([send], [said("recv", (0,), size=9)]))
    assert rehearse(world([together], [together, together])).startswith("1: ")


def test_a_half_sum_is_one_over_others_than_the_tensor_group() -> None:
    calls = [
        said("allreduce", (0, 1)),
        said("allreduce", (0, 2)),
        said("allreduce", (0,)),
        said("allreduce", (0, 2), dtype="float32"),
        said("broadcast", (0, 2)),
    ]
    assert half_sums(Observed(calls=calls, tensor_group=(0, 1))) == {calls[1]}
