"""Expressions as graphs of operations: simplified, shielded against singular branches, and done in torch."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor


class Node(NamedTuple):
    """An operation on earlier nodes, by their numbers; a "number" holds its value, a "variable" its name."""

    op: Any
    args: tuple


class Graph:
    """Nodes, operands before their use, equal ones once. Calling it adds a node, folded and simplified."""

    def __init__(self) -> None:
        self.nodes: list[Node] = []
        self.index: dict[Node, int] = {}
        self.tame: list[bool] = []  # every slope on the way down to the variables is finite
        self.gates: list[set[int]] = []  # the steps and deltas among the factors of a product

    def node(self, op: Any, *args: Any) -> int:
        node = Node(op, tuple(sorted(args)) if op in ("+", "*") else args)
        if node not in self.index:
            self.index[node] = len(self.nodes)
            self.nodes.append(node)
            scales = op == "*" and any(self.nodes[a].op == "number" for a in args)
            self.tame.append(op in _FLAT or ((op in _TAME or scales) and all(self.tame[a] for a in args)))
            factors = (self.gates[a] for a in args) if op == "*" else ()
            self.gates.append({self.index[node]} if op in _FLAGS else set().union(*factors))
        return self.index[node]

    def value(self, i: int) -> float | None:
        return self.nodes[i].args[0] if self.nodes[i].op == "number" else None

    def is_square(self, i: int) -> bool:
        return self.nodes[i].op == "*" and len(set(self.nodes[i].args)) == 1

    def __call__(self, op: str, *args: int) -> int:
        values = [self.value(a) for a in args]
        if op in _NUMBERS and None not in values:
            return self.node("number", apply(op, values))
        return _RULES[op](self, *args) if op in _RULES else self.node(op, *args)

    def slopes(self, i: int, always: bool) -> Iterable[int]:
        """The operands to which a gradient goes on from node i; `always`: where nothing can stop it."""
        op, args = self.nodes[i]
        if op in _FLAT or (always and op == "select"):
            return ()
        if always and op == "*":
            return [a for a, other in (args, args[::-1]) if not self.gates[other]]
        return args[1:] if op in ("select", "if") else args

    def below(self, start: int, always: bool, frontier: Callable[[int], bool] = lambda i: False) -> set[int]:
        """The nodes that a gradient reaches from `start`, down to a frontier."""
        found, stack = set(), [start]
        while stack:
            if (i := stack.pop()) not in found:
                found.add(i)
                stack += () if frontier(i) else self.slopes(i, always)
        return found


def _multiply(g: Graph, x: int, y: int) -> int:
    for one, other in ((x, y), (y, x)):
        if g.value(one) in (0, 1):
            return one if g.value(one) == 0 else other
        op, args = g.nodes[other]
        for factor, rest in (args, args[::-1]) if op == "*" and g.value(one) is not None else ():
            if g.value(factor) is not None:
                return g("*", g("*", one, factor), rest)
    return g.nodes[x].args[0] if x == y and g.nodes[x].op == "sqrt" else g.node("*", x, y)


def _reciprocal(g: Graph, x: int) -> int:
    op, (a, *_) = g.nodes[x]
    if g.is_square(x):  # so that 1/x^2 is the square of 1/x, which is likely to be there as well
        return g("square", g("recip", a))
    return a if op == "recip" else g.node("rsqrt", a) if op == "sqrt" else g.node("recip", x)


def _power(g: Graph, x: int, y: int) -> int:
    """Whole and half powers by multiplication, up to the 64th."""
    power = g.value(y)
    if g.value(x) in (0, 1):
        return x
    if power is None or abs(power) > 64 or 2 * power % 1:
        return g.node("^", x, y)
    if power < 0:
        x, power = (g("recip", g("sqrt", x)), -2 * power) if power % 1 else (g("recip", x), -power)
    whole = g.node("number", 1.0)
    for bit in f"{int(power):b}":
        whole = g("*", x, g("square", whole)) if bit == "1" else g("square", whole)
    if power % 1:  # at 0 the slope of sqrt(x) must not meet the 0 of the other factor
        return g("*", whole, g("sqrt", g.node("if", g.node("true", x), x) if power > 1 else x))
    return whole


_RULES: dict[str, Callable[..., int]] = {
    "+": lambda g, x, y: y if g.value(x) == 0 else x if g.value(y) == 0 else g.node("+", x, y),
    "-": lambda g, x, y: g.node("number", 0.0) if x == y else x if g.value(y) == 0 else g.node("-", x, y),
    "*": _multiply,
    "/": lambda g, x, y: g.node("number", 1.0) if x == y else g("*", x, g("recip", y)),
    "^": _power,
    "neg": lambda g, x: g("*", g.node("number", -1.0), x),
    "recip": _reciprocal,
    "sqrt": lambda g, x: g("abs", g.nodes[x].args[0]) if g.is_square(x) else g.node("sqrt", x),
    "square": lambda g, x: g("*", x, x),
    "cube": lambda g, x: g("*", x, g("*", x, x)),
    "sec": lambda g, x: g("recip", g("cos", x)),
    "csc": lambda g, x: g("recip", g("sin", x)),
    "cot": lambda g, x: g("recip", g("tan", x)),
    "min": lambda g, x, y: g("select", g("positive", g("-", y, x)), x, y),
    "max": lambda g, x, y: g("select", g("step", g("-", x, y)), x, y),
    "select": lambda g, c, x, y: g.node("select", c, x, y) if x != y and g.value(c) is None else x if g.value(c) else y,
}


def program_of(graph: Graph, root: int) -> tuple[tuple[int, Node], ...]:
    """The operations that compute `root`, each after its operands, with branches shielded."""
    g, new, outside = Graph(), [], set()
    always = graph.below(root, always=True)
    for i, (op, args) in enumerate(graph.nodes[: root + 1]):
        args = args if op in LEAVES else [new[a] for a in args]
        if op == "select":
            c, x, y = args
            both = outside | (g.below(x, always=True) & g.below(y, always=True))
            args = c, _shielded(g, "true", c, x, both), _shielded(g, "false", c, y, both)
        if op == "*":
            for n in (0, 1):
                for gate in sorted(g.gates[args[1 - n]]):
                    args[n] = _shielded(g, "true", gate, args[n], outside)
        new.append(g.node(op, *args))
        if i in always:
            outside.add(new[i])
    needed = {new[root]}
    for i in range(new[root], -1, -1):
        needed.update(g.nodes[i].args if i in needed and g.nodes[i].op not in LEAVES else ())
    return tuple((i, g.nodes[i]) for i in sorted(needed))


def _shielded(g: Graph, outcome: str, condition: int, x: int, shared: set[int]) -> int:
    """x, with gradient zero where the condition has the other outcome, however singular it is there.

    torch gives a branch that is not taken the gradient 0, and a singular slope inside of it makes that 0 * infinity =
    nan. So what only this branch needs is done on guarded operands, which drop what comes back for them from where the
    branch is not taken. Tame nodes do no damage, and `shared` ones are differentiated whether it is taken or not.
    """
    copies: dict[int, int] = {}
    for i in sorted(g.below(x, False, lambda i: g.tame[i] or i in shared)) if not g.tame[x] else ():
        op, args = g.nodes[i]
        if g.tame[i] or i in shared:
            copies[i] = i if op == "number" else g.node("if", g.node(outcome, condition), i)
        else:
            copies[i] = g.node(op, *(copies.get(a, a) for a in args))
    return copies.get(x, x)


class _Guard(torch.autograd.Function):
    """x itself, whose gradient is exactly zero where it is not wanted, even if it is infinite or nan there."""

    @staticmethod
    def forward(ctx: Any, wanted: Tensor, x: Tensor) -> Tensor:
        ctx.save_for_backward(wanted)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor]:
        return None, torch.where(ctx.saved_tensors[0], gradient, 0.0)


def _guarded(wanted: Tensor | float, x: Tensor | float) -> Tensor | float:
    if isinstance(wanted, Tensor) and isinstance(x, Tensor) and x.requires_grad:
        return _Guard.apply(*torch.broadcast_tensors(wanted, x))
    return x


def _selected(condition: Tensor | float, x: Tensor | float, y: Tensor | float) -> Tensor | float:
    if isinstance(condition, Tensor):
        return torch.where(condition != 0, _tensor(x, condition), y)
    return x if condition else y


def _tensor(value: Tensor | float, like: Any) -> Tensor:
    return value if isinstance(value, Tensor) else torch.full_like(like, value)


def apply(op: Any, args: list[Any]) -> Any:
    """The operation on tensors that may be mixed with numbers; a number if there are only numbers."""
    tensors = [a for a in args if isinstance(a, Tensor)]
    if callable(op):
        found = op(*(_tensor(a, tensors[0] if tensors else torch.zeros((), dtype=torch.float64)) for a in args))
        return found if tensors else float(found)
    if tensors:
        return _TENSORS[op](*args)
    with np.errstate(all="ignore"):
        return float(_NUMBERS[op](*(np.float64(a) for a in args)))


LEAVES = {"number", "variable"}
_FLAGS = {"step": operator.ge, "positive": operator.gt, "delta": operator.eq}
_FLAT = LEAVES | _FLAGS.keys() | {"true", "false", "floor", "ceil"}
_TAME = {"+", "-", "abs", "select", "sin", "cos", "tanh", "atan", "erf", "erfc", "if"}
_SAME = ("exp", "log", "sin", "cos", "tan", "asin", "acos", "atan", "sinh", "cosh", "tanh", "sqrt")
_EITHER = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "select": _selected,
    "true": lambda x: x != 0,
    "false": lambda x: x == 0,
    "if": _guarded,
}
_NUMBERS: dict[str, Callable[..., Any]] = {
    **_EITHER,
    **{name: getattr(np, name) for name in (*_SAME, "atan2", "abs", "floor", "ceil")},
    **{name: lambda x, holds=holds: holds(x, 0.0) for name, holds in _FLAGS.items()},
    "^": np.power,
    "recip": np.reciprocal,
    "erf": math.erf,
    "erfc": math.erfc,
    "rsqrt": lambda x: 1 / np.sqrt(x),
}
_TENSORS: dict[str, Callable[..., Any]] = {
    **_EITHER,
    **{name: getattr(torch, name) for name in (*_SAME, "erf", "erfc", "rsqrt")},
    **{name: lambda x, holds=holds: holds(x, 0.0).to(x.dtype) for name, holds in _FLAGS.items()},
    "^": torch.pow,
    "recip": torch.reciprocal,
    "atan2": lambda y, x: torch.atan2(_tensor(y, x), _tensor(x, y)),
    "abs": lambda x: x * torch.copysign(torch.ones_like(x), x.detach() + 0.0),  # slope 1 at 0, at -0 too
    "floor": lambda x: torch.floor(x.detach()),
    "ceil": lambda x: torch.ceil(x.detach()),
}
