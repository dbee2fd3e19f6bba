"""Small changes to Python source that a good test notices: each one edit of the text, so that all other lines stay."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass

COMPARISONS = {
    ast.Lt: ("<", "<="),
    ast.LtE: ("<=", "<"),
    ast.Gt: (">", ">="),
    ast.GtE: (">=", ">"),
    ast.Eq: ("==", "!="),
    ast.NotEq: ("!=", "=="),
    ast.Is: ("is", "is not"),
    ast.IsNot: ("is not", "is"),
    ast.In: ("in", "not in"),
    ast.NotIn: ("not in", "in"),
}
ARITHMETIC = {
    ast.Add: ("+", "-"),
    ast.Sub: ("-", "+"),
    ast.Mult: ("*", "/"),
    ast.Div: ("/", "*"),
    ast.FloorDiv: ("//", "*"),
    ast.Mod: ("%", "*"),
    ast.Pow: ("**", "*"),
    ast.BitOr: ("|", "&"),
    ast.BitAnd: ("&", "|"),
}
BOOLEAN = {ast.And: ("and", "or"), ast.Or: ("or", "and")}
SAYS_SOMETHING = re.compile(r"(_?log(ger)?|warnings)\.|print\(|super\(\).__init__\(\)")
"""Calls that only tell people something, or do nothing: not deleted."""


@dataclass(frozen=True)
class Mutant:
    """One edit: `source[start:stop]`, in bytes, becomes `new`."""

    file: str
    line: int
    start: int
    stop: int
    new: str
    what: str
    lines: tuple[int, int]
    """First and last line of the statement, or of the condition, around it; more for what imports run."""
    scope: tuple[int, int]
    """First and last line of the function around it, or of the file."""

    def apply(self, source: bytes) -> bytes:
        """Return the source with this edit."""
        return source[: self.start] + self.new.encode() + source[self.stop :]


class _Finder:
    def __init__(self, file: str, source: bytes, only: re.Pattern[str] | None) -> None:
        self.file, self.source, self.only = file, source, only
        self.starts = [0]
        for line in source.splitlines(keepends=True):
            self.starts.append(self.starts[-1] + len(line))
        self.found: list[Mutant] = []
        self.scope = self.all = (1, len(self.starts) - 1)
        self.lines = (0, 0)

    def _at(self, line: int, column: int) -> int:
        return self.starts[line - 1] + column

    def _span(self, node: ast.AST) -> tuple[int, int]:
        n: ast.expr = node  # type: ignore[assignment]
        return self._at(n.lineno, n.col_offset), self._at(n.end_lineno or 0, n.end_col_offset or 0)

    def _text(self, node: ast.AST) -> str:
        start, stop = self._span(node)
        return self.source[start:stop].decode()

    def _add(self, start: int, stop: int, new: str, what: str) -> None:
        line = sum(1 for s in self.starts if s <= start)
        first, last = self.all if self.scope == self.all else self.lines  # imports run it, in no test
        lines = (min(first, line), max(last, line))
        self.found.append(Mutant(self.file, line, start, stop, new, what, lines, self.scope))

    def _swap(self, left: ast.AST, right: ast.AST, old: str, new: str) -> None:
        """Replace the operator between two operands."""
        start, stop = self._span(left)[1], self._span(right)[0]
        between = re.sub(r"#.*", lambda m: " " * len(m[0].encode()), self.source[start:stop].decode())
        if (at := between.find(old)) >= 0:
            self._add(start + at, start + at + len(old), new, f"{old} -> {new}")

    def _replace(self, node: ast.AST, new: str, what: str | None = None) -> None:
        old = self._text(node)
        short = old if len(old) < 50 and "\n" not in old else old.split("\n")[0][:47] + "..."
        self._add(*self._span(node), new, what or f"{short} -> {new}")

    def body(self, statements: list[ast.stmt]) -> None:
        """Visit statements in turn."""
        for i, node in enumerate(statements):
            if not (i == 0 and isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)):
                self.statement(node)

    def statement(self, node: ast.stmt) -> None:
        """Find mutants of one statement, those inside it included."""
        if isinstance(node, (ast.Import, ast.ImportFrom, ast.Assert, ast.Global, ast.Nonlocal)):
            return
        if isinstance(node, ast.ClassDef):
            self.body(node.body)
            return
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            self._function(node)
            return
        self.lines = (node.lineno, node.end_lineno or node.lineno)
        match node:
            case ast.If() | ast.While():
                self.lines = (node.lineno, node.test.end_lineno or node.lineno)
                if "TYPE_CHECKING" in self._text(node.test):
                    return
                if isinstance(node, ast.If):
                    self._replace(node.test, "False", f"if {self._text(node.test)[:60]}: never")
                self.expression(node.test)
                self.body(node.body)
                self.body(node.orelse)
            case ast.For():
                self.lines = (node.lineno, node.iter.end_lineno or node.lineno)
                self.expression(node.iter)
                self.body(node.body)
                self.body(node.orelse)
            case ast.With():
                self.lines = (node.lineno, node.items[-1].context_expr.end_lineno or node.lineno)
                for item in node.items:
                    self.expression(item.context_expr)
                self.body(node.body)
            case ast.Try():
                self.body(node.body)
                for handler in node.handlers:
                    self.body(handler.body)
                self.body(node.orelse)
                self.body(node.finalbody)
            case ast.Match():
                for one in node.cases:
                    self.body(one.body)
            case ast.Raise():
                self._replace(node, "pass", f"dropped: {self._text(node).split(chr(10))[0][:60]}")
            case ast.Continue() | ast.Break():
                self._replace(node, "pass")
            case ast.Return(value=ast.expr() as value):
                if self._text(value) not in ("None", "NotImplemented"):
                    self._replace(value, "None", f"returns None, not {self._text(value).split(chr(10))[0][:50]}")
                self.expression(value)
            case ast.Expr(value=ast.Call() as call):
                if not SAYS_SOMETHING.match(self._text(call)):
                    self._replace(node, "pass", f"dropped: {self._text(node).split(chr(10))[0][:60]}")
                    self.expression(call)
            case ast.Assign():
                if not all(isinstance(t, (ast.Name, ast.Tuple)) for t in node.targets):
                    self._replace(node, "pass", f"dropped: {self._text(node).split(chr(10))[0][:60]}")
                if "__all__" not in self._text(node.targets[0]):
                    self.expression(node.value)
            case ast.AnnAssign(value=ast.expr() as value):
                self.expression(value)
            case ast.AugAssign():
                old = ARITHMETIC.get(type(node.op))
                self._replace(node, "pass", f"dropped: {self._text(node)[:60]}")
                if old:
                    self._swap(node.target, node.value, f"{old[0]}=", "=")
                    self._swap(node.target, node.value, f"{old[0]}=", f"{old[1]}=")
                self.expression(node.value)
            case ast.Expr(value=value):
                self.expression(value)

    def _function(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        decorators = " ".join(self._text(d) for d in node.decorator_list)
        if "jit" in decorators or "overload" in decorators or node.name in ("__repr__", "__str__"):
            return
        outer = self.scope
        if self.only and outer == self.all and not self.only.search(node.name):
            return
        self.scope = (node.lineno, node.end_lineno or node.lineno)
        for default in [*node.args.defaults, *node.args.kw_defaults]:
            if default is not None:
                self.lines = self.scope  # an import runs the default itself
                self.expression(default)
        self.body(node.body)
        self.scope = outer

    def expression(self, node: ast.AST) -> None:
        """Find mutants of one expression, those inside it included."""
        match node:
            case ast.JoinedStr() | ast.Lambda(body=ast.Constant()):
                return
            case ast.Compare():
                for left, op, right in zip([node.left, *node.comparators], node.ops, node.comparators, strict=False):
                    self._swap(left, right, *COMPARISONS[type(op)])
            case ast.BinOp():
                texts = [n for n in ast.walk(node) if isinstance(n, ast.JoinedStr) or _is_text(n)]
                if type(node.op) in ARITHMETIC and not texts:
                    self._swap(node.left, node.right, *ARITHMETIC[type(node.op)])
            case ast.BoolOp():
                self._swap(node.values[0], node.values[1], *BOOLEAN[type(node.op)])
            case ast.UnaryOp(op=ast.Not()):
                self._replace(node, f"({self._text(node.operand)})")
            case ast.UnaryOp(op=ast.USub()):
                self._replace(node, f"+({self._text(node.operand)})")
            case ast.IfExp():
                self._replace(node.test, "False")
                self._replace(node.test, "True")
            case ast.Constant(value=bool() as value):
                self._replace(node, str(not value))
            case ast.Constant(value=int() | float() as value):
                self._replace(node, repr(value + 1))
                if value >= 1:
                    self._replace(node, repr(value - 1))
        for child in ast.iter_child_nodes(node):
            self.expression(child)


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, (str, bytes))


def mutants(file: str, source: bytes, only: str | None = None) -> Iterator[Mutant]:
    """Yield all mutants of a file that are Python still; `only` is a pattern of the top-level functions to take."""
    finder = _Finder(file, source, re.compile(only) if only else None)
    for node in ast.parse(source).body:
        if not only or isinstance(node, ast.FunctionDef):
            finder.body([node])
    for mutant in finder.found:
        try:
            ast.parse(mutant.apply(source))
        except SyntaxError:
            continue
        yield mutant
