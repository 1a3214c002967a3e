"""The commands of the model cards, as printed but for the server's own host."""

from __future__ import annotations

import json
import os
import subprocess

import pytest

from tests.clients.site import FOLDER, Site
from tests.cluster.launcher import LaunchedCluster

HOST_OF_THE_CARDS = "http://0.0.0.0:8180"
COMMAND = """\
curl -X POST "http://0.0.0.0:8180/v1/chat/completions" \\
-H "Content-Type: application/json" \\
-d '{
"messages": [
{"role": "user", "content": [
{"type": "image_url", "image_url": {"url": "https://paddlenlp.bj.bcebos.com/datasets/paddlemix/demo_images/example2.jpg"}},
{"type": "text", "text": "Descript this image"}
]}
],
"metadata": {"enable_thinking": THINKING}
}'"""


@pytest.mark.parametrize("thinking", [True, False])
def test_a_picture_by_its_url(cluster: LaunchedCluster, site: Site, thinking: bool) -> None:
    command = COMMAND.replace(HOST_OF_THE_CARDS, cluster.http_url).replace("THINKING", json.dumps(thinking))
    # A proxy of the environment is not on the way to this machine.
    done = subprocess.run(
        command,
        shell=True,
        capture_output=True,
        text=True,
        timeout=100,
        check=True,
        env={**os.environ, "no_proxy": "*"},
    )
    reply = json.loads(done.stdout)
    assert "error" not in reply, reply
    (choice,) = reply["choices"]
    assert choice["message"]["content"] and choice["finish_reason"] == "stop"
    assert bool(choice["message"].get("reasoning_content")) == thinking
    assert reply["usage"]["prompt_tokens_details"]["media_tokens"] > 0
    assert FOLDER + "example2.jpg" in site.asked
