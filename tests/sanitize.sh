#!/usr/bin/env bash
# The kernel tests on a build that stops at the first wrong memory access or undefined operation, on every
# instruction set that this machine runs. Takes gcc; arguments go to pytest instead of the default ones.
set -euo pipefail
cd "$(dirname "$0")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

python3 -m venv "$work/venv"
export PATH="$work/venv/bin:$PATH" CC=gcc
pip install -q numpy scipy scikit-learn pytest hypothesis meson-python meson ninja Cython

checks=-fsanitize=float-cast-overflow,float-divide-by-zero
pip install -q --no-build-isolation --no-deps . -Csetup-args=-Db_sanitize=address,undefined \
    -Csetup-args=-Db_lundef=false -Csetup-args=-Dc_args="$checks -fno-sanitize-recover=all -fno-omit-frame-pointer -g"

# The interpreter is not instrumented: the run times come first. Python's own allocator would hide an array's end.
for library in libasan libubsan libstdc++; do preload+=:$(gcc -print-file-name=$library.so); done
export ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 PYTHONMALLOC=malloc
(($#)) || set -- tests/test_kernels.py tests/test_twins.py tests/test_planes.py tests/test_search.py \
    tests/test_search_codes.py tests/test_groups.py
LD_PRELOAD=${preload#:} pytest --capture=sys -p no:cacheprovider "$@"  # reports go past pytest's capture
