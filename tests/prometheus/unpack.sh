#!/usr/bin/env bash
# Prints the directory with prometheus and promtool for the tests. Sources, in this order:
#
#   1. the PATH;
#   2. the cache, filled by an earlier run;
#   3. the distribution's package, downloaded and unpacked into the cache. Installing it would
#      start a service.
#
# stdout: the directory and nothing else. stderr: progress and errors.
set -euo pipefail

readonly CACHE="${XDG_CACHE_HOME:-$HOME/.cache}/virtnode-test"
readonly TARGET="$CACHE/prometheus"

say() { printf '%s: %s\n' "${0##*/}" "$*" >&2; }

if promtool=$(command -v promtool) && command -v prometheus >/dev/null; then
  dirname "$promtool"
  exit 0
fi

mkdir -p "$CACHE"
exec 9>"$TARGET.lock"
flock 9
if [[ ! -x $TARGET/promtool || ! -x $TARGET/prometheus ]]; then
  scratch=$(mktemp -d "$CACHE/prometheus.XXXXXX")
  trap 'rm -rf -- "$scratch"' EXIT
  # As root, apt would switch to a user that cannot enter a cache below root's home.
  private=(-qq -o APT::Sandbox::User=root -o "Dir::Cache=$scratch")
  mkdir -p "$scratch/archives/partial" "$scratch/lists/partial"
  say "downloading the package prometheus (20 to 30 MB, once)"
  if ! (cd "$scratch" && apt-get "${private[@]}" download prometheus) >&2 2>/dev/null; then
    # This machine's package lists may be empty or outdated.
    private+=(-o "Dir::State::lists=$scratch/lists")
    apt-get "${private[@]}" update >&2 || say "apt-get update had errors"
    if ! (cd "$scratch" && apt-get "${private[@]}" download prometheus) >&2; then
      say "apt has no package prometheus: put prometheus and promtool on the PATH"
      exit 1
    fi
  fi
  dpkg-deb -x "$scratch"/prometheus_*.deb "$scratch/unpacked"
  rm -rf -- "$TARGET"
  mv -T -- "$scratch/unpacked/usr/bin" "$TARGET"
fi
echo "$TARGET"
