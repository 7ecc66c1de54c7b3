"""The mistakes that `mutants.py` makes on purpose. Each changes one place in one file."""

import ast
import copy
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import cast

PACKAGE = Path(__file__).resolve().parent.parent / "flowmatch_mnist"
FILES = [".".join(path.relative_to(PACKAGE).with_suffix("").parts) for path in sorted(PACKAGE.rglob("*.py"))]
FILES = [file for file in FILES if not file.endswith("__init__")]
EQUIVALENT: dict[str, str] = json.loads(Path(__file__).with_name("equivalent.json").read_text())
"""Mutants that are no mistake: the reason by the mutant's key. They are not tested."""
ALIKE = [
    ("alpha", "sigma"),
    ("alpha_dot", "sigma_dot"),
    ("x0", "x1"),
    ("eval", "train"),
    ("min", "max"),
    ("floor", "ceil"),
    ("global_step", "current_epoch"),
    ("every_n_steps", "every_n_epochs"),
]
"""Names that are easily confused."""
SWAPPED = {one: other for pair in ALIKE for one, other in (pair, pair[::-1])}
SPLITS = {"train": "test", "val": "train", "test": "train"}
"""Names of splits, as strings, and the split to use instead."""
SYMMETRIC = {"min", "max", "gcd"}
"""Functions for which the order of the arguments does not matter."""
STREAMS = {"seed", "generator", "share", "uniform", "normal"}
"""Functions that derive random numbers from all of their arguments."""
COMPARED = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
UNSEEN = {"help", "metavar", "strict", "flush", "encoding", "color", "linewidth", "s"}
"""Keyword arguments that only change the appearance, or check a fact that is always true."""
PARSED = "options = parser.parse_args()"
"""The statement that reads a command line."""
LEFT_ALONE = (ast.Raise, ast.Assert, ast.Import, ast.ImportFrom, ast.JoinedStr, ast.arguments)
"""Nodes without mutants: the words of errors, and parts for the type checker."""


@dataclass(frozen=True)
class Mutant:
    """One mistake in a file: its first and last line, its description, and the source of the whole file with it."""

    file: str
    line: int
    end: int
    what: str
    source: str

    @property
    def key(self) -> str:
        """Return the name that distinguishes the mutant from others, independent of its line number."""
        return f"{self.file}: {self.what}"


def name_of(function: ast.expr) -> str:
    """Return the last part of the called function's name."""
    return function.attr if isinstance(function, ast.Attribute) else function.id if isinstance(function, ast.Name) else ""


def changes(node: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    """Yield each change of a node, as its description and the new node."""
    match node:
        case ast.BinOp(left, ast.Add(), right):
            yield "sign flipped", ast.BinOp(left, ast.Sub(), right)
        case ast.BinOp(left, ast.Sub(), right):
            yield "sign flipped", ast.BinOp(left, ast.Add(), right)
        case ast.UnaryOp(ast.USub(), operand):
            yield "sign dropped", operand
        case ast.BinOp(left, ast.Mult(), right):
            yield "left factor dropped", right
            yield "right factor dropped", left
        case ast.BinOp(left, ast.Div() | ast.FloorDiv() | ast.Mod(), _):
            yield "divisor dropped", left
        case ast.BinOp(left, ast.Pow(), _):
            yield "exponent dropped", left
        case ast.Name(name, ast.Load()) if name in SWAPPED:
            yield f"{name} swapped", ast.Name(SWAPPED[name], ast.Load())
        case ast.Attribute(value, name, ast.Load()) if name in SWAPPED:
            yield f"{name} swapped", ast.Attribute(value, SWAPPED[name], ast.Load())
        case ast.Compare(left, [operator], right):
            yield "comparison changed", ast.Compare(left, [COMPARED[type(operator)]()], right)
        case ast.BoolOp(operator, values):
            yield "and, or changed", ast.BoolOp(ast.Or() if isinstance(operator, ast.And) else ast.And(), values)
        case ast.UnaryOp(ast.Not(), operand):
            yield "not dropped", operand
        case ast.IfExp(_, body, otherwise):
            yield "always the first", body
            yield "always the second", otherwise
        case ast.Constant(bool(value)):
            yield "the opposite", ast.Constant(not value)
        case ast.Constant(int(value)):
            yield "off by one", ast.Constant(value + 1)
        case ast.Constant(float(value)):
            yield "doubled" if value else "one more", ast.Constant(2 * value or 1.0)
        case ast.Constant(str(value)) if value in SPLITS:
            yield "another split", ast.Constant(SPLITS[value])
        case ast.Dict(keys, values) if len(values) > 1 and not any(isinstance(value, ast.Constant) for value in values):
            yield "the first two swapped", ast.Dict(keys, [values[1], values[0], *values[2:]])
        case ast.Call(function, arguments, keywords):
            for keyword in keywords:
                if keyword.arg is not None and keyword.arg not in UNSEEN:
                    others = [other for other in keywords if other is not keyword]
                    yield f"{keyword.arg} not handed on", ast.Call(function, arguments, others)
            for i, (one, other) in enumerate(pairwise(arguments)):
                named = isinstance(one, ast.Name | ast.Attribute) and isinstance(other, ast.Name | ast.Attribute)
                if named and ast.dump(one) != ast.dump(other) and name_of(function) not in SYMMETRIC:
                    swapped = [*arguments[:i], other, one, *arguments[i + 2 :]]
                    yield f"arguments {i + 1} and {i + 2} swapped", ast.Call(function, swapped, keywords)
            if name_of(function) in STREAMS:
                for i in range(len(arguments)):
                    yield f"argument {i + 1} dropped", ast.Call(function, arguments[:i] + arguments[i + 1 :], keywords)
        case ast.Expr(ast.Call()) | ast.AugAssign():
            yield "left out", ast.Pass()
        case ast.With([ast.withitem(_, None)], body):
            yield "context left out", ast.If(ast.Constant(True), body, [])
        case ast.FunctionDef():
            yield from changed_functions(node)
        case ast.ClassDef(decorator_list=[_, *_]):
            yield from changed_fields(node)


def changed_functions(function: ast.FunctionDef) -> Iterator[tuple[str, ast.AST]]:
    """Yield versions of a function that ignore an argument or option (and use its default), or lack a gradient decorator."""
    arguments = function.args
    positional = [*arguments.posonlyargs, *arguments.args]
    pairs = list(zip(positional[len(positional) - len(arguments.defaults) :], arguments.defaults, strict=True))
    pairs += [(a, d) for a, d in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True) if d is not None]
    start = 1 if ast.get_docstring(function) else 0
    for argument, default in pairs:
        changed = copy.copy(function)
        taken = ast.Assign([ast.Name(argument.arg, ast.Store())], default)
        changed.body = [*function.body[:start], taken, *function.body[start:]]
        yield f"argument {argument.arg} ignored", changed
    for i, statement in enumerate(function.body):
        if ast.unparse(statement) == PARSED:
            for option in options_of(function):
                changed = copy.copy(function)
                name = option[2:].replace("-", "_")
                taken = ast.parse(f"options.{name} = parser.get_default({name!r})")
                changed.body = [*function.body[: i + 1], *taken.body, *function.body[i + 1 :]]
                yield f"option {option} ignored", changed
    for i, decorator in enumerate(function.decorator_list):
        if any(word in ast.unparse(decorator) for word in ("no_grad", "inference_mode")):
            changed = copy.copy(function)
            changed.decorator_list = function.decorator_list[:i] + function.decorator_list[i + 1 :]
            yield "decorator dropped", changed


def options_of(function: ast.FunctionDef) -> Iterator[str]:
    """Yield the command-line options that a function defines."""
    for node in ast.walk(function):
        if isinstance(node, ast.Call) and name_of(node.func) == "add":
            first = ast.literal_eval(node.args[0])
            if first.startswith("--"):
                yield first


def changed_fields(cls: ast.ClassDef) -> Iterator[tuple[str, ast.AST]]:
    """Yield versions of a dataclass that ignore one field, and use its default."""
    if not any("dataclass" in ast.unparse(decorator) for decorator in cls.decorator_list):
        return
    for field in cls.body:
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and field.value is not None:
            name, default = field.target.id, ast.unparse(field.value)
            if "field(" in default:
                continue
            answer = f"{default} if name == {name!r} else object.__getattribute__(self, name)"
            ignoring = f"def __getattribute__(self, name):\n return {answer}"
            changed = copy.copy(cls)
            changed.body = [*cls.body, ast.parse(ignoring).body[0]]
            yield f"field {name} ignored", changed


def places(node: ast.AST) -> Iterator[tuple[ast.AST, str, int | None, ast.AST]]:
    """Yield all nodes below a node, except those without mutants: (parent, field, position in the field's list, node)."""
    for field, value in ast.iter_fields(node):
        if field in ("annotation", "returns", "decorator_list", "type_comment"):
            continue
        for i, child in enumerate(value) if isinstance(value, list) else [(None, value)]:
            unseen = isinstance(child, ast.keyword) and child.arg in UNSEEN
            typed = isinstance(child, ast.Subscript) and name_of(child.value) == "Literal"
            if isinstance(child, ast.AST) and not isinstance(child, LEFT_ALONE) and not (unseen or typed):
                yield node, field, i, child
                yield from places(child)


def path_of(file: str) -> Path:
    """Return the path of a file of the package, such as `flow.paths`."""
    return PACKAGE / f"{file.replace('.', '/')}.py"


def mutants(file: str, kinds: tuple[type[ast.AST], ...] | None = None) -> Iterator[Mutant]:
    """Yield every mutant of a file of the package, such as `flow.paths`, or only those from some kinds of nodes."""
    tree = ast.parse(path_of(file).read_text(encoding="utf-8"))
    statement, seen = "", Counter[str]()
    for parent, field, i, node in places(tree):
        if isinstance(node, ast.stmt):
            statement = ast.unparse(node).splitlines()[0]
        for what, changed in changes(node) if kinds is None or isinstance(node, kinds) else ():
            replace(parent, field, i, changed)
            source = ast.unparse(ast.fix_missing_locations(tree))
            replace(parent, field, i, node)
            where = ast.unparse(node).splitlines()[0]
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                where = f"{parent.name}.{node.name}" if isinstance(parent, ast.ClassDef) else node.name
            elif len(where) < 25 and where != statement:
                where = f"{where}` of `{statement}"
            what = f"{what} in `{where}`"
            seen[what] += 1
            near = cast(ast.stmt, node if hasattr(node, "lineno") else parent)
            yield Mutant(
                file, near.lineno, near.end_lineno or near.lineno, what + f" ({seen[what]})" * (seen[what] > 1), source
            )


def ignored_settings(file: str) -> Iterator[Mutant]:
    """Return every mutant that ignores an argument with a default, a field of a dataclass, or an option."""
    return (mutant for mutant in mutants(file, (ast.FunctionDef, ast.ClassDef)) if " ignored in " in mutant.what)


def replace(parent: ast.AST, field: str, i: int | None, node: ast.AST) -> None:
    """Replace the child of a node: the field itself, or the item at position `i` of its list."""
    if i is None:
        setattr(parent, field, node)
    else:
        getattr(parent, field)[i] = node
