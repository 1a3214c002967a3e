#!/usr/bin/env bash
# Ends all of Ray and Serve on this machine. HAProxy outlives Ray when Serve's controller is lost, and would go on taking
# connections beside its successor: `ray stop` does not know it.
test ! -x ~/ernie/venv/bin/ray || ~/ernie/venv/bin/ray stop
pkill -KILL -f "^$HOME/ernie/venv/.*/haproxy " || true
