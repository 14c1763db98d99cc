"""Evaluate the Python that a model writes to call tools: a small part of the language, read from its syntax tree.

There is no exec. What is not named here (imports, attributes, `while`, definitions, any function but the tools and
print) ends the evaluation. The tools are stubs without effects: each returns a text that records its name and inputs,
so the text of the final result tells where it came from.
"""

import ast
import inspect
import operator
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

MOST_STEPS = 10_000  # parts of the tree that are evaluated, over all rounds of all loops
MOST_CHARS = 10_000  # of a text, and of the code
MOST_ITEMS = 100  # of a list

COMPARISONS: Mapping[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.In: lambda item, whole: item in whole,
    ast.NotIn: lambda item, whole: item not in whole,
}

Value = str | bool | int | float | None | list[Any]  # a list holds no further lists


class CodeError(Exception):
    """Why the code of a reply does not run to its end."""


class Call(NamedTuple):
    tool: str
    value: str  # what it returned, and so also its inputs


@dataclass(frozen=True)
class Tool:
    """A stub: its inputs in order, and the values of those that may be left out."""

    name: str
    description: str
    inputs: Sequence[str]
    defaults: Mapping[str, Value] = field(default_factory=dict)

    def __call__(self, *args: Value, **kwargs: Value) -> str:
        """A record of the call; neither case nor the order of a list counts. TypeError for inputs it does not have."""
        bound = self.signature.bind(*args, **kwargs)
        bound.apply_defaults()
        inputs = "; ".join(f"{name}: {in_order(value)}" for name, value in bound.arguments.items())
        return checked(f"{self.name}({inputs})".casefold())

    @property
    def signature(self) -> inspect.Signature:
        kind, empty = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.empty
        return inspect.Signature(
            [inspect.Parameter(name, kind, default=self.defaults.get(name, empty)) for name in self.inputs]
        )


@dataclass
class Outcome:
    """What the code did: the tools' calls, the last value that a statement had, and what stopped it ("": nothing)."""

    calls: list[Call] = field(default_factory=list)
    result: Value = None
    error: str = ""


def run_code(code: str, tools: Mapping[str, Tool], variables: Mapping[str, Value]) -> Outcome:
    """Evaluate the code with these variables set; never raises, whatever the code is."""
    evaluator = Evaluator(tools, variables)
    try:
        if len(code) > MOST_CHARS:
            raise CodeError(f"more than {MOST_CHARS} characters of code")
        with warnings.catch_warnings():  # of the code's own, such as an unknown escape
            warnings.simplefilter("ignore")
            tree = ast.parse(code)
        evaluator.block(tree.body)
    except CodeError as error:
        evaluator.outcome.error = str(error)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:  # what ast.parse raises
        evaluator.outcome.error = f"cannot be read: {error}"
    return evaluator.outcome


class Evaluator:
    """One run: `outcome` grows as it goes, and holds what was done before an error, too."""

    def __init__(self, tools: Mapping[str, Tool], variables: Mapping[str, Value]) -> None:
        self.tools = tools
        self.variables = dict(variables)
        self.outcome = Outcome()
        self.steps = 0

    def block(self, statements: Sequence[ast.stmt]) -> None:
        for statement in statements:
            self.statement(statement)

    def statement(self, node: ast.stmt) -> None:
        self.count_step()
        match node:
            case ast.Assign(targets=[ast.Name(id=name)], value=value):
                self.variables[name] = self.outcome.result = self.value(value)
            case ast.Expr(value=expression):
                if (value := self.value(expression)) is not None:
                    self.outcome.result = value
            case ast.If(test=test, body=body, orelse=other):
                self.block(body if self.value(test) else other)
            case ast.For(target=ast.Name(id=name), iter=items, body=body, orelse=[]):
                values = self.value(items)
                if not isinstance(values, list):
                    raise CodeError("a loop over what is no list")
                for value in values:
                    self.variables[name] = value
                    self.block(body)
            case _:
                raise refused(node)

    def value(self, node: ast.expr) -> Value:
        self.count_step()
        match node:
            case ast.Constant(value=str() | int() | float() | None as value):
                return value
            case ast.Name(id=name):
                if name not in self.variables:
                    raise CodeError(f"no variable {name}")
                return self.variables[name]
            case ast.Call(func=ast.Name(id=name), args=args, keywords=keywords):
                return self.call(name, args, keywords)
            case ast.JoinedStr(values=parts):
                return checked("".join(str(self.value(part)) for part in parts))
            case ast.FormattedValue(value=inner, conversion=-1, format_spec=None):
                return checked(str(self.value(inner)))
            case ast.List(elts=items) | ast.Tuple(elts=items):
                return self.list_of(items)
            case ast.BinOp(left=left, op=ast.Add(), right=right):
                texts = [self.value(left), self.value(right)]
                if not all(isinstance(text, str) for text in texts):
                    raise CodeError("+ joins texts only")
                return checked("".join(texts))
            case ast.Compare(left=left, ops=[sign], comparators=[right]) if type(sign) in COMPARISONS:
                return self.compare(COMPARISONS[type(sign)], self.value(left), self.value(right))
            case _:
                raise refused(node)

    def call(self, name: str, args: Sequence[ast.expr], keywords: Sequence[ast.keyword]) -> str | None:
        if name not in self.tools and name != "print":
            raise CodeError(f"no tool {name}")
        values = [self.value(arg) for arg in args]
        named = {keyword.arg: self.value(keyword.value) for keyword in keywords}
        if name == "print":
            return None
        if None in named or len(named) < len(keywords):
            raise CodeError(f"{name}: an input given twice, or **")
        try:
            value = self.tools[name](*values, **named)
        except TypeError as error:
            raise CodeError(f"{name}: {error}") from None
        self.outcome.calls.append(Call(name, value))
        return value

    def list_of(self, nodes: Sequence[ast.expr]) -> list[Value]:
        values = [self.value(node) for node in nodes]
        if len(values) > MOST_ITEMS or any(isinstance(value, list) for value in values):
            raise CodeError(f"a list of lists, or of more than {MOST_ITEMS} values")
        return values

    @staticmethod
    def compare(relation: Callable[[Any, Any], bool], left: Value, right: Value) -> bool:
        try:
            return relation(left, right)
        except TypeError as error:
            raise CodeError(str(error)) from None

    def count_step(self) -> None:
        self.steps += 1
        if self.steps > MOST_STEPS:
            raise CodeError(f"still running after {MOST_STEPS} steps")


def checked(text: str) -> str:
    if len(text) > MOST_CHARS:
        raise CodeError(f"a text of more than {MOST_CHARS} characters")
    return text


def in_order(value: Value) -> str:
    return ", ".join(sorted(map(str, value))) if isinstance(value, list) else str(value)


def refused(node: ast.AST) -> CodeError:
    return CodeError(f"line {getattr(node, 'lineno', 1)}: {type(node).__name__} is not for such code")
