#!/usr/bin/env bash
# Pins requirements*.in with hashes. The images run Python 3.13, so the service's lock holds for 3.11 to 3.13.
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/controller.sh requirements.txt requirements-dev.txt webhook/requirements.txt
for name in requirements webhook/requirements requirements-dev bench/requirements; do
	.venv/bin/pip-compile --quiet --generate-hashes --no-emit-index-url --no-emit-find-links --strip-extras --allow-unsafe \
		--output-file "$name.txt" "$name.in" "$@"
done
