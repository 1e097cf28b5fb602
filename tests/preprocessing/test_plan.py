"""The plan on disk: the manifest's items by shard, repeated ids, memory that does not grow."""

from __future__ import annotations

from pathlib import Path

import pytest

from preprocessing.plan import Plan, PlanKey
from preprocessing.sources import SourceItem


def items(*ids: str) -> list[SourceItem]:
    return [SourceItem(id=name, media=Path(f"{name}.png"), captions=("a", "b")) for name in ids]


def key(sha: str = "0", size: int = 3) -> PlanKey:
    return PlanKey(source="m.jsonl", manifest_sha256=sha, items_per_shard=size)


def test_items_come_back_as_they_were(tmp_path: Path) -> None:
    clip = SourceItem("c", Path("c.mp4"), ("ein Bär",), 0.5, 2.25, Path("s.png"))
    plan = Plan(tmp_path / "plan", 3)
    plan.write([*items("a", "b", "d"), clip], key())
    assert [entry.item.id for entry in plan.items(0)] == ["a", "b", "d"]
    assert plan.items(1)[0].item == clip
    assert plan.items(1)[0].row == 3


def test_later_rows_of_an_id_are_marked_across_shards(tmp_path: Path) -> None:
    plan = Plan(tmp_path / "plan", 3)
    plan.write(items("a", "b", "a", "c", "b", "a", "d"), key())
    marked = [entry.row for shard in range(3) for entry in plan.items(shard) if entry.repeated]
    assert marked == [2, 4, 5]


@pytest.mark.parametrize("other", [key("1"), key(size=4)])
def test_plan_of_another_manifest_or_size_is_not_taken(tmp_path: Path, other: PlanKey) -> None:
    plan = Plan(tmp_path / "plan", 3)
    assert plan.stamp(key()) is None
    plan.write(items("a", "b", "c", "d"), key())
    stamp = plan.stamp(key())
    assert stamp is not None
    assert (stamp.items, stamp.shots, stamp.films) == (4, 0, 0)
    assert plan.stamp(other) is None


def test_torn_plan_is_not_taken(tmp_path: Path) -> None:
    plan = Plan(tmp_path / "plan", 3)

    def broken():  # type: ignore[no-untyped-def]
        yield from items("a", "b", "c", "d")
        raise KeyboardInterrupt

    plan.write(items("a"), key())
    with pytest.raises(KeyboardInterrupt):
        plan.write(broken(), key())
    assert plan.stamp(key()) is None


def test_shots_are_counted_by_what_they_are_shots_of_in_any_order(tmp_path: Path) -> None:
    shots = [
        SourceItem(f"{film}#{n}", Path("f.mp4"), ("a",), shot=n) for n in range(3) for film in "xyz"
    ]
    # Cut again: a shot of a shot.
    again = [SourceItem(f"w#0#{n}", Path("f.mp4"), ("a",), shot=n) for n in range(2)]
    plan = Plan(tmp_path / "plan", 2)
    plan.write([*items("a", "b"), *shots[1:], *again], key(size=2), total=12)
    stamp = plan.stamp(key(size=2))
    assert stamp is not None
    assert (stamp.items, stamp.shots, stamp.films) == (12, 10, 4)
    assert plan.items(1)[0].item == shots[1]
