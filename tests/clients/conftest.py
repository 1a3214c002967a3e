"""One cluster with nano for all clients, and a line for each of them at the end. A skipped test is a failed run."""

from __future__ import annotations

import base64
import os
import secrets
import sys
from collections import Counter
from collections.abc import Iterator
from importlib.metadata import distributions
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from cluster.demo import Sample, made_samples
from tests.clients.site import HOST, NETWORK, Site, media_site
from tests.cluster.launcher import LaunchedCluster
from tests.nano_model import nano_checkpoint

os.environ["RAY_AUTH_MODE"] = "token"
os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))

INSTRUCTOR = Path(sys.prefix) / "instructor"
"""Where ``make test-clients`` installs it, with its own versions of what it needs."""
CLIENTS = {
    "test_openai_sdk": "openai",
    "test_openai_responses": "openai (responses)",
    "test_langchain": "langchain-openai",
    "test_instructor": "instructor",
    "test_curl": "curl (model cards)",
    "test_ernie_client": "cluster.client",
}
"""By module. What stands before a blank is the distribution."""
FIELDS: dict[str, Any] = {
    "model": str(nano_checkpoint()),
    "served_model_name": "nano",
    "dtype": "float32",
    "drain_timeout_s": 20.0,
    "engines": [{"roles": {"prefill": 1, "decode": 1}, "kv_cache_gib": 0.1, "max_num_seqs": 16}],
    "preprocessor": {"limits": {"allowed_media_domains": [HOST], "allowed_media_networks": [NETWORK]}},
}


@pytest.fixture(scope="session")
def samples() -> dict[str, Sample]:
    """Pictures and a clip nano reads rightly, with what is asked about them."""
    return made_samples()


@pytest.fixture(scope="session")
def site(samples: dict[str, Sample], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    pictures = {"example1.jpg": samples["picture"].content, "example2.jpg": samples["thought"].content}
    with media_site(tmp_path_factory.mktemp("site"), pictures) as found:
        yield found


@pytest.fixture(scope="session")
def cluster(site: Site, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LaunchedCluster]:
    with mock.patch.dict(os.environ, site.environment):
        launched = LaunchedCluster(tmp_path_factory.mktemp("cluster"), FIELDS)
    try:
        launched.wait_ready()
        yield launched
        launched.stop()
    finally:
        launched.kill()


@pytest.fixture(scope="session")
def base_url(cluster: LaunchedCluster) -> str:
    return f"{cluster.http_url}/v1"


def data_url(sample: Sample) -> str:
    kind = "image/png" if len(sample.shown) == 1 else "video/mp4"
    return f"data:{kind};base64,{base64.b64encode(sample.content).decode()}"


def question(sample: Sample) -> list[Any]:
    """The messages of a request, in OpenAI's form."""
    kind = "image_url" if len(sample.shown) == 1 else "video_url"
    parts = [{"type": kind, kind: {"url": data_url(sample)}}, {"type": "text", "text": sample.question.text}]
    return [{"role": "user", "content": parts}]


def pytest_terminal_summary(terminalreporter: Any) -> None:
    counts: dict[str, Counter[str]] = {}
    for outcome, reports in terminalreporter.stats.items():
        for report in reports:
            module = getattr(report, "nodeid", "").partition("::")[0].rpartition("/")[2].removesuffix(".py")
            if module in CLIENTS and outcome in ("passed", "failed", "error", "skipped"):
                counts.setdefault(module, Counter())[outcome] += 1
    terminalreporter.section("clients")
    for module, name in CLIENTS.items():
        told = ", ".join(f"{count} {outcome}" for outcome, count in sorted(counts.get(module, {}).items()))
        fine = module in counts and set(counts[module]) == {"passed"}
        terminalreporter.write_line(f"{'ok  ' if fine else 'FAIL'} {_titled(name):<28} {told or 'did not run'}")


def _titled(name: str) -> str:
    wanted = name.partition(" ")[0]
    found = distributions(name=wanted, path=[str(INSTRUCTOR), *sys.path] if wanted == "instructor" else sys.path)
    return " ".join([name, *(one.version for one in list(found)[:1])])


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is not None and reporter.stats.get("skipped") and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
