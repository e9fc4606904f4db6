#!/usr/bin/env bash
# Every molecule scenario: create, converge, idempotence, verify, destroy. Names can be given. Two at a time (JOBS), as each waits a
# good part of its time for downloads, builds and health checks; their names, ports and networks differ.
set -uo pipefail
cd "$(dirname "$0")/.."
export PATH="$PWD/.venv/bin:$PATH"
jobs=${JOBS:-2}
logs=$(mktemp -d)
trap 'rm -rf "$logs"' EXIT
if (($#)); then
	scenarios=("$@")
else
	mapfile -t scenarios < <(find molecule -mindepth 2 -maxdepth 2 -name molecule.yml -printf '%h\n' | xargs -n1 basename | sort)
	# What takes longest first, so that nothing long is left for the end.
	first=(images engine backends)
	for name in "${scenarios[@]}"; do [[ " ${first[*]} " == *" $name "* ]] || first+=("$name"); done
	scenarios=("${first[@]}")
fi

scenario() {
	local begin=$SECONDS log=$logs/$1.log
	echo "-- molecule: $1"
	if molecule test --scenario-name "$1" >"$log" 2>&1; then
		echo "-- molecule: $1: ok, $((SECONDS - begin)) s"
	else
		# The end is the clean-up: what went wrong stands before it.
		grep --max-count=3 --after-context=40 -E 'fatal:|\[ERROR\]|FAILED!' "$log"
		tail -n 40 "$log"
		echo "-- molecule: $1: FAILED, $((SECONDS - begin)) s"
		touch "$logs/$1.failed"
	fi
}

for name in "${scenarios[@]}"; do
	while (($(jobs -rp | wc -l) >= jobs)); do wait -n; done
	scenario "$name" &
done
wait
mapfile -t failed < <(find "$logs" -name '*.failed' -printf '%f\n' | sort)
echo "molecule: $((${#scenarios[@]} - ${#failed[@]})) passed, ${#failed[@]} failed ${failed[*]%.failed}"
((${#failed[@]} == 0))
