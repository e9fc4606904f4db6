#!/usr/bin/env bash
# make test-fresh: the README's two commands on bare Debian 12 and Debian 13 hosts, each with an engine of its own.
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/controller.sh requirements.txt requirements-dev.txt webhook/requirements.txt
export PATH="$PWD/.venv/bin:$PATH" FRESH_TEST_COMMAND=1
exec python -m pytest tests/fresh -v "$@"
