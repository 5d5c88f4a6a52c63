"""What the forward of a module does, read from its source: calls of submodules, sums, products.

In short text, such as "input_layernorm self_attn + post_attention_layernorm mlp +": these *steps*,
one after the other, each on what the one before it gave. A sum adds what the last sum gave, at
first the input.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from typing import NamedTuple

from torch import nn

INPUT = "x"


class Forward(NamedTuple):
    """steps: calls of submodules, "+" and "*", in order. result: what is returned, as an expression
    of calls and operations on x, the forward's first argument; None: something else as well.
    passed: the names of the forward's other arguments that each submodule is given, by keyword."""

    steps: tuple[str, ...]
    result: str | None
    passed: dict[str, tuple[str, ...]]


_READ: dict[type, Forward] = {}


def read(cls: type[nn.Module]) -> Forward:
    """Of the forward of a float class, whose source is read once."""
    if cls not in _READ:
        _READ[cls] = _read(cls)
    return _READ[cls]


def source_of(cls: type[nn.Module]) -> ast.FunctionDef | None:
    """The forward of a float class; None: it has no source, or not that of one function of self and
    an argument."""
    try:
        source = textwrap.dedent(inspect.getsource(inspect.unwrap(cls.forward)))
        function = ast.parse(source).body[0]
    except (OSError, TypeError, SyntaxError):
        return None
    if not isinstance(function, ast.FunctionDef) or len(function.args.args) < 2:
        return None
    return function


def _read(cls: type[nn.Module]) -> Forward:
    function = source_of(cls)
    if function is None:
        return Forward((), None, {})
    reader = _Reader(function)
    return Forward(tuple(reader.steps), reader.result, reader.passed)


def readers(cls: type[nn.Module]) -> frozenset[str]:
    """The submodules that a forward hands its first argument to as it came; empty where it does
    anything else with it than to look at its shape, dtype or device, or cannot be read."""
    if cls not in _READERS:
        _READERS[cls] = _find_readers(cls)
    return _READERS[cls]


_READERS: dict[type, frozenset[str]] = {}


def _find_readers(cls: type[nn.Module]) -> frozenset[str]:
    function = source_of(cls)
    if function is None:
        return frozenset()
    first = function.args.args[1].arg
    calls, looks, names = set(), set(), set()
    for node in ast.walk(function):
        if isinstance(node, ast.Name) and node.id == first:
            names.add(node)
        elif isinstance(node, ast.Attribute) and node.attr in ("shape", "dtype", "device"):
            looks.add(node.value)
        elif isinstance(node, ast.Call) and len(node.args) == 1 and not node.keywords:
            called = node.func
            if isinstance(called, ast.Attribute) and ast.unparse(called.value) == "self":
                calls.add((called.attr, node.args[0]))
    given = {x for _, x in calls}
    if any(isinstance(x.ctx, ast.Store) or x not in given | looks for x in names):
        return frozenset()
    return frozenset(name for name, x in calls if x in names)


def sum_of(a: str, b: str) -> str:
    return "({} + {})".format(*sorted((a, b)))


def product_of(a: str, b: str) -> str:
    return "({} * {})".format(*sorted((a, b)))


def call_of(name: str, x: str) -> str:
    return f"{name}({x})"


def chained(steps: tuple[str, ...]) -> str | None:
    """The expression that these steps compute one after the other; None: not steps of a chain."""
    x = last = INPUT
    for step in steps:
        if step == "*":
            return None
        x = sum_of(last, x) if step == "+" else call_of(step, x)
        last = x if step == "+" else last
    return x


class _Reader:
    """Follows a forward once through its statements."""

    def __init__(self, function: ast.FunctionDef):
        self.steps: list[str] = []
        self.passed: dict[str, tuple[str, ...]] = {}
        self.result: str | None = None
        arguments = function.args
        _, first, *others = (a.arg for a in (*arguments.posonlyargs, *arguments.args))
        self._others = {*others, *(a.arg for a in arguments.kwonlyargs)}
        self._first = first
        self._values: dict[str, str | None] = {first: INPUT}  # None: unknown
        self._known = True
        for statement in function.body:
            self._follow(statement)
        if not self._known:
            self.result = None

    def _follow(self, statement: ast.stmt) -> None:
        if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
            return  # the docstring
        if isinstance(statement, ast.Return) and statement.value is not None:
            self.result = self._value(statement.value)
        elif isinstance(statement, ast.Assign) and len(statement.targets) == 1:
            self._assign(statement.targets[0], self._value(statement.value))
        else:
            self._known = False
            for node in ast.iter_child_nodes(statement):
                if isinstance(node, ast.stmt):
                    self._follow(node)
                else:
                    self._value(node)

    def _assign(self, target: ast.expr, value: str | None) -> None:
        if isinstance(target, ast.Name):
            self._values[target.id] = value
        elif isinstance(target, ast.Tuple) and all(isinstance(t, ast.Name) for t in target.elts):
            for i, name in enumerate(target.elts):
                assert isinstance(name, ast.Name)
                self._values[name.id] = None if value is None else f"{value}[{i}]"
        else:
            self._known = False

    def _value(self, node: ast.AST) -> str | None:
        """The expression that a node is; None: something else."""
        if isinstance(node, ast.Name):
            return self._values.get(node.id)
        if isinstance(node, ast.Call):
            return self._call(node)
        if isinstance(node, ast.BinOp) and isinstance(node.op, (ast.Add, ast.Mult)):
            a, b = self._value(node.left), self._value(node.right)
            add = isinstance(node.op, ast.Add)
            # A number is no part of what flows.
            if not isinstance(node.left, ast.Constant) and not isinstance(node.right, ast.Constant):
                self.steps.append("+" if add else "*")
            if not a or not b:
                return None
            return sum_of(a, b) if add else product_of(a, b)
        if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
            value = self._value(node.value)
            return None if value is None else f"{value}[{node.slice.value!r}]"
        for child in ast.iter_child_nodes(node):
            self._value(child)
        return None

    def _call(self, node: ast.Call) -> str | None:
        function = node.func
        given = [self._value(a) for a in node.args]
        named = {k.arg: self._value(k.value) for k in node.keywords}
        if not isinstance(function, ast.Attribute):
            return None
        if isinstance(function.value, ast.Name) and function.value.id == "self":
            name = function.attr
            self.steps.append(name)
            x = given.pop(0) if given else named.get(self._first)
            if x is None or given:
                return None
            keywords = [k for k in node.keywords if node.args or k.arg != self._first]
            if any(
                k.arg is not None and (ast.unparse(k.value) != k.arg or k.arg not in self._others)
                for k in keywords
            ):
                return None
            if keywords:
                self.passed[name] = tuple(k.arg for k in keywords if k.arg is not None)
            return call_of(name, x)
        value = self._value(function.value)
        halves = function.attr == "chunk" and [ast.unparse(a) for a in node.args] == ["2"]
        if halves and [ast.unparse(k) for k in node.keywords] == ["dim=-1"]:
            return value
        return None
