"""Breaks routers and engines of a chaos run as ERNIE_CHAOS_MUTANT says (see ``tests/chaos/mutants.py``).

no_resume   a lost part ends the request
no_dedupe   an attempt that is over goes on being heard, and tokens known already are taken again
no_epoch    nobody looks at epochs: routers go by the role they heard of first, engines take what was meant for another
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import os
import sys
from collections.abc import Callable
from types import ModuleType


def no_resume(module: ModuleType) -> None:
    module.judge = lambda error, newcomer: module.Verdict.TOLD  # type: ignore[attr-defined]


def no_dedupe(module: ModuleType) -> None:
    """A resumed attempt begins anew, and whatever it says is taken."""
    request = module.ChoiceRun._request  # type: ignore[attr-defined]
    push = module.OutputAssembler.push  # type: ignore[attr-defined]

    def from_the_start(self):  # type: ignore[no-untyped-def]
        return module.replace(request(self), output_ids=())  # type: ignore[attr-defined]

    def all_of_them(self, events):  # type: ignore[no-untyped-def]
        base = len(self.token_ids) if events and events[0].index == 0 and self.token_ids else None
        if base is not None:
            self._shift = base
        shift = getattr(self, "_shift", 0)
        return push(self, [module.replace(event, index=event.index + shift) for event in events])  # type: ignore[attr-defined]

    module.ChoiceRun._request = from_the_start  # type: ignore[attr-defined]
    module.OutputAssembler.push = all_of_them  # type: ignore[attr-defined]


def no_epoch_in_routers(module: ModuleType) -> None:
    def get(self):  # type: ignore[no-untyped-def]
        return self._first

    def keep_first(self, info):  # type: ignore[no-untyped-def]
        self.__dict__.setdefault("_first", info)

    module.EngineLink.info = property(get, keep_first)  # type: ignore[attr-defined]


def no_epoch_in_links(module: ModuleType) -> None:
    submit = module.EngineLinkServicer._submit  # type: ignore[attr-defined]

    def of_any_epoch(self, request, session):  # type: ignore[no-untyped-def]
        request.epoch = self._info().epoch
        submit(self, request, session)

    module.EngineLinkServicer._submit = of_any_epoch  # type: ignore[attr-defined]


def no_epoch_in_engines(module: ModuleType) -> None:
    check = module.check_request  # type: ignore[attr-defined]

    def for_any_role(request, mode, **others):  # type: ignore[no-untyped-def]
        check(request, mode, **others | {"role": module.EngineRole.COLOCATED})  # type: ignore[attr-defined]

    module.check_request = for_any_role  # type: ignore[attr-defined]


MUTATIONS: dict[str, dict[str, Callable[[ModuleType], None]]] = {
    "no_resume": {"cluster.router.choice": no_resume},
    "no_dedupe": {"cluster.router.choice": no_dedupe},
    "no_epoch": {
        "cluster.router.link": no_epoch_in_routers,
        "actors.wire.engine_link": no_epoch_in_links,
        "actors.engine.engine": no_epoch_in_engines,
    },
}
"""What is done to which modules."""


class _Finder(importlib.abc.MetaPathFinder):
    """Mutates one module right after its import."""

    def __init__(self, name, mutate):  # type: ignore[no-untyped-def]
        self._name, self._mutate = name, mutate

    def find_spec(self, fullname, path=None, target=None):  # type: ignore[no-untyped-def]
        if fullname != self._name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(fullname, path)
        assert spec is not None and spec.loader is not None
        execute, mutate = spec.loader.exec_module, self._mutate

        def exec_module(module: ModuleType) -> None:
            execute(module)
            mutate(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


if (wanted := os.environ.get("ERNIE_CHAOS_MUTANT")) is not None:
    for name, mutate in MUTATIONS[wanted].items():
        sys.meta_path.insert(0, _Finder(name, mutate))
