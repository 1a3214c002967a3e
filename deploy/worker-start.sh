#!/usr/bin/env bash
# Joins this machine, as a worker, to the head at $RAY_HEAD_IP, and ends what ran here before.
#
# A head that comes back with its state starts its workers once more: one that is in the cluster already is left as it
# is, so that what it serves goes on.
set -euo pipefail
export PATH=~/ernie/venv/bin:$PATH

in_the_cluster() {
    timeout 60 python - <<'PYTHON'
import os, sys
import ray

ray.init(address=f"{os.environ['RAY_HEAD_IP']}:6379", log_to_driver=False)
here = ray.get_runtime_context().get_node_id()
sys.exit(not any(node["Alive"] and node["NodeID"] == here for node in ray.nodes()))
PYTHON
}

if pgrep -f "^$HOME/ernie/venv/.*/raylet " > /dev/null && in_the_cluster; then
    echo "worker-start: in the cluster already"
    exit 0
fi
bash ~/ernie/deploy/node-stop.sh
ulimit -n 65536 || true
ray start --address="$RAY_HEAD_IP:6379" "$@"
