#!/usr/bin/env bash
# Everything that must hold before a change goes in. Runs from a fresh clone, from any directory.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
build=$root/build

install_headers() {
  [[ -f /usr/include/gtest/gtest.h && -f /usr/include/nlohmann/json.hpp ]] ||
    debian libgtest-dev nlohmann-json3-dev
}

lint() {
  ruff check .
  ruff format --check .
  find csrc cuda tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' |
    xargs clang-format --dry-run -Werror
}

# cmake_build SOURCE NAME OPTIONS...: builds SOURCE in build/NAME.
cmake_build() {
  cmake -S "$1" -B "$build/$2" -G Ninja -DPython3_EXECUTABLE="$root/.venv/bin/python" \
    --log-level=WARNING "${@:3}"
  cmake --build "$build/$2" --parallel "$(nproc)"
}

# The tests as a project of their own, against the installed package.
cpp_tests() {
  cmake_build tests/cpp tests -DCMAKE_BUILD_TYPE=Release -DCMAKE_PREFIX_PATH="$prefix"
  "$build/tests/asymq_tests" --gtest_brief=1
}

consumer() {
  cmake_build tests/consumer consumer -DCMAKE_BUILD_TYPE=Release -DCMAKE_PREFIX_PATH="$prefix"
  "$build/consumer/consumer"
}

# What a LibTorch archive has, of this torch's files: no Python.
libtorch_archive() {
  local torch
  torch=$(python -c 'import os, torch; print(os.path.dirname(torch.__file__))')
  mkdir -p "$build/libtorch"
  ln -sfn "$torch/lib" "$torch/include" "$build/libtorch/"
  python -c 'import torch; print(torch.__version__)' >"$build/libtorch/build-version"
}

# The library and its tests within another project, instrumented, without CUDA and against libtorch
# without Python. What that project installs needs neither the build tree nor Python.
sanitizers() {
  local installed=$build/installed
  libtorch_archive
  cmake_build tests/subproject subproject -DCMAKE_BUILD_TYPE=RelWithDebInfo \
    -DCMAKE_INSTALL_PREFIX="$installed" -DASYMQ_TORCH_ROOT="$build/libtorch" \
    -DPython3_EXECUTABLE=/nonexistent -DASYMQ_CUDA=OFF -DASYMQ_BUILD_TESTS=ON \
    -DASYMQ_SANITIZE=address,undefined
  # No leak check: libtorch keeps its registries and thread pools until the process ends.
  local -x ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1
  "$build/subproject/asymq/tests/cpp/asymq_tests" --gtest_brief=1
  rm -rf "$installed"
  cmake --install "$build/subproject" >/dev/null
  "$installed/bin/user"
  [[ -z $(readelf -d "$installed/bin/user" "$installed"/lib/*.so | grep "$build/subproject") ]]
  [[ -z $(find "$installed" -name '*.py') ]]
}

# What torch's own operations make of the operators, where no native library fits.
composite_tests() {
  ASYMQ_NATIVE=0 OMP_NUM_THREADS=1 python -m pytest tests/python -m "composite and not native" \
    -k "not millions" --numprocesses "$(nproc)" --dist loadfile
}

step "Environment" create_environment
step "Headers of the C++ tests" install_headers
step "Build and install" install_package test
prefix=$(python -m asymq --cmake-prefix-path)
step "Lint" lint
step "Types" mypy
step "C++ tests" cpp_tests
step "Consumer project" consumer
step "C++ tests under AddressSanitizer and UndefinedBehaviorSanitizer" sanitizers
step "Python tests on the composite operators" composite_tests
# Last, so that pytest's summary is the last line.
heading "Python tests"
OMP_NUM_THREADS=1 exec python -m pytest tests/python --numprocesses "$(nproc)" --dist loadfile "$@"
