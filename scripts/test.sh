#!/usr/bin/env bash
# make test: everything, in phases, with progress. Phases can be named to run them alone, one after the other: scripts/test.sh lint unit
set -uo pipefail
cd "$(dirname "$0")/.."
export PATH="$PWD/.venv/bin:$PATH" ANSIBLE_NOCOLOR=1 PYTHONUNBUFFERED=1
started=$SECONDS
logs=$(mktemp -d)
trap 'rm -rf "$logs"' EXIT

# Two lanes side by side: each waits a good part of its time for builds and health checks.
lanes=("lint integration e2e" "unit fuzz molecule fresh faults")
if (($#)); then
	lanes=("$*")
elif [[ -n ${AISHA_TEST_HOST:-} ]]; then
	echo "This is a test host itself: the fresh-machine phase is left out."
	lanes=("lint integration e2e" "unit fuzz molecule faults")
fi

cat <<TEXT
This runs: prepare, then ${lanes[*]}.
It uses sites of its own (names wht-* and mol-*, loopback ports from 18000 up, networks of their own), never the stack of make up, and leaves
nothing behind but .venv, the Docker engine, the base image and the build cache. About 25 minutes from cold.

TEXT
scripts/controller.sh requirements.txt requirements-dev.txt webhook/requirements.txt || exit 1

# A phase that hangs (a test worker that crashed, say) ends and fails instead of keeping everything waiting.
bounded() { timeout --kill-after=60 "${PHASE_SECONDS:-1500}" "$@"; }

run_phase() {
	case $1 in
	prepare) scripts/test-prepare.sh ;;
	lint) scripts/lint.sh ;;
	unit) bounded python -m pytest tests/unit -q -n 2 ;;
	# Most of it waits: for leases, timeouts, builds. Tests are shared out one by one (tests/integration/conftest.py).
	integration) bounded python -m tests.support.backends python -m pytest tests/integration -q -m "not cluster" -n 3 --dist loadfile --no-loadscope-reorder --durations=15 ;;
	# Debian's Chromium, installed when it is missing; SCREENSHOTS=docs/screenshots keeps a picture of each page.
	browser) scripts/test-browser.sh ;;
	fuzz) bounded python -m pytest tests/fuzz -q ;;
	faults) bounded python -m pytest tests/faults -v --durations=10 ;;
	# Without the scenario of role images, which takes longest: fresh and e2e build, push and prove the same images; it is in make test-cluster.
	molecule) bounded scripts/test-molecule.sh engine backends edge stack ;;
	e2e) bounded python -m pytest tests/e2e -v -m "not cluster" --durations=10 ;;
	fresh) bounded python -m pytest tests/fresh -v -s -k "${FRESH:-debian13}" ;;
	cluster) scripts/test-molecule.sh images && ROLLOUT_EVERY=1 python -m pytest tests/unit/modules/test_rollout_breaks_off.py tests/integration/modules/test_base_image_real.py tests/e2e tests/cluster -v --durations=10 ;; # only by its name: make test-cluster
	*)
		echo "There is no phase $1: lint unit fuzz integration browser molecule e2e faults fresh cluster" >&2
		return 2
		;;
	esac
}

lane() {
	local name begin result
	for name in "$@"; do
		begin=$SECONDS
		if run_phase "$name" >"$logs/$name.log" 2>&1 </dev/null; then result=ok; else result=FAILED; fi
		mv "$logs/$name.log" "$logs/$name.done" # before it is told: who reads of the result looks into it
		printf '%s %s %d\n' "$result" "$name" $((SECONDS - begin)) >>"$logs/results"
	done
}

told=0
tell() { # what has ended since the last time
	local result name seconds
	[[ -f $logs/results ]] || return 0
	while read -r result name seconds; do
		printf '\n==== %s: %s after %d s (at %d s)\n' "$name" "$result" "$seconds" $((SECONDS - started))
		if [[ $result == ok ]]; then tail -n 25 "$logs/$name.done"; else tail -n 400 "$logs/$name.done"; fi
		told=$((told + 1))
	done < <(tail -n +$((told + 1)) "$logs/results")
}

watch_lanes() { # until the jobs named have ended
	local next=$((SECONDS + 30)) file pid alive=1
	while ((alive)); do
		alive=0
		for pid in "$@"; do kill -0 "$pid" 2>/dev/null && alive=1; done
		tell
		if ((SECONDS >= next)); then
			for file in "$logs"/*.log; do
				[[ -f $file ]] && printf '[%4d s] %s: %s\n' $((SECONDS - started)) "$(basename "$file" .log)" "$(tail -n 1 "$file" | cut -c1-150)"
			done
			next=$((SECONDS + 30))
		fi
		sleep 0.5
	done
	tell
}

if ! (($#)) || [[ " $* " =~ \ (integration|browser|e2e|molecule|faults|fresh|cluster)\  ]]; then
	lane prepare &
	watch_lanes $!
fi
if ! grep -q '^FAILED prepare' "$logs/results" 2>/dev/null; then
	pids=()
	for phases in "${lanes[@]}"; do
		# shellcheck disable=SC2086  # a lane is a list of phases
		lane $phases &
		pids+=($!)
	done
	watch_lanes "${pids[@]}"
fi

printf '\n==== Summary (%d s)\n' $((SECONDS - started))
column -t "$logs/results" 2>/dev/null || cat "$logs/results"
if grep -q '^FAILED' "$logs/results"; then
	echo "Some phases failed. One alone: scripts/test.sh PHASE"
	exit 1
fi
echo "All passed. A stack to use: make up"
