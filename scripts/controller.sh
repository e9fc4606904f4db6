#!/usr/bin/env bash
# Makes .venv and installs the pinned requirements files that are named as arguments. Quick when nothing changed.
# With BUNDLE=PATH the wheels come out of that bundle, and no network is asked (docs/air-gapped.md).
set -euo pipefail
cd "$(dirname "$0")/.."

fail() {
	printf '\nCannot start:\n%s\n' "$1" >&2
	exit 1
}

find_python() {
	local candidate
	for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11}; do
		if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
			command -v "$candidate"
			return 0
		fi
	done
	return 1
}

missing=""
python=$(find_python) || missing+="  - Python 3.11 or newer is not here: install the package python3 (Debian 12, Ubuntu 24.04 or newer).
"
if [[ -n ${python:-} ]] && ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
	missing+="  - Python's venv is not here: install the package python3-venv.
"
fi
if [[ $(id -u) -ne 0 ]] && ! command -v sudo >/dev/null; then
	missing+="  - You are not root and sudo is not here: run as root, or install the package sudo and allow it for $(id -un).
"
fi
[[ -z $missing ]] || fail "$missing"

wanted=$(cat "$@" | sha256sum | cut -c1-16)-$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
stamp=.venv/.installed-$(printf '%s' "$*" | sha256sum | cut -c1-8)
if [[ -x .venv/bin/python && $(cat "$stamp" 2>/dev/null) == "$wanted" ]]; then
	exit 0
fi

if ! .venv/bin/python -c 'import pip' 2>/dev/null; then
	echo "== Making .venv with $("$python" --version)"
	"$python" -m venv --clear .venv || fail "  - python -m venv failed: install the package python3-venv, remove .venv and run this again."
fi
log=$(mktemp)
wheels=""
trap 'rm -rf "$log" "$wheels"' EXIT
source=()
if [[ -n ${BUNDLE:-} ]]; then
	wheels=$(mktemp -d)
	tar -xf "$BUNDLE" -C "$wheels" wheels || fail "  - $BUNDLE was cut off, or is no bundle: copy it again from where make bundle wrote it."
	source=(--no-index --find-links "$wheels/wheels")
fi
for file in "$@"; do
	echo "== Installing $file (about half a minute when nothing is cached)"
	if ! .venv/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes "${source[@]}" --requirement "$file" >"$log" 2>&1; then
		tail -n 15 "$log" >&2
		[[ -z $wheels ]] || fail "  - the wheels of $BUNDLE do not fit $("$python" --version): make the bundle with -e '{\"bundle_pythons\": [\"$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')\"]}', or use another Python (PYTHON=...)."
		fail "  - pip could not install $file (its last lines are above): check the network, the proxy and pip's configuration (pip config list)."
	fi
done
printf '%s\n' "$wanted" >"$stamp"
