# Sourced by the other scripts: ensure_venv DIRECTORY EXTRAS
# makes a virtual environment with this project installed, or keeps it if it is up to date.

ensure_venv() {
  local directory=$1 extras=$2 wanted
  wanted=$(
    "${PYTHON:-python3}" -VV
    pwd
    echo "$extras"
    cat pyproject.toml constraints.txt
  )
  if [[ -x $directory/bin/python && $(cat "$directory/installed" 2>/dev/null) == "$wanted" ]]; then
    return
  fi
  if ! "${PYTHON:-python3}" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    echo "error: Python 3.11 or newer is needed; name one with PYTHON=/path/to/python3.11" >&2
    return 1
  fi
  echo "installing into $directory (about a minute)"
  "${PYTHON:-python3}" -m venv "$directory"
  "$directory/bin/python" -m pip install --quiet --disable-pip-version-check \
    -c constraints.txt -e ".[$extras]"
  printf '%s\n' "$wanted" >"$directory/installed"
}
