#!/usr/bin/env bash
# TorchForce works with one set of versions only (the extra "torchforce"), so its tests have an environment of their own.
# It is made once (about 7 GB), outside the checkout, and kept under the hash of what it is made from.
# Usage: .ci/torchforce.sh [arguments of pytest]
set -euo pipefail
cd "$(dirname "$0")/.."
export PIP_DISABLE_PIP_VERSION_CHECK=1

python=${PYTHON:-python3}
made_from=$("$python" - <<'PY'
import hashlib, sys, tomllib
project = tomllib.load(open("pyproject.toml", "rb"))["project"]
extras = project["optional-dependencies"]
what = (sys.version_info[:2], project["dependencies"], extras["torchforce"], extras["dev"])
print(hashlib.sha256(repr(what).encode()).hexdigest()[:12])
PY
)
home=${XDG_CACHE_HOME:-$HOME/.cache}/mdplug-ci/torchforce-$made_from
mkdir -p "$(dirname "$home")"
exec 9>"$home.lock"
flock 9   # two runs at a time would both make it

if [ ! -e "$home/complete" ]; then
  echo "making $home"
  rm -rf "$home"
  "$python" -m venv "$home"
  "$home/bin/python" -m pip install -q --no-cache-dir -e '.[torchforce,dev]'
  touch "$home/complete"
fi
"$home/bin/python" -m pip install -q --no-deps -e .   # this checkout, whichever made the environment
echo "torchforce environment: $home"
MPLBACKEND=Agg "$home/bin/python" -m pytest -q -m torchforce tests/torchforce "$@"
