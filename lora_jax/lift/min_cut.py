"""The smallest set of values that separates sources from sinks in a graph of values.

A minimum cut of vertices by maximum flow (Ford and Fulkerson 1956, "Maximal flow through a network"; shortest
augmenting paths after Edmonds and Karp 1972, doi 10.1145/321694.321699): every value is an edge whose capacity is its
size.
"""

import collections
import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

Graph = dict[Any, dict[Any, float]]
_START, _END = "start", "end"


def min_cut(
    sources: Collection[int],
    sinks: Collection[int],
    made_of: Mapping[int, Collection[int]],
    size: Callable[[int], float],
) -> tuple[int, ...] | None:
    """Finds the values to keep so that every path from a source to a sink meets one of them.

    Args:
      sources: values that cannot be made from others.
      sinks: values that are wanted.
      made_of: value -> the values it is made of.
      size: of a value; `math.inf` where it cannot be kept.

    Returns:
      The values of least total size, ascending; among equals those nearest to the sinks. None if there is no such set
      of finite size.
    """
    graph = _graph(sources, sinks, made_of, size)
    while path := _path(graph):
        pairs = list(zip(path, path[1:], strict=False))
        flow = min(graph[u][v] for u, v in pairs)
        if math.isinf(flow):
            return None
        for u, v in pairs:
            graph[u][v] -= flow
            graph[v][u] = graph[v].get(u, 0.0) + flow
    side = _reaches_end(graph)
    return tuple(sorted(n for n, out in (u for u in graph if isinstance(u, tuple)) if out and _cut(n, side)))


def _cut(value: int, side: Collection[Any]) -> bool:
    return (value, True) in side and (value, False) not in side


def _graph(sources, sinks, made_of, size) -> Graph:
    """Every value is an edge from (value, False) to (value, True); only what leads to a sink is in it."""
    graph: Graph = collections.defaultdict(dict)
    todo, seen = list(sinks), set(sinks)
    while todo:
        value = todo.pop()
        graph[value, False][value, True] = size(value)
        graph[value, True].setdefault((value, False), 0.0)
        if value in sources:
            graph[_START][value, False] = math.inf
            continue
        for one in made_of.get(value, ()):
            graph[one, True][value, False] = math.inf
            if one not in seen:
                seen.add(one)
                todo.append(one)
    for value in sinks:
        graph[value, True][_END] = math.inf
    return graph


def _path(graph: Graph) -> list[Any]:
    """A shortest path with capacity left, or nothing."""
    before: dict[Any, Any] = {_START: None}
    todo = collections.deque([_START])
    while todo and _END not in before:
        u = todo.popleft()
        for v, left in graph[u].items():
            if left > 0 and v not in before:
                before[v] = u
                todo.append(v)
    path, node = [], _END if _END in before else None
    while node is not None:
        path.append(node)
        node = before[node]
    return path[::-1]


def _reaches_end(graph: Graph) -> set[Any]:
    """Nodes from which the end can still be reached."""
    into: dict[Any, list[Any]] = collections.defaultdict(list)
    for u, edges in graph.items():
        for v, left in edges.items():
            if left > 0:
                into[v].append(u)
    side, todo = {_END}, [_END]
    while todo:
        for u in into[todo.pop()]:
            if u not in side:
                side.add(u)
                todo.append(u)
    return side
