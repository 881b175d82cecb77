#!/usr/bin/env bash
# Everything about CUDA on a machine with an NVIDIA GPU, in at most ten minutes: the tests that need one, the gate on
# twenty nets with TF32 apart, IO binding, TensorRT where its libraries are, and the latency of unfolded, peers' and
# folded files in float32 and float16. One line per step, one Markdown page; a step that fails does not end the others.
#
#   scripts/cuda.sh                          # writes build/cuda.md
#   scripts/cuda.sh docs/cuda.md
#   scripts/cuda.sh build/rehearsal.md cpu   # without a GPU: the same with another provider in its place
#   QUICK=1 scripts/cuda.sh …                # as little as shows that it works
#
# The peers and the nets come with: pip install -c constraints.txt -e '.[bench,test]'
set -uo pipefail
cd "$(dirname "$0")/.."
page=${1:-build/cuda.md}
device=${2:-cuda}
options=("${@:3}")
python=${PYTHON:-$(test -x .venv/bin/python && echo .venv/bin/python || echo python3)}
log=$(mktemp)
trap 'rm -f "$log"' EXIT
failed=0

# step NAME SECONDS COMMAND...: the last line that the command prints is what it found.
step() {
	local name=$1 seconds=$2 code
	shift 2
	timeout --kill-after=10 "$seconds" "$@" >"$log" 2>&1
	code=$?
	local said
	said=$(grep -v '^[[:space:]]*$' "$log" | tail -n 1 | cut -c 1-400)
	((code == 124 || code == 137)) && said="not done within $seconds s; $said"
	if ((code != 0)); then
		failed=$((failed + 1))
		printf '\n**%s**: failed, %s\n' "$name" "$said" >>"$page"
	fi
	printf '%-10s %s\n' "$name" "$said"
}

ours() {
	local name=$1 seconds=$2
	step "$name" "$seconds" "$python" scripts/on_device.py "$name" --device "$device" --page "$page" \
		--seconds "$((seconds - 30))" ${QUICK:+--quick} "${options[@]/#/--provider-option=}"
}

mkdir -p "$(dirname "$page")"
printf '# bnfold on %s\n\n`scripts/cuda.sh` on %s.\n' "$device" "$(date -u +%Y-%m-%d)" >"$page"
[[ $device == cuda ]] || printf '\nA rehearsal: %s stands in for the GPU.\n' "$device" >>"$page"
ours machine 60
mapfile -t tests < <(grep -l 'mark\.cuda' tests/test_*.py)
step tests 110 "$python" -m pytest -q -p no:cacheprovider -m cuda "${tests[@]}"
printf '\n**tests**: %s\n\n```\n%s\n```\n' "$(tail -n 1 "$log")" "$(grep -E '^(FAILED|ERROR|SKIPPED)' "$log" | cut -c 1-200)" >>"$page"
ours gate 150
ours binding 60
ours tensorrt 80
ours latency 140
printf 'wrote      %s, %d of 6 steps failed\n' "$page" "$failed"
((failed == 0))
