"""Holds PromQL to the series there are: which ones an expression reads, and which labels its result has."""

from __future__ import annotations

import re
from collections.abc import Mapping

import promql_parser as ast

TARGET_LABELS = frozenset({"job", "instance"})
"""Prometheus gives them to everything it scrapes."""
OF_PROMETHEUS = {"up": frozenset[str](), "scrape_duration_seconds": frozenset[str]()}
"""Series it makes itself, for every target."""
KEEPING = {"topk", "bottomk"}
"""Aggregations that pick whole series."""
VARIABLE_TIMES = {"$__rate_interval": "1m", "$__range": "1h", "$__interval": "15s"}
"""Durations that Grafana fills in."""

Series = Mapping[str, frozenset[str]]


def filled(expr: str, values: Mapping[str, str]) -> str:
    """The expression with Grafana's variables replaced, longest names first."""
    for name in sorted(values, key=len, reverse=True):
        expr = expr.replace(name, values[name])
    return expr


def reads(expr: str) -> set[str]:
    """Names of the series an expression reads."""
    found: set[str] = set()

    def visit(node: object) -> None:
        selector = node.vector_selector if isinstance(node, ast.MatrixSelector) else node
        if isinstance(selector, ast.VectorSelector) and selector.name:
            found.add(selector.name)

    ast.walk(ast.parse(filled(expr, VARIABLE_TIMES)), visit)
    return found


def labels(expr: str, series: Series) -> frozenset[str]:
    """Labels that samples of the result may have, of series with these names and labels.

    Raises:
        ValueError: not PromQL, a series that is not there, a label it does not have, or two sides that never match.
    """
    return _Labels(series).of(ast.parse(filled(expr, VARIABLE_TIMES)))


def legend_labels(legend: str) -> set[str]:
    """Labels that a legend or an annotation of Grafana (``{{pool}}``), or an alert (``{{ $labels.pool }}``) shows."""
    return set(re.findall(r"\{\{\s*(?:\$labels\.)?(\w+)\s*\}\}", legend))


class _Labels:
    def __init__(self, series: Series) -> None:
        self._series = series

    def of(self, node: object) -> frozenset[str]:
        match node:
            case ast.VectorSelector():
                return self._selected(node)
            case ast.MatrixSelector():
                return self._selected(node.vector_selector)
            case ast.ParenExpr() | ast.SubqueryExpr() | ast.UnaryExpr():
                return self.of(node.expr)
            case ast.AggregateExpr():
                return self._aggregated(node)
            case ast.Call():
                return self._called(node)
            case ast.BinaryExpr():
                return self._matched(node)
            case ast.NumberLiteral() | ast.StringLiteral():
                return frozenset()
        raise ValueError(f"{type(node).__name__} is not known here")

    def _selected(self, selector: ast.VectorSelector) -> frozenset[str]:
        name = selector.name or ""
        known = self._series.get(name, OF_PROMETHEUS.get(name))
        if known is None:
            raise ValueError(f"there is no series {name}")
        known |= TARGET_LABELS
        self._have(known, {matcher.name for matcher in selector.matchers.matchers}, name)
        return known

    def _aggregated(self, node: ast.AggregateExpr) -> frozenset[str]:
        inner = self.of(node.expr)
        if str(node.op) in KEEPING:
            return inner
        if node.modifier is None:
            return frozenset()
        named = frozenset(node.modifier.labels)
        self._have(inner, named, f"what {node.op} reads")
        return named if node.modifier.type == ast.AggModifierType.By else inner - named

    def _called(self, node: ast.Call) -> frozenset[str]:
        name = node.func.name
        if name in ("vector", "time", "scalar"):
            return frozenset()
        if name == "absent":
            (selector,) = node.args
            self.of(selector)
            return frozenset(m.name for m in selector.matchers.matchers if m.op == ast.MatchOp.Equal)
        inner = frozenset[str]().union(*(self.of(argument) for argument in node.args))
        if name == "histogram_quantile":
            self._have(inner, {"le"}, "what histogram_quantile reads")
            return inner - {"le"}
        if name == "label_replace":
            self._have(inner, {node.args[3].val}, "what label_replace reads")
            return inner | {node.args[1].val}
        return inner

    def _matched(self, node: ast.BinaryExpr) -> frozenset[str]:
        left, right = self.of(node.lhs), self.of(node.rhs)
        if _scalar(node.lhs):
            return right
        if _scalar(node.rhs):
            return left
        matching = node.modifier.matching if node.modifier else None
        if matching is None:
            compared = left | right
            if str(node.op).strip() == "or":
                return compared
        elif matching.type == ast.LabelModifierType.Include:
            compared = frozenset(matching.labels)
        else:
            compared = (left | right) - frozenset(matching.labels)
        for side in (left, right):
            self._have(side, compared, f"a side of {str(node.op).strip()}")
        if node.modifier is None or node.modifier.card in (
            ast.VectorMatchCardinality.ManyToMany,
            ast.VectorMatchCardinality.ManyToOne,
        ):
            return left | frozenset((node.modifier and node.modifier.group_labels) or ())
        return compared

    def _have(self, known: frozenset[str], named: set[str] | frozenset[str], what: str) -> None:
        if missing := sorted(named - known):
            raise ValueError(f"{what} has no label {', '.join(missing)}")


def _scalar(node: object) -> bool:
    if isinstance(node, ast.ParenExpr | ast.UnaryExpr):
        return _scalar(node.expr)
    if isinstance(node, ast.Call):
        return node.func.name in ("scalar", "time")
    return isinstance(node, ast.NumberLiteral)
