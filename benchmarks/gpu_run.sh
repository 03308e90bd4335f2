#!/usr/bin/env bash
# Everything that only a GPU can show, in one call of under ten minutes: benchmarks/gpu_run.sh FOLDER
#
# Runs from the source tree; only torch and triton must be installed. PYTHON names another interpreter than python3.
# Every step has a time limit and a log. FOLDER/summary.json is rewritten after each, so that it is complete up to the
# point where a run was cut off. Exit status 1 if any step did not pass, after all of them ran.
set -u

if [ $# -ne 1 ]; then
    echo "usage: $0 FOLDER" >&2
    exit 2
fi
mkdir -p "$1/steps" || exit 2
OUT=$(cd "$1" && pwd)
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
PYTHON=${PYTHON:-python3}
SANITIZER=$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2>/dev/null)
rm -f "$OUT"/steps/* "$OUT/summary.json"
cd "$ROOT" || exit 2
# An installation gives the folder benchmarks/ this name; here a link does.
PACKAGES=$(mktemp -d) || exit 2
trap 'rm -rf "$PACKAGES"' EXIT
ln -s "$ROOT/benchmarks" "$PACKAGES/smca_benchmarks"
export PYTHONPATH="$ROOT:$PACKAGES${PYTHONPATH:+:$PYTHONPATH}"

# The tests of code that runs on a GPU; those of commands and metadata run elsewhere.
KERNEL_TESTS=()
for path in tests/backends tests/nn tests/test_attention.py; do
    [ -e "$path" ] && KERNEL_TESTS+=("$path")
done

record() { # name status exit_code seconds
    printf '{"step": "%s", "status": "%s", "exit_code": %s, "seconds": %s}\n' "$@" > "$OUT/steps/$1.json"
    echo "$1: $2 ($4 s)"
}

summarise() {
    local passed=true
    grep -L '"status": "passed"' "$OUT"/steps/*.json | grep -q . && passed=false
    {
        printf '{"all_passed": %s, "steps": [\n' "$passed"
        cat "$OUT"/steps/*.json | paste -sd, | sed 's/},{/},\n{/g'
        printf ']}\n'
    } > "$OUT/.summary.json"
    mv "$OUT/.summary.json" "$OUT/summary.json"
    $passed
}

step() { # name seconds command...
    local name=$1 limit=$2 start=$SECONDS code status
    shift 2
    timeout --kill-after=5 "$limit" "$@" > "$OUT/$name.log" 2>&1
    code=$?
    case $code in
        0) status=passed ;;
        124 | 137) status="timed out" ;;
        *) status=failed ;;
    esac
    record "$name" "$status" "$code" $((SECONDS - start))
    [ "$status" = passed ] || tail -n 15 "$OUT/$name.log"
}

missing() { # name what
    echo "$2 is not on this machine" | tee "$OUT/$1.log"
    record "$1" missing null 0
}

smca() { # name seconds arguments...
    local name=$1 limit=$2
    shift 2
    step "$name" "$limit" "$PYTHON" -c "import sys; from smca_kernels.tools.cli import main; sys.exit(main())" "$@"
}

sanitize() { # tool seconds
    local options=
    # Triton asks for a mode of shared memory that drivers may refuse, and goes on without it: no fault of the kernels.
    [ "$1" = memcheck ] && options="--report-api-errors no"
    # Torch's cache would hide an access past a tensor's end in the memory that it gave to another.
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 step "$1" "$2" \
        "$SANITIZER" --tool "$1" --error-exitcode 86 $options "$PYTHON" -m smca_benchmarks.sanitize
}

smca env 20 env --json "$OUT/env.json"
summarise

# Side by side, as compiling the kernels on the host takes most of the time, and nothing here is timed.
for dtype in float32 float16 bfloat16; do
    smca "parity-$dtype" 230 parity --dtype "$dtype" --json "$OUT/parity-$dtype.json" --junit "$OUT/parity-$dtype.xml" &
done
if "$PYTHON" -c "import pytest" 2>/dev/null; then
    # Names each test as it ends, for a run that is cut off.
    options=(-v -p no:cacheprovider --junitxml="$OUT/tests.xml")
    "$PYTHON" -c "import xdist" 2>/dev/null && options+=(-n $(($(nproc) / 2)))
    step tests 230 "$PYTHON" -m pytest "${options[@]}" "${KERNEL_TESTS[@]}" &
else
    missing tests pytest
fi
for tool in memcheck racecheck; do
    if [ -n "$SANITIZER" ]; then
        sanitize "$tool" 150 &
    else
        missing "$tool" compute-sanitizer
    fi
done
wait
summarise

step kernels 60 "$PYTHON" -m smca_benchmarks.kernel_times --json "$OUT/kernels.json"
summarise
# Writes its file after each workload, and begins none after --seconds.
smca bench 170 bench --bars --seconds 140 --json "$OUT/bench.json"
summarise
picture=()
"$PYTHON" -c "import matplotlib" 2>/dev/null && picture=(--picture "$OUT/profile.png")
smca profile 30 profile --workload full-b2 --json "$OUT/profile.json" --trace "$OUT/trace.json" "${picture[@]}"
summarise
if "$PYTHON" -c "import scipy, torchvision" 2>/dev/null; then
    smca bench-model 60 bench-model --quick --json "$OUT/bench-model.json"
else
    missing bench-model "scipy or torchvision"
fi
summarise
