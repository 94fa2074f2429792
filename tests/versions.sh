#!/usr/bin/env bash
# The oldest and the newest supported torch and transformers, on each Python: the wheel in an environment of its own, its commands (installed.sh: pairs, shards,
# a few steps of training), and some tests of the checkout.
#
#     tests/versions.sh FOLDER                       all of MATRIX whose Python is here; environments are kept in FOLDER and used again
#     tests/versions.sh FOLDER 3.10 2.8.0 4.56.0     one of them; "-" is the newest
#     tests/versions.sh FOLDER --without-torch       each Python that is here but python3 itself, in seconds: what needs no torch. WHEEL names a built wheel
#
# A Python is found as pythonX.Y, or below ~/.pyenv/versions. Some gigabytes are downloaded for each that has torch.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
folder=$(mkdir -p "$1" && cd "$1" && pwd)
shift
MATRIX=("3.10 2.8.0 4.56.0" "3.11 2.8.0 4.56.0" "3.12 - -" "3.13 - -")
WITHOUT_TORCH=(numpy Pillow PyYAML tqdm shtab safetensors pyarrow jinja2)
light=""
if [ "${1:-}" = --without-torch ]; then
  light=$1
elif [ $# -gt 0 ]; then
  MATRIX=("$1 ${2:--} ${3:--}")
fi
TESTS=(cli description config vocabulary sequences tags text_tokenizer latents model)

# a pyenv shim of that name answers only where that version is chosen
find_python() {
  if "python$1" -c "" 2>/dev/null; then command -v "python$1"; else find "$HOME/.pyenv/versions" -maxdepth 3 -path "*/$1.*/bin/python" 2>/dev/null | sort | tail -n 1; fi
}

exactly() { [ "$2" = - ] && echo "$1" || echo "$1==$2"; }

wheel_of() {
  local build="$folder/build"
  rm -rf "$build" && mkdir -p "$build/wheel"
  git -C "$root" archive HEAD tokun data_tools configs pyproject.toml setup.py MANIFEST.in README.md LICENSE | tar -x -C "$build"
  "$1" -m pip wheel -q --no-deps -w "$build/wheel" "$build"
  ls "$build"/wheel/tokun-*.whl
}

if [ -n "$light" ]; then
  for line in "${MATRIX[@]}"; do
    version=${line%% *}
    [ "$version" != "$(python3 -c 'import sys; print("%d.%d" % sys.version_info[:2])')" ] || continue
    python=$(find_python "$version")
    [ -n "$python" ] || { echo "== Python $version: not here, left out"; continue; }
    echo "== Python $version, without torch"
    place="$folder/python$version-without-torch"
    [ -x "$place/bin/python" ] || "$python" -m venv "$place"
    "$place/bin/pip" install -q "${WITHOUT_TORCH[@]}"
    "$place/bin/pip" install -q --force-reinstall --no-deps "${WHEEL:-$(wheel_of "$place/bin/python")}"
    "$root/tests/installed.sh" "$place" "$light"
  done
  exit
fi

for line in "${MATRIX[@]}"; do
  read -r version torch transformers <<<"$line"
  python=$(find_python "$version")
  [ -n "$python" ] || { echo "== Python $version: not here, left out"; continue; }
  place="$folder/python$version-torch$torch-transformers$transformers"
  echo "== Python $version, torch $torch, transformers $transformers"
  [ -x "$place/bin/python" ] || "$python" -m venv "$place"
  "$place/bin/pip" install -q "$(exactly torch "$torch")" "$(exactly transformers "$transformers")"
  "$place/bin/pip" install -q pytest pytest-timeout pytest-xdist hypothesis accelerate pyarrow webdataset jinja2 setuptools wheel
  wheel=$(wheel_of "$place/bin/python")
  "$place/bin/pip" install -q --force-reinstall --no-deps "$wheel"
  "$place/bin/pip" install -q "$wheel"
  "$place/bin/python" -c 'import platform, torch, transformers; print(platform.python_version(), torch.__version__, transformers.__version__)'
  "$root/tests/installed.sh" "$place"
  files=()
  for name in "${TESTS[@]}"; do [ ! -f "$root/tests/test_$name.py" ] || files+=("tests/test_$name.py"); done
  (cd "$root" && "$place/bin/python" -m pytest "${files[@]}" -m "not slow" -n 0 -p no:cacheprovider)
done
