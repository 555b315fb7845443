#!/usr/bin/env bash
# Builds for the GPU of this machine, measures, and then runs the tests that need it: in less than 10 minutes.
#
# Needs nvcc, and a Python with torch for CUDA, pytest and matplotlib. Other packages may lie in .whl/
# as wheels (on a machine without network):
#   pip download --no-deps --only-binary=:all: --python-version 3.12 --platform manylinux_2_28_x86_64 \
#     --platform manylinux_2_17_x86_64 -d .whl scikit-build-core pybind11 apache-tvm-ffi pathspec
# Results go to $OUT, by default bench/results; the exit status is that of the first part that failed.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${OUT:-bench/results} whole=580 status=0
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
part() { # title, most seconds, command: says how it went, and goes on
  local title=$1 most=$2 left=$((whole - SECONDS)) code=0
  shift 2
  printf '\n=== %s, at %d s\n' "$title" "$SECONDS"
  [ "$left" -ge 1 ] || left=1
  timeout --kill-after=20 "$((most < left ? most : left))" "$@" || code=$?
  [ "$code" -eq 0 ] || echo "FAILED ($code): $*"
  [ "$status" -ne 0 ] || status=$code
}

if compgen -G ".whl/*.whl" >/dev/null; then
  python3 -m pip install -q --no-index --no-deps --target "$site" .whl/*.whl || exit
fi
export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
capability=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -n 1 | tr -d .)
part "Build for $capability" 240 python3 -m pip install -q --no-build-isolation --no-deps --target "$site" . \
  -Ccmake.define.ADAMAX_EXT_CUDA=ON "-Ccmake.define.ADAMAX_EXT_CUDA_ARCHITECTURES=$capability"
[ "$status" -eq 0 ] || exit "$status"
python3 -m adamax_ext info

fast="^(?!.*(compiled|jit|Keras|for-loop))" # the others compile for minutes
part "Measurements" 240 python3 bench/peers.py --device cuda --only "$fast" --out "$out"
part "Tests" 120 python3 -m pytest -q -p no:cacheprovider tests/test_cuda.py tests/test_torch_gpu.py
if command -v compute-sanitizer >/dev/null; then
  some="offset or loss_scale or transposed or global_norm or (bfloat16-bfloat16 and (average or accumulation))"
  for tool in memcheck initcheck; do
    part "compute-sanitizer, $tool" 60 compute-sanitizer --tool "$tool" --error-exitcode 9 --target-processes all \
      python3 -m pytest -q -x -p no:cacheprovider tests/test_cuda.py -k "$some"
  done
fi
exit "$status"
