# Sourced by scripts/test: ensure_browser
# finds Chromium for the tests of the report's page, or installs Debian's where that is possible.
# Without one those tests are skipped, and say so.

ensure_browser() {
  local name
  for name in chromium chromium-browser google-chrome; do
    if command -v "$name" >/dev/null; then
      return
    fi
  done
  if [[ $(id -u) != 0 ]] || ! command -v apt-get >/dev/null; then
    echo "no Chromium: the tests of the report's page are skipped (Debian: apt-get install chromium)"
    return
  fi
  echo "installing chromium for the tests of the report's page"
  export DEBIAN_FRONTEND=noninteractive
  if ! { timeout 120 apt-get update -qq &&
    timeout 300 apt-get install -y -qq --no-install-recommends chromium fonts-liberation; } >/dev/null 2>&1; then
    echo "chromium could not be installed: the tests of the report's page are skipped"
  fi
}
