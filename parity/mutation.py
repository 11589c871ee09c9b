"""Changes to a function's operations, in memory: "the product in `join` becomes a sum".

A change names an operation by its place in the syntax tree, never by its text:

    compare("<=").to("<")                           another operator
    binary("+").becomes("_0")                       without a summand; `_0`, `_1` are the operands
    call("masked_fill").drop()                      without the call: what it was called on stays
    call("amax").rename("amin")                     another method
    call("argsort").given(stable="False")           another option
    call("cos_sin").argument(0).becomes("_ - 1")    another argument; `_` is what stood there
    call("max")[1].becomes("0")                     the second of several
    assignment("count").drop()                      without the statement

So a change survives other names of local variables, other lines and other statements. A selection that
finds no operation, or several without a number, raises `Stale`. Several are counted in the order in which
they end in the source: a receiver comes before the call, an operand before the sum.

>>> def top(x, y):
...     return max(x, y) + 1

>>> from parity.mutation import call, changed
>>> with changed(top, call("max").rename("min")):
...     top(1, 5)
2
>>> top(1, 5)
6
"""

import ast
import copy
import importlib
import inspect
import linecache
import re
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest import mock

from fade_fast.compile import stored

OPERATORS: dict[str, type[ast.AST]] = {
    "<": ast.Lt, "<=": ast.LtE, ">": ast.Gt, ">=": ast.GtE, "==": ast.Eq, "!=": ast.NotEq,
    "is": ast.Is, "is not": ast.IsNot, "in": ast.In, "not in": ast.NotIn,
    "+": ast.Add, "-": ast.Sub, "*": ast.Mult, "/": ast.Div, "//": ast.FloorDiv, "%": ast.Mod,
    "**": ast.Pow, "@": ast.MatMult, "<<": ast.LShift, ">>": ast.RShift,
    "&": ast.BitAnd, "|": ast.BitOr, "^": ast.BitXor, "and": ast.And, "or": ast.Or,
}  # fmt: skip

#: What is no operation of the function: the types of its arguments, and what wraps it.
APART = {"annotation", "returns", "decorator_list", "type_params"}

#: Where wrappers keep what they wrap: properties, methods, partials, custom operators, `Compiled`.
WRAPPED = ("fget", "__func__", "func", "_init_fn", "function", "__wrapped__")


class Stale(Exception):
    """The source is no longer as a change expects it."""


# -- selections


class Tree:
    """The body of a function, its operations in order."""

    def __init__(self, function: ast.FunctionDef, names: dict):
        self.function, self.names = function, names  # the names are its globals
        self.parents = {id(x): node for node in ast.walk(function) for x in ast.iter_child_nodes(node)}
        inside = (x for statement in function.body for x in _walk(statement))
        self.nodes = sorted((x for x in inside if hasattr(x, "end_lineno")), key=_end)

    def above(self, node: ast.AST) -> Iterator[ast.AST]:
        """The nodes that hold this one, the closest first."""
        while id(node) in self.parents:
            node = self.parents[id(node)]
            yield node

    def replace(self, node: ast.AST, new: ast.AST) -> None:
        parent = self.parents[id(node)]
        for x in ast.walk(new):
            if "lineno" in x._attributes and not hasattr(x, "lineno"):
                ast.copy_location(x, node)
        for name, held in ast.iter_fields(parent):
            if held is node:
                setattr(parent, name, new)
            elif isinstance(held, list):
                held[:] = [new if x is node else x for x in held]
        self.parents[id(new)] = parent

    def is_module(self, node: ast.AST) -> bool:
        """Whether `node` names a module, as in `torch.exp(x)`: then nothing is called on it."""
        if isinstance(node, ast.Attribute):
            return self.is_module(node.value)
        return isinstance(node, ast.Name) and isinstance(self.names.get(node.id), types.ModuleType)


def _walk(node: ast.AST) -> Iterator[ast.AST]:
    """`node` and those below it, these first."""
    for name, held in ast.iter_fields(node):
        if name not in APART:
            for x in held if isinstance(held, list) else [held]:
                if isinstance(x, ast.AST):
                    yield from _walk(x)
    yield node


def _end(node: ast.AST) -> tuple[int, int]:
    return node.end_lineno, node.end_col_offset


class Selection:
    """Some operations of a function. The functions below make it, its methods narrow it."""

    def __init__(self, text: str, find: Callable[[Tree], list[ast.AST]], one: bool = True):
        self.text, self.find, self.one = text, find, one

    def __repr__(self) -> str:
        return self.text

    # Narrowed.

    def _kept(self, text: str, keep: Callable[[Tree], Callable[[ast.AST], bool]]) -> "Selection":
        return Selection(self.text + text, lambda tree: list(filter(keep(tree), self.find(tree))))

    def __getitem__(self, i: int) -> "Selection":
        """The one number `i`, from the end if it is negative."""
        return Selection(f"{self}[{i}]", lambda tree: self.find(tree)[i : i + 1 or None])

    def every(self) -> "Selection":
        """All of them at once, one or more."""
        return Selection(f"{self}.every()", self.find, one=False)

    def inside(self, other: "Selection") -> "Selection":
        """Those that are part of another operation."""

        def keep(tree):
            outer = set(map(id, other.find(tree)))
            return lambda node: any(id(x) in outer for x in tree.above(node))

        return self._kept(f".inside({other})", keep)

    def having(self, other: "Selection") -> "Selection":
        """Those of which another operation is part."""

        def keep(tree):
            held = {id(above) for x in other.find(tree) for above in tree.above(x)}
            return lambda node: id(node) in held

        return self._kept(f".having({other})", keep)

    def taking(self, other: "Selection") -> "Selection":
        """Calls of which it is an argument, itself and not a part of one."""

        def keep(tree):
            held = set(map(id, other.find(tree)))
            return lambda node: any(id(x) in held for x in _arguments(node))

        return self._kept(f".taking({other})", keep)

    def on(self, name: str) -> "Selection":
        """Those on something of this name: the `x` of `x.mT`, or the `y` of `x.y.sum()`."""
        return self._kept(f".on({name!r})", lambda tree: lambda node: _last_name(_object(node)) == name)

    # Their parts.

    def _parts(self, text: str, part: Callable[[ast.AST], ast.AST | None]) -> "Selection":
        found = lambda tree: [x for x in map(part, self.find(tree)) if x is not None]  # noqa: E731
        return Selection(self.text + text, found, self.one)

    def argument(self, which: int | str) -> "Selection":
        """An argument of a call, by its place or its keyword."""

        def part(node):
            if isinstance(which, str):
                return next((x.value for x in node.keywords if x.arg == which), None)
            return node.args[which] if which < len(node.args) else None

        return self._parts(f".argument({which!r})", part)

    @property
    def object(self) -> "Selection":
        """What a method is called on, or an attribute or item is taken of."""
        return self._parts(".object", _object)

    @property
    def value(self) -> "Selection":
        """What an assignment assigns."""
        return self._parts(".value", lambda node: node.value)

    @property
    def index(self) -> "Selection":
        """The index of an item."""
        return self._parts(".index", lambda node: node.slice)

    # Changed.

    def _change(self, text: str, new: Callable[[ast.AST, Tree], ast.AST]) -> "Change":
        def apply(tree):
            for node in self.found(tree):
                tree.replace(node, new(node, tree))

        return Change(f"{self}.{text}", apply)

    def found(self, tree: Tree) -> list[ast.AST]:
        """One operation, or as many as there are under `every`. Raises `Stale` for others."""
        nodes = self.find(tree)
        if not nodes or self.one and len(nodes) > 1:
            raise Stale(f"{self} is there {len(nodes)} times")
        return nodes

    def becomes(self, template: str) -> "Change":
        """An expression of `_`, which is what stood there.

        `_0`, `_1` ... are its operands, arguments or sides, and `_of` is what a method is called on.
        """
        return self._change(f"becomes({template!r})", lambda node, tree: _filled(template, node))

    def to(self, operator: str) -> "Change":
        """Another operator with the same operands."""
        return self._change(f"to({operator!r})", lambda node, tree: _with_operator(node, operator))

    def rename(self, name: str) -> "Change":
        """Another function, method, attribute or variable."""
        return self._change(f"rename({name!r})", lambda node, tree: _renamed(node, name))

    def drop(self) -> "Change":
        """Without it: a call leaves what it was called on, or its first argument; a statement nothing."""
        return self._change("drop()", _dropped)

    def given(self, **options: str) -> "Change":
        """A call with other keyword arguments, expressions each."""
        text = ", ".join(f"{name}={x!r}" for name, x in options.items())
        return self._change(f"given({text})", lambda node, tree: _given(node, options))

    def exchange(self, other: "Selection") -> "Change":
        """The two in each other's place."""

        def apply(tree):
            (one,), (two,) = self.found(tree), other.found(tree)
            first, second = copy.deepcopy(one), copy.deepcopy(two)
            tree.replace(one, second)
            tree.replace(two, first)

        return Change(f"{self}.exchange({other})", apply)


class Change:
    """What to do to a function. `one & other` does both."""

    def __init__(self, text: str, apply: Callable[[Tree], None]):
        self.text, self.apply = text, apply

    def __repr__(self) -> str:
        return self.text

    def __and__(self, other: "Change") -> "Change":
        def apply(tree):
            self.apply(tree)
            other.apply(Tree(tree.function, tree.names))

        return Change(f"{self} & {other}", apply)


def _select(text: str, keep: Callable[[ast.AST], bool]) -> Selection:
    return Selection(text, lambda tree: [node for node in tree.nodes if keep(node)])


def call(name: str) -> Selection:
    """Calls of a function or method of this name."""
    return _select(f"call({name!r})", lambda x: isinstance(x, ast.Call) and _last_name(x.func) == name)


def attribute(name: str) -> Selection:
    """Reads of an attribute of this name."""
    return _select(f"attribute({name!r})", lambda x: _is_read(x, ast.Attribute) and x.attr == name)


def name(name: str) -> Selection:
    """Reads of a variable: best of an argument or a global, whose names stay."""
    return _select(f"name({name!r})", lambda x: _is_read(x, ast.Name) and x.id == name)


def item(of: str | None = None, at: object = ...) -> Selection:
    """Reads of items: of something of this name, or at this constant index."""

    def keep(x):
        if not _is_read(x, ast.Subscript) or of not in (None, _last_name(x.value)):
            return False
        return at is ... or _is_constant(x.slice, at)

    of_at = ", ".join([repr(of)] * (of is not None) + [f"at={at!r}"] * (at is not ...))
    return _select(f"item({of_at})", keep)


def constant(value: object) -> Selection:
    """Constants of this value and type."""
    return _select(f"constant({value!r})", lambda x: _is_constant(x, value))


def compare(operator: str) -> Selection:
    """Comparisons, chained or not, by an operator; `in` and `is not` are some."""
    kind = OPERATORS[operator]

    def keep(x):
        return isinstance(x, ast.Compare) and any(isinstance(op, kind) for op in x.ops)

    return _select(f"compare({operator!r})", keep)


def binary(operator: str) -> Selection:
    """Sums, products and the like, of two operands."""
    kind = OPERATORS[operator]
    return _select(f"binary({operator!r})", lambda x: isinstance(x, ast.BinOp) and isinstance(x.op, kind))


def logical(operator: str) -> Selection:
    """`and` and `or`, of two operands or more."""
    kind = OPERATORS[operator]
    return _select(f"logical({operator!r})", lambda x: isinstance(x, ast.BoolOp) and isinstance(x.op, kind))


def choice() -> Selection:
    """`_0 if condition else _1`."""
    return _select("choice()", lambda x: isinstance(x, ast.IfExp))


def condition() -> Selection:
    """What decides: of `if`, `while`, choices and comprehensions."""

    def find(tree):
        deciding = {id(test) for x in tree.parents.values() for test in _tests(x)}
        return [x for x in tree.nodes if id(x) in deciding]

    return Selection("condition()", find)


def _tests(node: ast.AST) -> list[ast.AST]:
    if isinstance(node, (ast.If, ast.While, ast.IfExp)):
        return [node.test]
    return node.ifs if isinstance(node, ast.comprehension) else []


def iterable() -> Selection:
    """What a loop or a comprehension goes over."""

    def find(tree):
        loops = (x for x in tree.parents.values() if isinstance(x, (ast.For, ast.comprehension)))
        over = {id(x.iter) for x in loops}
        return [x for x in tree.nodes if id(x) in over]

    return Selection("iterable()", find)


def assignment(name: str) -> Selection:
    """Statements that assign to an attribute or a variable of this name, `+=` among them."""

    def keep(x):
        targets = x.targets if isinstance(x, ast.Assign) else [getattr(x, "target", None)]
        kinds = (ast.Assign, ast.AugAssign, ast.AnnAssign)
        return isinstance(x, kinds) and any(_last_name(target) == name for target in targets)

    return _select(f"assignment({name!r})", keep)


def _last_name(node: ast.AST | None) -> str | None:
    """`c` of `a.b.c`, and `a` of `a`."""
    return getattr(node, "attr", getattr(node, "id", None))


def _object(node: ast.AST) -> ast.AST | None:
    node = node.func if isinstance(node, ast.Call) else node
    return node.value if isinstance(node, (ast.Attribute, ast.Subscript)) else None


def _arguments(node: ast.AST) -> list[ast.AST]:
    return [*node.args, *(x.value for x in node.keywords)] if isinstance(node, ast.Call) else []


def _is_read(node: ast.AST, kind: type[ast.AST]) -> bool:
    return isinstance(node, kind) and isinstance(node.ctx, ast.Load)


def _is_constant(node: ast.AST, value: object) -> bool:
    try:
        found = ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError):
        return False
    return isinstance(node, (ast.Constant, ast.UnaryOp)) and type(found) is type(value) and found == value


# -- new operations


def _operands(node: ast.AST) -> list[ast.AST]:
    match node:
        case ast.Call():
            return node.args
        case ast.BinOp():
            return [node.left, node.right]
        case ast.Compare():
            return [node.left, *node.comparators]
        case ast.BoolOp():
            return node.values
        case ast.IfExp():
            return [node.body, node.orelse]
        case ast.UnaryOp():
            return [node.operand]
        case ast.Tuple() | ast.List():
            return node.elts
    return []


def _filled(template: str, node: ast.AST) -> ast.expr:
    parts = {"_": node, "_of": _object(node)} | {f"_{i}": x for i, x in enumerate(_operands(node))}

    class Fill(ast.NodeTransformer):
        def visit_Name(self, hole):
            if re.fullmatch(r"_(of|\d+)?", hole.id):
                if parts.get(hole.id) is None:
                    raise Stale(f"{ast.unparse(node)} has no {hole.id}")
                return copy.deepcopy(parts[hole.id])
            return hole

    new = ast.parse(template, mode="eval").body
    for x in ast.walk(new):  # theirs are of the template
        for name in ("lineno", "col_offset", "end_lineno", "end_col_offset"):
            if hasattr(x, name):
                delattr(x, name)
    return Fill().visit(new)


def _with_operator(node: ast.AST, operator: str) -> ast.AST:
    new = copy.deepcopy(node)
    if isinstance(new, ast.Compare):
        if len(new.ops) > 1:
            raise Stale(f"{ast.unparse(node)} compares more than two")
        new.ops = [OPERATORS[operator]()]
    else:
        new.op = OPERATORS[operator]()
    return new


def _renamed(node: ast.AST, name: str) -> ast.AST:
    new = copy.deepcopy(node)
    named = new.func if isinstance(new, ast.Call) else new
    setattr(named, "attr" if isinstance(named, ast.Attribute) else "id", name)
    return new


def _dropped(node: ast.AST, tree: Tree) -> ast.AST:
    if isinstance(node, ast.stmt):
        return ast.Pass()
    rest = _object(node)
    if isinstance(node, ast.Call) and (rest is None or tree.is_module(rest)):
        rest = next(iter(_arguments(node)), None)
    if isinstance(node, ast.UnaryOp):
        rest = node.operand
    if rest is None:
        raise Stale(f"{ast.unparse(node)} leaves nothing when it is dropped")
    return copy.deepcopy(rest)


def _given(node: ast.Call, options: dict[str, str]) -> ast.Call:
    new = copy.deepcopy(node)
    new.keywords = [x for x in new.keywords if x.arg not in options]
    new.keywords += [ast.keyword(name, _filled(x, node)) for name, x in options.items()]
    return new


# -- functions


def function_at(path: str) -> Callable:
    """The function at a dotted path `module.name` or `module.Class.name`, with all that wraps it.

    Raises `Stale` if there is none.
    """
    parts, module, rest = path.split("."), None, []
    while parts and module is None:
        try:
            module = importlib.import_module(".".join(parts))
        except ModuleNotFoundError:
            rest.insert(0, parts.pop())
    held = module
    for part in rest:
        try:
            held = inspect.getattr_static(held, part)
        except AttributeError as error:
            raise Stale(f"there is no {path}") from error
    _unwrapped(held)
    return held


def _unwrapped(held) -> list:
    """An object, what it wraps, what that wraps, and so on, down to a function."""
    layers = [held]
    while inner := next((x for name in WRAPPED if (x := getattr(layers[-1], name, None)) is not None), None):
        layers.append(inner)
    if not isinstance(layers[-1], types.FunctionType):
        raise Stale(f"{held!r} is no function")
    return layers


def changed_code(function: types.FunctionType, change: Change) -> types.CodeType:
    """The code of `function` after a change. Raises `Stale` if it cannot be made, or alters nothing."""
    lines = linecache.getlines(function.__code__.co_filename, function.__globals__)
    module = ast.parse("".join(lines))
    # Compiled inside its classes and functions, which decide what its names mean; the rest is in the way.
    first = function.__code__.co_firstlineno
    module.body = [x for x in module.body if _first_line(x) <= first <= x.end_lineno or _is_future(x)]
    node = _definition(module, function.__code__)
    before = ast.dump(node)
    change.apply(Tree(node, function.__globals__))
    if ast.dump(node) == before:
        raise Stale(f"{change} alters nothing")
    if function.__closure__:  # all of it stays, read or not: the function keeps its cells
        held = ast.Tuple([ast.Name(x, ast.Load()) for x in function.__code__.co_freevars], ast.Load())
        node.body.append(ast.If(ast.Constant(False), [ast.Expr(held)], []))
    try:
        whole = compile(ast.fix_missing_locations(module), f"<{change}>", "exec", dont_inherit=True)
    except (SyntaxError, TypeError, ValueError) as error:
        raise Stale(f"{change} gives no function: {error}") from error
    code = next(x for x in _codes(whole) if _starts(x) == _starts(function.__code__))
    if code.co_freevars != function.__code__.co_freevars:
        raise Stale(f"{change} reads other variables of the functions around it")
    return code


def _definition(module: ast.Module, code: types.CodeType) -> ast.FunctionDef:
    for node in ast.walk(module):
        if isinstance(node, ast.FunctionDef) and (node.name, _first_line(node)) == _starts(code):
            return node
    raise Stale(f"the source has no {code.co_name} in line {code.co_firstlineno}")


def _first_line(node: ast.stmt) -> int:
    """Where a statement starts, decorators included, as code objects count."""
    return min(x.lineno for x in (node, *getattr(node, "decorator_list", ())))


def _starts(code: types.CodeType) -> tuple[str, int]:
    return code.co_name, code.co_firstlineno


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    for x in code.co_consts:
        if isinstance(x, types.CodeType):
            yield x
            yield from _codes(x)


def _is_future(node: ast.stmt) -> bool:
    return isinstance(node, ast.ImportFrom) and node.module == "__future__"


@contextmanager
def changed(function: Callable, change: Change) -> Iterator[None]:
    """`function` with a change in it.

    The function object stays and gets other code: so everything that holds it has the change, whether it
    imported the function, wrapped it, registered it as an operator or means to compile it.
    """
    layers = _unwrapped(function)
    inner = layers[-1]
    own, code = inner.__code__, changed_code(inner, change)
    try:
        inner.__code__ = code
        _forget(layers)
        # Compiled functions on disk are named by our source, which has not changed.
        with mock.patch.object(stored, "name_of", lambda *of: None):
            yield
    finally:
        inner.__code__ = own
        _forget(layers)


def _forget(layers: list) -> None:
    """Empty the caches around a function: what they hold is of its other code."""
    for layer in layers:
        if hasattr(layer, "cache_clear"):
            layer.cache_clear()
