"""Picks encoder, prefill and decode engine of a prompt together: filter, score, pick. Pure.

A *cost* is counted in tokens of prefill: what is computed, waited for and sent before the first token, each in tokens
that take about as long. The least cost wins. Engines that may not take so long a prompt, or have no room for it now,
come last instead of never: the first know best what is wrong with it, the others may have room in a moment.

Whether to disaggregate at all follows from the same costs. A pair sends the prompt, and hands it over; an engine that
decodes keeps its replies waiting while it computes. So short prompts, and those that an engine has almost whole from
the turns before, stay in one place. An engine that decodes only has no vision experts: it must have the media cached.

Where a place lies matters only between two of them, so the best partners are found per node and not per pair: the work
grows with the number of places and not with its square.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from heapq import nsmallest
from typing import Generic, NamedTuple, TypeVar

from actors.reports import EncoderInfo, EngineInfo
from actors.types import EngineRole
from cluster.policy.candidates import MOST_TOLD, Candidate, to_tell
from cluster.policy.encoders import encoder_terms, home_of
from cluster.policy.views import Demand, EncoderView, EngineView, Route, cached_tokens, has_room, node_of, used_share

USED_STEP = 0.1
"""Shares of blocks in use that differ by less are about equal."""
USED_TOKENS = 2.0
"""Cost of every such step: it decides between equals, and against a few tokens that need not be sent."""
HANDOVER_TOKENS = 64.0
"""Two engines and a transfer to agree upon, whatever the prompt."""
BESIDE_DECODING = 0.25
"""Cost of a token computed where others decode. Their steps read all weights anyway, and a few hundred tokens beside
them are nearly free on a GPU; so this and ``HANDOVER_TOKENS`` balance at about 256."""
SEND = 1 / 32
"""Cost of a token whose KV is sent on its node; most of it is hidden behind computing."""
SEND_FAR = 1 / 8
"""The same between nodes: 57 KB a token of the 28B model."""
PULL_FAR = 1 / 64
"""Cost of a token of media whose embedding comes from another node: 5 KB."""

Key = tuple[int, int, float, float]
"""Engines too short for the prompt, engines without room, cost, blocks in use: less is better."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Decision:
    """What was picked, None where nothing could be, and what else there was, the picked first."""

    route: Route | None
    encoder: EncoderInfo | None = None
    routes: tuple[Candidate, ...] = ()
    encoders: tuple[Candidate, ...] = ()


class _Half(NamedTuple):
    """What one engine adds to a route. ``far``: where its partner is on another node."""

    view: EngineView
    key: Key
    far: Key
    terms: Mapping[str, float]
    far_terms: Mapping[str, float]

    @property
    def node(self) -> str:
        return node_of(self.view.info.address)


class _Option(NamedTuple):
    """A route that could be taken, and the encoder it would go with."""

    key: tuple[int, int, float, float, bool]
    first: _Half
    second: _Half | None
    encoder: EncoderView | None

    @property
    def route(self) -> Route:
        return Route(prefill=self.first.view.info, decode=None if self.second is None else self.second.view.info)


def pairable(prefill: EngineInfo, decode: EngineInfo) -> bool:
    """KV may move only between engines of equal weights, element type, block size and rules."""
    return prefill.kv_identity == decode.kv_identity


def choose(demand: Demand, engines: Sequence[EngineView], encoders: Sequence[EncoderView] = ()) -> Decision:
    """Places a prompt. ``encoders``: none where everything is encoded already."""
    cached = {view.info.incarnation: cached_tokens(view, demand.token_count, demand.prefix_hashes) for view in engines}
    at_encoders = _Encoders(demand, encoders)
    partners: dict[object, list[_Half]] = {}
    for view in engines:
        if view.info.role is EngineRole.DECODE:
            half = _second_half(demand, view, cached[view.info.incarnation])
            partners.setdefault(view.info.kv_identity, []).append(half)
    nearest = {identity: _Nearest([(h.node, h.key, h.far, h) for h in halves]) for identity, halves in partners.items()}
    options: list[_Option] = []
    unable: list[Candidate] = []
    for view in engines:
        name = view.info.engine_id
        first = _first_half(demand, view, cached[view.info.incarnation])
        role = view.info.role
        if role is EngineRole.PREFILL:
            found = nearest.get(view.info.kv_identity)
            if found is None:
                unable.append(_excluded(name, "no engine that decodes takes its KV"))
            else:
                options.append(_option(first, found.at(first.node), at_encoders))
        elif role is EngineRole.DECODE and (why := _why_not_alone(demand, cached[view.info.incarnation])):
            unable.append(_excluded(f"{name} alone", why))
        else:
            options.append(_option(first, None, at_encoders))
    best = min(options, key=lambda option: option.key, default=None)
    if best is None:
        encoder = at_encoders.at(None)
        return Decision(
            route=None,
            encoder=None if encoder is None else encoder.info,
            routes=to_tell(unable),
            encoders=to_tell(at_encoders.candidates(encoder, None)),
        )
    others = nsmallest(MOST_TOLD, (one for one in options if one is not best), key=lambda option: option.key)
    if best.second is not None:
        halves, cost = partners[best.second.view.info.kv_identity], at_encoders.cost(best.first.node)
        others += [_pair(best.first, half, best.encoder, cost) for half in halves if half is not best.second]
        others = nsmallest(MOST_TOLD, others, key=lambda option: option.key)
    return Decision(
        route=best.route,
        encoder=None if best.encoder is None else best.encoder.info,
        routes=to_tell([*map(_candidate, [best, *others]), *unable]),
        encoders=to_tell(at_encoders.candidates(best.encoder, best.first.node)),
    )


def _first_half(demand: Demand, view: EngineView, cached: int) -> _Half:
    """Of an engine that computes the prompt."""
    queued, lacking = float(view.load.queued_tokens), float(demand.token_count - cached)
    terms = {"queued": queued, "computes": lacking}
    if view.info.role.decodes:
        terms["beside_decoding"] = BESIDE_DECODING * (queued + lacking)
    terms["kv_use"] = _crowding(view)
    if demand.encoder_address is not None and node_of(demand.encoder_address) != node_of(view.info.address):
        terms["pulls_far"] = PULL_FAR * demand.media_tokens
    key = _key(demand, view, terms)
    return _Half(view, key, key, terms, terms)


def _second_half(demand: Demand, view: EngineView, cached: int) -> _Half:
    """Of an engine that takes the prompt over."""
    terms = {
        "handover": HANDOVER_TOKENS,
        "decode_queued": float(view.load.queued_tokens),
        "decode_kv_use": _crowding(view),
        "sends": SEND * (demand.token_count - cached),
    }
    far = terms | {"sends": SEND_FAR * (demand.token_count - cached)}
    return _Half(view, _key(demand, view, terms), _key(demand, view, far), terms, far)


def _crowding(view: EngineView) -> float:
    return int(used_share(view) / USED_STEP) * USED_TOKENS


def _key(demand: Demand, view: EngineView, terms: Mapping[str, float]) -> Key:
    too_long = demand.token_count >= view.info.max_model_len
    return too_long, not has_room(view, demand.token_count), sum(terms.values()), used_share(view)


def _why_not_alone(demand: Demand, cached: int) -> str:
    """Why an engine that only decodes cannot compute a prompt itself; empty if it can."""
    if cached < demand.vision_end:
        return f"has no vision experts, and {cached} tokens of {demand.vision_end} with media"
    lacking = demand.token_count - cached
    return f"would compute {lacking} tokens, and may {demand.alone_tokens}" if lacking > demand.alone_tokens else ""


def _option(first: _Half, second: _Half | None, encoders: _Encoders) -> _Option:
    return _pair(first, second, encoders.at(first.node), encoders.cost(first.node))


def _pair(first: _Half, second: _Half | None, encoder: EncoderView | None, encoder_cost: float) -> _Option:
    too_long, full, cost, used = first.key
    if second is not None:
        other = second.key if second.node == first.node else second.far
        too_long, full, cost, used = too_long + other[0], full + other[1], cost + other[2], used + other[3]
    return _Option((too_long, full, cost + encoder_cost, used, second is not None), first, second, encoder)


def _candidate(option: _Option) -> Candidate:
    first, second = option.first, option.second
    name, terms = first.view.info.engine_id, dict(first.terms)
    if second is None:
        name += " alone"
    else:
        name += f" -> {second.view.info.engine_id}"
        terms |= second.terms if second.node == first.node else second.far_terms
    reasons = (("too short for the prompt", option.key[0]), ("no room now", option.key[1]))
    return Candidate(name=name, terms=terms, last_for=", ".join(reason for reason, count in reasons if count))


def _excluded(name: str, why: str) -> Candidate:
    return Candidate(name=name, terms={}, excluded=why)


T = TypeVar("T")


class _Nearest(Generic[T]):
    """The best of some places as seen from a node: among all by their far keys, or on that node by its near key."""

    def __init__(self, places: Sequence[tuple[str, tuple[float, ...], tuple[float, ...], T]]) -> None:
        """(node, key if near, key if far, place), at least one; a near key is no worse than the far one."""
        self._far = min((far, index) for index, (_, _, far, _) in enumerate(places))
        self._near: dict[str, tuple[tuple[float, ...], int]] = {}
        for index, (node, near, _, _) in enumerate(places):
            self._near[node] = min((near, index), self._near.get(node, (near, index)))
        self._places = [place for *_, place in places]

    def at(self, node: str | None) -> T:
        return self._places[min(self._far, self._near.get(node or "", self._far))[1]]


class _Encoders:
    """The best encoder for an engine on a node."""

    def __init__(self, demand: Demand, encoders: Sequence[EncoderView]) -> None:
        self._far_cost = PULL_FAR * demand.media_tokens
        self._home = home_of(demand, encoders)
        self._terms = encoder_terms(demand, encoders)
        self._encoders = list(encoders)
        self._costs = [sum(terms.values()) for terms in self._terms]
        places = [
            (node_of(view.info.address), (cost, rank), (cost + self._far_cost, rank), index)
            for index, (view, cost, rank) in enumerate(zip(encoders, self._costs, self._home, strict=True))
        ]
        self._nearest = _Nearest(places) if places else None

    def at(self, node: str | None) -> EncoderView | None:
        return None if self._nearest is None else self._encoders[self._nearest.at(node)]

    def cost(self, node: str) -> float:
        if self._nearest is None:
            return 0.0
        index = self._nearest.at(node)
        return self._costs[index] + self._far(index, node)

    def _far(self, index: int, node: str | None) -> float:
        near = node is None or node_of(self._encoders[index].info.address) == node
        return 0.0 if near else self._far_cost

    def candidates(self, taken: EncoderView | None, node: str | None) -> Iterator[Candidate]:
        """As seen from a node, the taken one first."""
        far = [self._far(index, node) for index in range(len(self._encoders))]
        order = sorted(range(len(far)), key=lambda i: (self._encoders[i] is not taken, self._costs[i] + far[i]))
        for index in order:
            yield Candidate(
                name=self._encoders[index].info.encoder_id, terms=self._terms[index] | {"pulls_far": far[index]}
            )
