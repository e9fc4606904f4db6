#!/usr/bin/env bash
# Every linter, each named when it starts; all run even when one fails.
set -uo pipefail
cd "$(dirname "$0")/.."
export PATH="$PWD/.venv/bin:$PATH"
failed=()
run() {
	echo "-- $1"
	shift
	"$@" || failed+=("$1")
}
run "ruff check" ruff check .
run "ruff format" ruff format --check .
run "mypy (strict): module_utils" mypy module_utils
run "mypy (strict): webhook_api" mypy webhook/webhook_api
run "yamllint" yamllint --strict .
run "ansible-lint (production)" ansible-lint --offline -q
run "pip-audit, where its data can be reached" scripts/audit.py --if-reachable
if ((${#failed[@]})); then
	echo "Linters failed: ${failed[*]}" >&2
	exit 1
fi
