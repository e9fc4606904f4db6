#!/usr/bin/env bash
# The console in a real browser. Needs the backends of the tests, and Debian's Chromium, which is installed when it is missing.
set -euo pipefail
cd "$(dirname "$0")/.."
if ! command -v chromium >/dev/null && [[ -z ${CHROMIUM:-} ]]; then
	inventory=$(mktemp -d)
	trap 'rm -rf "$inventory"' EXIT
	# The interpreter is named: what is discovered may be a shim that leads nowhere.
	printf 'localhost ansible_connection=local ansible_python_interpreter=%s\n' "$(command -v python)" >"$inventory/hosts"
	ansible -i "$inventory/hosts" localhost --become -m ansible.builtin.apt -a "name=chromium,fonts-dejavu-core update_cache=true install_recommends=false"
fi
timeout --kill-after=60 "${PHASE_SECONDS:-1500}" python -m tests.support.backends python -m pytest tests/browser -q --durations=5
