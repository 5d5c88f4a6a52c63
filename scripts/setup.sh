# Sourced by test.sh and quickstart.sh: from a bare checkout to an installed package.
# Leaves $root, the checkout and working directory; python and pip's tools then come from $root/.venv.
# TORCH_VERSION=2.11.0 and the like choose another torch than the newest supported one.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
export PATH=$root/.venv/bin:$PATH
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1 DEBIAN_FRONTEND=noninteractive
# Where no GPU is, PTX alone, which any newer one translates, takes a quarter of the time to compile.
nvidia-smi >/dev/null 2>&1 || export CUDAARCHS=${CUDAARCHS:-80-virtual}

heading() { printf '\n== %s\n' "$*"; }

# step HEADING COMMAND...: runs the command under a heading and says how long it took.
step() {
  local start=$SECONDS
  heading "$1"
  "${@:2}"
  echo "-- $1: $((SECONDS - start)) s"
}

# debian PACKAGE...: installs what is missing, or says what to install.
debian() {
  if [[ $(id -u) == 0 ]] && command -v apt-get >/dev/null; then
    apt-get update -qq && apt-get install -qq -y --no-install-recommends "$@" </dev/null
  else
    echo "Please install: $*   (Debian: sudo apt-get install $*)" >&2
    return 1
  fi
}

create_environment() {
  command -v g++ >/dev/null || debian g++
  if [[ ! -x .venv/bin/python ]]; then
    python3 -c 'import ensurepip, sysconfig; open(sysconfig.get_path("include") + "/Python.h")' 2>/dev/null ||
      debian python3-venv python3-dev
    python3 -m venv .venv
  fi
  local torch="torch>=2.11,<2.16"
  [[ -z ${TORCH_VERSION:-} ]] || torch="torch==$TORCH_VERSION"
  # What the build needs. Installed requirements are kept, so a second run needs no network.
  python -m pip install --quiet "$torch" "setuptools>=70" wheel ninja "cmake>=3.24"
}

# install_package EXTRA: asymq and what pyproject.toml lists under that extra.
install_package() {
  python -m pip install --quiet --no-build-isolation --editable ".[$1]"
  python -m asymq --info
}
