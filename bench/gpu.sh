#!/usr/bin/env bash
# Builds for the GPU of this machine, runs the tests that need it, and measures: in less than 10 minutes.
#
# Needs nvcc, and a Python with torch for CUDA, pytest and matplotlib. Other packages may lie in .whl/
# as wheels (on a machine without network):
#   pip download --no-deps --only-binary=:all: --python-version 3.12 --platform manylinux_2_28_x86_64 \
#     --platform manylinux_2_17_x86_64 -d .whl scikit-build-core pybind11 apache-tvm-ffi pathspec
# Results go to $OUT, by default bench/results; the exit status is that of the first part that failed.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${OUT:-bench/results}
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
status=0
part() { # title, command: says how it went, and goes on
  printf '\n=== %s\n' "$1"
  shift
  "$@" || { local code=$?; echo "FAILED ($code): $*"; [ "$status" -ne 0 ] || status=$code; }
}

if compgen -G ".whl/*.whl" >/dev/null; then
  python3 -m pip install -q --no-index --no-deps --target "$site" .whl/*.whl || exit
fi
export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
capability=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -n 1 | tr -d .)
printf '=== Build for %s\n' "$capability"
python3 -m pip install -q --no-build-isolation --no-deps --target "$site" . \
  -Ccmake.define.ADAMAX_EXT_CUDA=ON "-Ccmake.define.ADAMAX_EXT_CUDA_ARCHITECTURES=$capability" || exit
python3 -m adamax_ext info

part "Tests" timeout 200 python3 -m pytest -q -p no:cacheprovider tests/test_cuda.py
if command -v compute-sanitizer >/dev/null; then
  some="offset or loss_scale or transposed or global_norm or (bfloat16-bfloat16 and (average or accumulation))"
  for tool in memcheck initcheck; do
    part "compute-sanitizer, $tool" timeout 60 compute-sanitizer --tool "$tool" --error-exitcode 9 --target-processes all \
      python3 -m pytest -q -x -p no:cacheprovider tests/test_cuda.py -k "$some"
  done
fi
part "Measurements" timeout 150 python3 bench/gpu.py --out "$out"
exit "$status"
