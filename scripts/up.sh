#!/usr/bin/env bash
# make up: the controller's environment, then site.yml. Arguments go to ansible-playbook.
set -euo pipefail
cd "$(dirname "$0")/.."
started=$SECONDS

cat <<'TEXT'
This makes a working webhook stack on this machine (inventory/local), or on the hosts of another inventory (ARGS="-i …"):
  1. .venv with the pinned requirements of the controller
  2. a preflight that changes nothing, then the Docker engine where there is none
  3. base image, registry, PostgreSQL, Redis and object store, each in a container
  4. webhook-api and nginx-webhook: built, pushed, proven by digest, started behind health gates
  5. a signed delivery through nginx, followed to its row, its stream entry and its archived object
Two to four minutes the first time, seconds afterwards. Dry run: make check. Log of an error: the last lines below.

TEXT
if [[ -n ${BUNDLE:-} ]]; then
	[[ -f $BUNDLE ]] || { echo "There is no bundle $BUNDLE." >&2; exit 1; }
	BUNDLE=$(realpath "$BUNDLE")
	export BUNDLE
	set -- -e "bundle=$BUNDLE" "$@"
fi
scripts/controller.sh requirements.txt

become=()
local_inventory() { ! printf '%s\n' "$@" | grep -qE '^(-i|--inventory|-K|--ask-become-pass)'; }
if [[ $(id -u) -ne 0 ]] && local_inventory "$@" && ! sudo -n true 2>/dev/null; then
	if [[ ! -t 0 ]]; then
		echo "sudo asks for a password, and there is no terminal to ask on: run as root, or allow sudo without a password." >&2
		exit 1
	fi
	become=(--ask-become-pass)
fi
export PATH="$PWD/.venv/bin:$PATH"
ansible-playbook site.yml "${become[@]}" "$@"
printf '\nDone in %d s. Commands: make status, make verify, make update (quick update), make check (dry run), make send (a signed delivery), make down. Guide: docs/WEBHOOK_DEPLOYMENT.md\n' $((SECONDS - started))
