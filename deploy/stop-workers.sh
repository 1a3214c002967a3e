#!/usr/bin/env bash
# Runs on the head of an on-premises cluster, before `ray down`, which would stop Ray on the head alone:
#
#     ray exec deploy/onprem.yaml 'bash ernie/deploy/stop-workers.sh' && ray down -y deploy/onprem.yaml
#
# Ends the application in order (running replies may finish), then Ray on every worker at once.
set -uo pipefail
export PATH=~/ernie/venv/bin:$PATH
serve shutdown --yes
workers() {
    python - <<'PYTHON'
import os, yaml

with open(os.path.expanduser("~/ray_bootstrap_config.yaml")) as file:
    config = yaml.safe_load(file)
for address in config["provider"]["worker_ips"]:
    print(f"{config['auth']['ssh_user']}@{address}")
PYTHON
}
options=(-i ~/ray_bootstrap_key.pem -o BatchMode=yes -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null
    -o LogLevel=ERROR -o ConnectTimeout=5)
failed=0 waiting=()
for worker in $(workers); do
    ssh -n "${options[@]}" "$worker" 'bash ~/ernie/deploy/node-stop.sh' 2>&1 | sed "s/^/$worker: /" &
    waiting+=($!)
done
for one in "${waiting[@]}"; do wait "$one" || failed=1; done
exit $failed
