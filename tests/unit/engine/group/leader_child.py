"""A leader in a process of its own, to be killed by a test: prints the process ids of its ranks, then runs steps.

In the second step rank 1 hangs.
"""

from __future__ import annotations

import json
import sys

from tests.unit.engine.engine_requests import request
from tests.unit.engine.group.rank_group import Fault, RankGroup, RankLoader
from tests.unit.engine.harness import Rig


def main() -> None:
    with RankGroup(3, RankLoader(fault=Fault(rank=1, kind="hang", step=2)).main) as group, Rig(group=group.join) as rig:
        print(json.dumps([process.pid for process in group.processes.values()]), flush=True)
        for number in range(3):
            rig.submit(number, request([5 + number] * 4, max_tokens=190))
        rig.sink.wait(lambda: bool(rig.sink.steps))
        print("running", flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main()
