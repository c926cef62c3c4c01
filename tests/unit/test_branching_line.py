"""The line in which layers wait to be stored."""

from __future__ import annotations

import asyncio

import pytest

from forkpointd.branching.line import SourceLine


async def test_places_are_taken_in_order_whoever_asks_first() -> None:
    line = SourceLine()
    places = [line.join() for _ in range(5)]
    stored: list[int] = []

    async def store(number: int) -> None:
        await line.first(places[number])
        stored.append(number)
        line.leave(places[number])

    async with asyncio.timeout(5), asyncio.TaskGroup() as group:
        for number in (3, 1, 4, 0, 2):
            group.create_task(store(number))
    assert stored == [0, 1, 2, 3, 4]
    assert len(line) == 0
    assert line.is_idle


async def test_one_who_leaves_early_holds_nobody_up() -> None:
    line = SourceLine()
    first, second, third = (line.join() for _ in range(3))
    waiting = asyncio.create_task(line.first(third))
    line.leave(second)
    await asyncio.sleep(0)
    assert not waiting.done()
    line.leave(first)
    async with asyncio.timeout(5):
        await waiting
    assert len(line) == 1


async def test_empty_waits_for_those_who_came_meanwhile_too() -> None:
    line = SourceLine()
    first = line.join()
    waiting = asyncio.create_task(line.empty())
    await asyncio.sleep(0)
    second = line.join()
    line.leave(first)
    await asyncio.sleep(0)
    assert not waiting.done()
    line.leave(second)
    async with asyncio.timeout(5):
        await waiting


async def test_whoever_has_the_turn_or_a_place_is_not_idle() -> None:
    line = SourceLine()
    idle = [line.is_idle]
    async with line.turn:
        idle.append(line.is_idle)
        place = line.join()
    idle.append(line.is_idle)
    line.leave(place)
    idle.append(line.is_idle)
    assert idle == [True, False, False, True]
    with pytest.raises(ValueError, match="not in deque"):
        line.leave(place)
