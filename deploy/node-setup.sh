#!/usr/bin/env bash
# Installs ernie-serving on a node, into ~/ernie/venv; `ray up` runs it there as a setup command, again and again.
#
# It needs what the cluster file copies there: this folder in ~/ernie/deploy and the wheel in ~/ernie/dist.
# PYTHON names the interpreter (3.11 or newer, the same minor version on every node). pip's own settings apply.
set -euo pipefail
cd ~/ernie

wheels=(dist/ernie_serving-*.whl)
if [ "${#wheels[@]}" -ne 1 ] || [ ! -f "${wheels[0]}" ]; then
    echo "node-setup: want one wheel in ~/ernie/dist, found: ${wheels[*]}" >&2
    exit 1
fi
if [ ! -x venv/bin/pip ]; then
    python=${PYTHON:-python3}
    if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
        echo "node-setup: $python is not Python 3.11 or newer: set PYTHON" >&2
        exit 1
    fi
    "$python" -m venv venv
fi
# A wheel built again has the same version, which pip alone would leave as it is. The very same one is left alone: what
# runs from it may still want files of it.
if ! cmp --silent "${wheels[0]}" venv/installed.whl; then
    rm -f venv/installed.whl
    venv/bin/pip uninstall --quiet --yes ernie-serving
    venv/bin/pip install --quiet "${wheels[0]}"
    cp "${wheels[0]}" venv/installed.whl
fi

# Ray runs all its commands in login shells: `ray start`, but also the `ray stop` of `ray down`.
if ! grep -qs 'ernie/deploy/serve.env' ~/.bashrc; then
    cat >> ~/.bashrc <<'BASHRC'
set -a; . ~/ernie/deploy/serve.env; set +a
PATH=~/ernie/venv/bin:$PATH
BASHRC
fi
