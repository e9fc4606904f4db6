#!/usr/bin/env bash
# make soak: the fault scenarios in full. Sizes and seed by environment (docs/receiver/proof.md); ARGS go to pytest.
# The results are kept as JSON, one line a scenario, under .cache/soak/.
set -uo pipefail
cd "$(dirname "$0")/.."
export PATH="$PWD/.venv/bin:$PATH" ANSIBLE_NOCOLOR=1 PYTHONUNBUFFERED=1
scripts/controller.sh requirements.txt requirements-dev.txt webhook/requirements.txt || exit 1
scripts/test-prepare.sh >/dev/null || exit 1
mkdir -p .cache/soak
results=$PWD/.cache/soak/$(date +%Y%m%d-%H%M%S).jsonl
export FAULTS_SOAK=1 FAULTS_RESULTS=$results
python -m pytest tests/faults -v "$@"
code=$?
[[ -s $results ]] && python -m tests.support.soaktable "$results" && echo "Kept in ${results#"$PWD"/}"
exit "$code"
