"""What a function refuses, read from its `raise` statements: the reference cannot forget one.

The raises of helpers that check arguments count too, with what is known at their call: `check_int("n", n, 1)`
is `n: ...; allowed: >= 1` to the reader. What only a run knows becomes `...`.
"""

from __future__ import annotations

import ast
import builtins
import inspect
import math
import re
import sys
import textwrap
from collections.abc import Iterable, Iterator
from functools import cache
from types import FunctionType

TIDY = (
    (r"\.\.\.(?:\.\.\.|`\w+`)+", "..."),
    (r",? \(\.\.\.\)|, got [^;:]*$|(?<!llowed): \.\.\.$", ""),  # what was given, at the end
    (r"^\.\.\.(?:: | (?=\w+: ))", ""),  # where, at the beginning
    (r"(?<=[^\s(])`(\w+)`|`(\w+)`(?=\w)", r"\1\2"),  # markup needs space around it
)
DEPTH = 4  # helpers called by helpers
LINES = 4  # errors spelled out; of the others only what they are about is said
WIDTH = 150  # characters of a message
CHECKS = re.compile(r"_[a-z]|check_|(finite|as_space|__init__)$")  # functions whose errors are their caller's
CALM = ("NotImplementedError", "StopIteration", "KeyboardInterrupt")  # nobody's bad input
PURE = {f.__name__: f for f in (bool, callable, dict, hasattr, int, isinstance, len, list, map, max, min, range, repr, set, sorted, str, tuple)}
UNKNOWN = object()  # a value that only a run knows


class Given(str):
    "The name of a parameter of the documented function, in place of its value."


def raises(obj) -> list[tuple[str, str]]:
    "Type and text of the errors of a function, a method or a class's constructor."
    ours = [f for f in _sources(obj) if _package(f) == _package(obj)]
    found = _grouped(dict.fromkeys(e for f in ours for e in _errors(f, _owner(obj), None, DEPTH)))
    shown, left = found[:LINES], found[LINES:]
    for kind in dict.fromkeys(kind for kind, _ in left):
        texts = [text for k, text in left if k == kind]
        about = dict.fromkeys(name for text in texts for name in _about(text))
        shown += [(kind, f"also about {', '.join(about)}" if about else texts[0])]
    return shown


def _sources(obj) -> list:
    "The functions that run: a dataclass checks its fields after the `__init__` that Python wrote."
    return [getattr(obj, name, None) for name in ("__init__", "__post_init__")] if isinstance(obj, type) else [obj]


def _owner(obj) -> type | None:
    if isinstance(obj, type):
        return obj
    found = sys.modules.get(getattr(obj, "__module__", None))
    for part in getattr(obj, "__qualname__", "").split(".")[:-1]:
        found = getattr(found, part, None)
    return found if isinstance(found, type) else None


def _about(text: str) -> list[str]:
    "The arguments that a message names first."
    found = re.match(r"`?[a-z_]\w*`?(?:, `?[a-z_]\w*`?)*(?=: | must | needs )", text)
    return [f"`{name.strip('`')}`" for name in found[0].split(", ")] if found else []


def _grouped(found: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    "One text for each argument, and one for all arguments of which the same is said."
    said: dict[tuple[str, str, str], list[str]] = {}
    for kind, text in found:
        match = re.fullmatch(r"(\w+)(: \.\.\.;? [Aa]llowed: | must )(.+)", text)
        name, verb, what = match.groups() if match else (text, "", "")
        said.setdefault((kind, name, verb.replace(" Allowed", "; allowed")), []).append(what)
    groups: dict[tuple[str, str, str], list[str]] = {}
    for (kind, name, verb), what in said.items():
        rest = verb + (" and " if verb == " must " else ", ").join(what)
        groups.setdefault((kind, rest, "" if rest else name), []).append(name)
    return [(kind, ", ".join(names) + rest) for (kind, rest, _), names in groups.items()]


@cache
def _tree(function) -> ast.FunctionDef | None:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    except (OSError, TypeError, SyntaxError):  # not written in Python, or by a decorator
        return None
    return tree if isinstance(tree, ast.FunctionDef) else None


def _errors(function, owner, known: dict[str, object] | None, depth: int) -> Iterator[tuple[str, str]]:
    "What a function raises when it is called with the `known` values; None: by a reader, with any."
    function = inspect.unwrap(function) if callable(function) else None
    tree = _tree(function) if isinstance(function, FunctionType) else None
    if tree is None:
        return
    body = tree.body[ast.get_docstring(tree) is not None :]
    if not body or isinstance(body[0], ast.Raise):  # nothing, or left to subclasses
        return
    known = {p: Given(p) for p in _defaults(tree)} if known is None else known
    scope = {k: v for k, v in function.__globals__.items() if k.isupper() or v is math} | known
    yield from _Walk(function, owner, depth).block(body, scope)


class _Walk:
    "Through the statements of one function, in their order."

    def __init__(self, function, owner, depth):
        self.function, self.owner, self.depth = function, owner, depth

    def block(self, nodes, scope) -> Iterator[tuple[str, str]]:
        for node in nodes:
            yield from self.node(node, scope)

    def node(self, node, scope) -> Iterator[tuple[str, str]]:
        kind = type(node)
        if kind is ast.Raise:
            yield from self.error(node.exc, scope)
        elif kind in (ast.If, ast.IfExp):
            yield from self.branches(node, scope)
        elif kind is ast.For or hasattr(node, "generators"):
            yield from self.loop(node, scope)
        elif kind is ast.Try:
            caught = {n.id for h in node.handlers for n in ast.walk(h.type or ast.Name("Exception")) if isinstance(n, ast.Name)}
            inside = self.block(node.body, scope)
            yield from (e for e in inside if e[0] not in caught and "Exception" not in caught)
            yield from self.block([*node.handlers, *node.orelse, *node.finalbody], scope)
        else:
            yield from self.block(ast.iter_child_nodes(node), scope)
            if kind is ast.Call and self.depth:
                yield from self.helper(node, scope)
            if kind is ast.Assign and isinstance(node.targets[0], ast.Name):
                scope[node.targets[0].id] = value(node.value, scope)
            else:
                scope |= dict.fromkeys(_bound(node), UNKNOWN)

    def error(self, call, scope) -> Iterator[tuple[str, str]]:
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.args:
            name, text = call.func.id, message(call.args[0], scope)
            made = self.function.__globals__.get(name, getattr(builtins, name, None))
            if text and isinstance(made, type) and issubclass(made, Exception) and name not in CALM and name[0] != "_":
                yield name, text

    def branches(self, node, scope) -> Iterator[tuple[str, str]]:
        yield from self.node(node.test, scope)
        true = truth(node.test, scope)
        for part, dead in ((node.body, true is False), (node.orelse, true is True)):
            part = part if isinstance(part, list) else [part]
            if not dead:
                yield from self.block(part, dict(scope))
                scope |= dict.fromkeys((n for p in part for n in _bound(p)), UNKNOWN)

    def loop(self, node, scope) -> Iterator[tuple[str, str]]:
        "A loop over a literal is run: `for name, v in ((\"lr\", lr), (\"eps\", eps))` names two arguments."
        first = node if isinstance(node, ast.For) else node.generators[0]
        body = node.body if first is node else [c for c in ast.iter_child_nodes(node) if c is not first] + first.ifs
        yield from self.node(first.iter, scope)
        literal = isinstance(first.iter, ast.Tuple | ast.List)
        for item in first.iter.elts if literal else [None]:
            yield from self.block(body, scope | _unpacked(first.target, item, scope))
        scope |= dict.fromkeys(_bound(node), UNKNOWN)

    def helper(self, call, scope) -> Iterator[tuple[str, str]]:
        "The errors of a function that this one has check its arguments."
        callee, bound = self.callee(call.func)
        callee = inspect.unwrap(callee) if callable(callee) else None
        ours = isinstance(callee, FunctionType) and CHECKS.match(callee.__name__)
        if ours and (tree := _tree(callee)):
            known = _arguments(tree, call, scope, bound)
            yield from _errors(callee, self.owner if bound else None, known, self.depth - 1)

    def callee(self, func):
        "The function that is called, and whether it is a method of `self`."
        if isinstance(func, ast.Name):
            found = self.function.__globals__.get(func.id)
            return (found, False) if _package(found) == _package(self.function) else (None, False)
        if not isinstance(func, ast.Attribute) or self.owner is None:
            return None, False
        on, places = func.value, self.owner.__mro__
        if isinstance(on, ast.Call) and isinstance(on.func, ast.Name) and on.func.id == "super":
            here = [i for i, c in enumerate(places) if inspect.unwrap(vars(c).get(self.function.__name__, c)) is self.function]
            places = places[here[0] + 1 :] if here else ()
        elif not (isinstance(on, ast.Name) and on.id in ("self", "cls")):
            return None, False
        found = next((vars(c)[func.attr] for c in places if func.attr in vars(c)), None)
        found, bound = getattr(found, "__func__", found), not isinstance(found, staticmethod)
        return (found, bound) if _package(found) == _package(self.function) else (None, False)


def _package(obj) -> str:
    return (getattr(obj, "__module__", None) or "").partition(".")[0]


def _bound(node) -> set[str]:
    return {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}


def _unpacked(target, item, scope) -> dict[str, object]:
    "The names of a loop's target, with what one element says of them."
    if isinstance(target, ast.Name):
        return {target.id: UNKNOWN if item is None else value(item, scope)}
    if not isinstance(target, ast.Tuple | ast.List):  # `*rest`, `d[k]`
        return dict.fromkeys(_bound(target), UNKNOWN)
    fits = isinstance(item, ast.Tuple | ast.List) and len(item.elts) == len(target.elts)
    items = item.elts if fits else [None] * len(target.elts)
    return {k: v for t, i in zip(target.elts, items) for k, v in _unpacked(t, i, scope).items()}


def _defaults(tree) -> dict[str, object]:
    "The parameters of a function; from its source, as Sphinx puts texts in place of what `inspect` says."
    a = tree.args
    at = [p.arg for p in (*a.posonlyargs, *a.args)]
    found = dict.fromkeys([*at, *(p.arg for p in a.kwonlyargs)], UNKNOWN)
    found |= {k: value(v, {}) for k, v in zip(at[len(at) - len(a.defaults) :], a.defaults)}
    return found | {p.arg: value(v, {}) for p, v in zip(a.kwonlyargs, a.kw_defaults) if v}


def _arguments(tree, call, scope, bound) -> dict[str, object]:
    "What a call says of a function's parameters."
    known = _defaults(tree)
    if any(isinstance(a, ast.Starred) for a in call.args) or any(k.arg is None for k in call.keywords):
        known = dict.fromkeys(known, UNKNOWN)
    else:
        known |= {p: _argument(a, scope) for p, a in zip([*known][bound:], call.args)}
    return known | {k.arg: _argument(k.value, scope) for k in call.keywords if k.arg in known}


def _argument(node, scope):
    if isinstance(node, ast.Name) and isinstance(scope.get(node.id), Given):
        return scope[node.id]
    return _text(node, scope) if isinstance(node, ast.JoinedStr) else value(node, scope)


def value(node, scope):
    "What an expression is, when all it needs is known."
    names = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)} - _bound(node)
    if any(n not in PURE and (n not in scope or scope[n] is UNKNOWN or isinstance(scope[n], Given)) for n in names):
        return UNKNOWN
    try:
        return eval(compile(ast.Expression(node), "<raise>", "eval"), {**scope, "__builtins__": PURE})
    except Exception:  # a function beyond PURE, or a value that does not fit
        return UNKNOWN


def truth(test, scope) -> bool | None:
    "Whether a condition holds; None: only a run knows."
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        inner = truth(test.operand, scope)
        return None if inner is None else not inner
    if isinstance(test, ast.BoolOp):
        parts = [truth(v, scope) for v in test.values]
        settles = isinstance(test.op, ast.Or)  # one True settles an `or`, one False an `and`
        return settles if settles in parts else None if None in parts else not settles
    found = value(test, scope)
    return None if found is UNKNOWN else bool(found)


def message(node, scope) -> str:
    "The text of an error as far as it is known, `` where it is put together elsewhere."
    text = " ".join(_text(node, scope).split())
    for pattern, new in TIDY:
        text = re.sub(pattern, new, text)
    return "" if text == "..." else textwrap.shorten(text, WIDTH, placeholder=" ...")


def _text(node, scope) -> str:
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(part, scope) for part in node.values)
    if isinstance(node, ast.BinOp):
        return _text(node.left, scope) + _text(node.right, scope)
    inner = node.value if isinstance(node, ast.FormattedValue) else node
    conversion = getattr(node, "conversion", -1)
    found = value(inner, scope)
    if found is not UNKNOWN:
        return repr(found) if conversion == ord("r") else str(found)
    if conversion >= 0:
        return "..."
    if isinstance(inner, ast.Attribute) and isinstance(inner.value, ast.Name) and inner.value.id == "self":
        return "..." if inner.attr[0] == "_" else f"`{inner.attr}`"
    given = scope.get(inner.id) if isinstance(inner, ast.Name) else None
    return f"`{given}`" if isinstance(given, Given) else "..."
