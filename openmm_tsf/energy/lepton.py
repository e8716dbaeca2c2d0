"""OpenMM's custom expressions (the Lepton language) as batched, differentiable torch functions.

    energy = parse("0.5*k*(r-r0)^2; r0 = 0.1")
    energy({"k": 2000.0, "r": distances})

Powers group from the right and bind tighter than a sign (`-2^2` is -4); there is no unary plus and no space before the
parenthesis of a call. Definitions follow after semicolons: one sees those to its right, and of two with the same name
the nearest; elsewhere the name is free. So there are no circles: `r; r = r + 1` is r + 1 of the variable r.

Values and derivatives are OpenMM's, at ties and zeros too: step(0) = 1, abs has slope 1 at 0, max(a, b) follows a and
min(a, b) follows b where they are equal, `x/x` is 1, `0*x` is 0 and `sqrt(x^2)` is abs(x), whatever x. The gradient of
what `select`, `min` and `max` do not take, or `step` and `delta` multiply by 0, is zero however singular (graph.py).

Source: OpenMM User Guide, "Writing Custom Expressions"; odd cases were measured with OpenMM 8.6 (tests/test_lepton.py).
"""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from openmm_tsf.energy.graph import LEAVES, Graph, Node, apply, program_of

_UNARY = "sqrt exp log sin cos sec csc tan cot asin acos atan sinh cosh tanh erf erfc step delta square cube recip abs"
FUNCTIONS = dict.fromkeys([*_UNARY.split(), "floor", "ceil"], 1) | {"atan2": 2, "min": 2, "max": 2, "select": 3}
"""Every function of the language, with its number of arguments."""

_BINDING = {"+": 0, "-": 0, "*": 1, "/": 1, "^": 3}
_SIGN = 2  # tighter than *, looser than ^
_NAME = r"[^\s\d.+\-*/^(),;=][^\s+\-*/^(),;=]*"
_TOKEN = re.compile(rf"(?P<number>(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?)|(?P<name>{_NAME})|(?P<symbol>\S)", re.ASCII)


class ExpressionError(ValueError):
    """An expression that cannot be used: the message quotes it, says where and why, and what would do."""


@dataclass(frozen=True)
class Expression:
    """A parsed expression; call it with the values of its variables.

    Attributes:
        text: what was parsed.
        variables: the names that need a value. What cancels (`0*x`) or stands in an unused definition needs none.
        program: the operations with their numbers, in the order in which they are done.
    """

    text: str
    variables: frozenset[str]
    program: tuple[tuple[int, Node], ...] = field(repr=False)

    def __call__(self, values: Mapping[str, Tensor | float]) -> Tensor | float:
        """Evaluate, differentiably.

        Args:
            values: for every variable a number, or a tensor that broadcasts against the others; others are ignored.

        Returns:
            A tensor, broadcast from the tensors that it depends on; a number if it depends on none.

        Raises:
            ExpressionError: a variable has no value.
        """
        if missing := self.variables - values.keys():
            raise ExpressionError(f"{self.text!r} needs a value for {', '.join(sorted(missing))}")
        results: dict[int, Any] = {}
        for i, (op, args) in self.program:
            operands = [] if op in LEAVES else [results[a] for a in args]
            results[i] = apply(op, operands) if operands else args[0] if op == "number" else values[args[0]]
        return results[i]


def parse(text: str, functions: Mapping[str, Callable[..., Tensor]] | None = None) -> Expression:
    """Read an expression.

    Args:
        text: as OpenMM takes it, definitions of intermediate quantities included.
        functions: the force's tabulated functions by name, in torch.

    Raises:
        ExpressionError: the text is not in the language, or calls what has no batched form.
    """
    parser = _Parser(text, dict(functions or {}))
    first, *definitions = text.split(";")
    try:
        for definition in reversed([d for d in definitions if d.strip()]):
            name, _, right = definition.partition("=")
            if not re.fullmatch(_NAME, name.strip(), re.ASCII):
                raise ExpressionError(f"{text!r}: 'name = expression' must follow ';', not {definition.strip()!r}")
            parser.names[name.strip()] = parser.read(right)
        program = program_of(parser.graph, parser.read(first))
    except RecursionError:
        raise ExpressionError(f"{text[:60]!r}... nests parentheses or signs too deeply") from None
    return Expression(text, frozenset(args[0] for _, (op, args) in program if op == "variable"), program)


class _Parser:
    """Precedence climbing over the tokens of the parts of an expression, which semicolons separate."""

    def __init__(self, text: str, tables: dict[str, Any]) -> None:
        self.text, self.tables, self.graph, self.names = text, tables, Graph(), {}

    def read(self, part: str) -> int:
        self.part, self.at = part, 0
        self.tokens = [*((m.lastgroup, m[0], m.start()) for m in _TOKEN.finditer(part)), ("end", "", len(part))]
        node = self.expression(0)
        self.expect("", "an operator or the end")
        return node

    def expression(self, binding: int) -> int:
        """Operands joined by operators that bind at least as tightly as `binding`."""
        left = self.operand()
        while _BINDING.get(symbol := self.tokens[self.at][1], -1) >= binding:
            self.at += 1
            left = self.graph(symbol, left, self.expression(_BINDING[symbol] + (symbol != "^")))
        return left

    def operand(self) -> int:
        kind, token, start = self.tokens[self.at]
        if kind not in ("number", "name") and token not in ("-", "("):
            raise self.error(self.at, "a number, a name, '-' or '(' is expected")
        self.at += 1
        if kind == "number":
            return self.graph.node("number", min(float(token), sys.float_info.max))
        if token == "-":
            return self.graph("neg", self.expression(_SIGN))
        if token == "(":
            inside = self.expression(0)
            self.expect(")", "unbalanced parentheses: ')'")
            return inside
        if self.tokens[self.at][1:] == ("(", start + len(token)):  # nothing in between, or it is not a call
            return self.call(token)
        return self.names[token] if token in self.names else self.graph.node("variable", token)

    def call(self, name: str) -> int:
        at, args = self.at - 1, []
        while not args or self.tokens[self.at][1] == ",":
            self.at += 1
            args.append(self.expression(0))
        self.expect(")", "unbalanced parentheses: ',' or ')'")
        if name in self.tables:
            return self.graph.node(self.tables[name], *args)
        if name == "periodicdistance":
            raise self.error(at, "periodic boxes have no batched form; use OpenMMEnergy")
        if name not in FUNCTIONS:
            near = "".join(f"did you mean {f}? " for f in difflib.get_close_matches(name, FUNCTIONS, 1))
            raise self.error(at, f"unknown function; {near}known are {', '.join(FUNCTIONS)}")
        if len(args) != FUNCTIONS[name]:
            raise self.error(at, f"{FUNCTIONS[name]} argument(s) are expected, not {len(args)}")
        return self.graph(name, *args)

    def expect(self, token: str, what: str) -> None:
        if self.tokens[self.at][1] != token:
            raise self.error(self.at, f"{what} is expected")
        self.at += 1

    def error(self, at: int, what: str) -> ExpressionError:
        _, token, start = self.tokens[at]
        place = f"{token!r} at character {start + 1}" if token else "the end"
        return ExpressionError(f"{self.text!r}: {place} of {self.part!r}: {what}")
