"""What the preflight makes of numbers: who is bad, and who only looks so beside one that is."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest

from distrib.preflight import clocks, facts, links, sums

GIB = 1 << 30


def make_ranks(*hosts: str, gpu: str = "H200", held: int = GIB // 2) -> list[facts.Rank]:
    counts: dict[str, int] = {}
    ranks = []
    for number, host in enumerate(hosts):
        local = counts[host] = counts.get(host, -1) + 1
        ranks.append(facts.Rank(number, local, host, {"torch": "2"}, {"GPU": gpu}, 140 * GIB, 141 * GIB, held))
    return ranks


def test_nodes_of_ranks_in_any_order() -> None:
    def numbers(ranks: list[facts.Rank]) -> list[list[int]]:
        return [[rank.rank for rank in node] for node in facts.group(ranks)]

    assert numbers(make_ranks("a", "a", "b", "b")) == [[0, 1], [2, 3]]
    assert numbers(make_ranks("a", "b", "a", "b", "a")) == [[0, 2, 4], [1, 3]]
    two_agents = [facts.Rank(k, k % 2, "a", {}, {}) for k in range(4)]
    assert numbers(two_agents) == [[0, 1], [2, 3]]


def changed(rank: facts.Rank, **values: object) -> facts.Rank:
    return facts.Rank(**{**vars(rank), **values})  # type: ignore[arg-type]


def test_gpus_that_are_taken_or_missing() -> None:
    ranks = make_ranks("a", "a", "b", "b")
    assert facts.check_gpus(ranks) == []
    ranks[2] = changed(ranks[2], held=12 * GIB)
    (bad,) = facts.check_gpus(ranks)
    assert str(bad) == "rank 2 on b has a GPU of which other processes hold memory: 12.0 GiB are in use"
    ranks[1] = changed(ranks[1], machine={"GPU": facts.NONE})
    assert str(facts.check_gpus(ranks)[0]) == "rank 1 on a has no GPU, rank 0 on a has one"
    everywhere = make_ranks("a", "a", held=5 * GIB)  # a node that others use, too
    assert [bad.rank.rank for bad in facts.check_gpus(everywhere)] == [0, 1]
    assert facts.check_gpus(make_ranks("a", "b", gpu=facts.NONE)) == []


def test_differences_are_told_with_the_odd_one() -> None:
    ranks = make_ranks("a", "b", "c")
    assert facts.differences(ranks) == []
    ranks[0] = changed(ranks[0], machine={"GPU": "H100", "driver": "575"})
    told = facts.differences(ranks)
    assert told[0] == "rank 0 on a has GPU H100, 2 ranks have H200: the slowest sets the pace"
    assert told[1] == "rank 0 on a has driver 575, 2 ranks have none"
    ranks[1] = changed(ranks[1], machine={"GPU": "A100"})
    assert "(one of 2 ranks that differ), rank 0 on a has H100" in facts.differences(ranks)[0]


def test_who_is_to_blame_for_a_wrong_sum() -> None:
    assert sums.wrong_ranks([[], [], []]) == []
    assert [rank for rank, _ in sums.wrong_ranks([[1], [1], [1]])] == [1]
    assert [rank for rank, _ in sums.wrong_ranks([[1], []])] == [0]
    assert [rank for rank, _ in sums.wrong_ranks([[0, 1, 2], [], []])] == [0]
    assert [rank for rank, _ in sums.wrong_ranks([[0, 2], [0, 2], [0, 2], [0]])] == [0, 2]


@pytest.mark.parametrize("nodes", range(1, 9))
def test_the_ring_has_each_neighbour_once(nodes: int) -> None:
    rounds = links.ring(nodes)
    assert len(rounds) <= 3
    for pairs in rounds:
        ends = [node for pair in pairs for node in pair]
        assert len(ends) == len(set(ends))
    pairs = [frozenset(pair) for pairs in rounds for pair in pairs]
    assert len(pairs) == len(set(pairs)) == (nodes if nodes > 2 else nodes - 1)


def measured(nodes: int, speed: Callable[[int, int], float]) -> links.Links:
    pairs = [pair for pairs in links.ring(nodes) for pair in pairs]
    return links.Links(nodes, {pair: speed(*pair) for pair in pairs})


def test_which_nodes_are_slow() -> None:
    def without(*slow: int) -> Callable[[int, int], float]:
        return lambda a, b: 1.0 if slow and (a in slow or b in slow) else 10.0

    assert measured(4, without()).slow() == []
    assert measured(3, without(1)).slow() == [1]
    assert measured(8, without(7)).slow() == [7]
    assert measured(2, without(1)).slow() == []  # nobody to compare with
    between = measured(7, without(0, 2))  # 1 has slow neighbours only
    assert sorted(between.slow()) == [0, 1, 2]
    again = between.doubtful()
    assert sorted(a for a, _ in again) == [0, 1, 2]
    assert len({b for _, b in again} - {0, 1, 2}) == 3
    between.note({pair: 10.0 if pair[0] == 1 else 1.0 for pair in again})
    assert sorted(between.slow()) == [0, 2]


def test_a_moments_delay_is_not_slow() -> None:
    found = measured(3, lambda a, b: 0.1 if 1 in (a, b) else 1.0)  # 40 ms, not 4
    assert found.slow() == [1]
    assert links.Links(3, found.speeds, bytes=4_000_000, spared=0.03).slow() == [1]
    assert links.Links(3, found.speeds, bytes=4_000_000, spared=0.05).slow() == []


def test_a_slow_link_is_not_its_nodes() -> None:
    found = measured(5, lambda a, b: 1.0 if {a, b} == {2, 3} else 10.0)
    assert found.slow() == []
    assert found.slow_links() == [((2, 3), 1.0)]
    assert found.doubtful() == []
    assert links.in_rounds([(2, 3), (0, 1), (3, 4)]) == [[(2, 3), (0, 1)], [(3, 4)]]
    found.note({(3, 2): 9.0})
    assert found.slow_links() == []


def test_clocks_are_bounded_from_both_sides() -> None:
    # True times of coming and leaving; nobody leaves before all have come.
    rounds = [((0.0, 1.0), (0.9, 1.2), (0.5, 1.0)), ((2.0, 2.2), (2.1, 2.15), (2.05, 2.3))]
    ahead = (0.0, 7.0, -0.5)
    ranks = [[(come + by, go + by) for come, go in (turn[k] for turn in rounds)] for k, by in enumerate(ahead)]
    found = clocks.judge(ranks)
    middle = found[0].skew
    for clock, by in zip(found, ahead, strict=True):
        assert abs(clock.skew - middle - by) <= clock.accuracy + 1e-9
        assert clock.accuracy < 0.3  # the shortest meeting took 0.15 to 0.3
    assert clocks.judge([[(1.0, 2.0)]]) == [clocks.Clock(0.0, 0.0)]


def test_a_checksum_of_the_sources() -> None:
    assert re.fullmatch("[0-9a-f]{12}", facts.source_checksum())
    assert facts.source_checksum() == facts.source_checksum()
