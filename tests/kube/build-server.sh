#!/usr/bin/env bash
# Prints the directory with a real Kubernetes API server for the tests: kube-apiserver, etcd,
# kube-scheduler and kubectl. Sources, in this order:
#
#   1. KUBEBUILDER_ASSETS, if it names a directory with kube-apiserver and etcd
#      (as created by setup-envtest);
#   2. the cache, filled by an earlier run;
#   3. a current Kubernetes, built from Go modules (modules.sh);
#   4. Kubernetes 1.20.2, built from Debian 12's source package (debian.sh).
#
# KUBE=1.36 (or another prefix of the current version) allows 2 and 3 only, KUBE=1.20 2 and 4 only.
#
# Writes only to the cache and installs nothing: packages and modules are unpacked below it, so root
# is not required. (Installing etcd-server would also start a service.)
#
# stdout: the directory and nothing else. stderr: progress and errors.
set -euo pipefail

readonly HERE=${BASH_SOURCE[0]%/*}
SERVER=$(cd "$HERE/server" && pwd)
CURRENT_VERSION=$(sed -nE 's/^.*k8s\.io\/kubernetes v([0-9.]+)$/\1/p' "$SERVER/go.mod")
readonly SERVER CURRENT_VERSION
readonly DEBIAN_VERSION=1.20.2

readonly CACHE="${XDG_CACHE_HOME:-$HOME/.cache}/virtnode-test"
# A fixed name, so that a run under the lock can remove the leftovers of a killed one.
readonly SCRATCH="$CACHE/kubernetes.building"
readonly UNPACKED="$SCRATCH/unpacked"
# Minutes for which a failure to build the current version is remembered.
readonly REMEMBERED=60

say() { printf '%s: %s\n' "${0##*/}" "$*" >&2; }

die() {
  say "$*"
  exit 1
}

# shellcheck source=tests/kube/apt.sh
. "$HERE/apt.sh"
# shellcheck source=tests/kube/modules.sh
. "$HERE/modules.sh"
# shellcheck source=tests/kube/debian.sh
. "$HERE/debian.sh"

has_binaries() { # directory name...
  local directory=$1 name
  shift
  for name in "$@"; do
    [[ -x "$directory/$name" ]] || return 1
  done
}

cached() { # version
  has_binaries "$CACHE/kubernetes-$1" kube-apiserver kube-scheduler etcd kubectl
}

# Puts the result in its place.
keep() { # version
  local target=$CACHE/kubernetes-$1
  "$SCRATCH/result/kube-apiserver" --version | grep -qx "Kubernetes v$1" ||
    die "the built server does not report version $1"
  # Renamed last, so that a directory with this name is always complete.
  rm -rf "$target"
  mv -T "$SCRATCH/result" "$target" || die "$target cannot be written"
  say "built Kubernetes $1 in ${SECONDS} s"
}

# Takes the lock of the cache until the end. A waiting caller uses the result of the other one.
lock() {
  mkdir -p "$CACHE"
  exec 9>"$CACHE/kubernetes.lock"
  flock -n 9 || {
    say "waiting for another process that builds Kubernetes"
    flock 9
  }
  trap 'rm -rf "$SCRATCH"' EXIT
  rm -rf "$SCRATCH"
  mkdir -p "$SCRATCH/result"
}

# False, after a sentence that names the reason, if this machine cannot build it.
provide_current() {
  local failed=$CACHE/kubernetes-$CURRENT_VERSION.failed
  cached "$CURRENT_VERSION" && return
  if [[ $1 != asked && -n $(find "$failed" -mmin -$REMEMBERED 2>/dev/null) ]]; then
    say "$(<"$failed")"
    return 1
  fi
  lock
  cached "$CURRENT_VERSION" && return
  if ! can_build_from_modules; then
    printf 'Kubernetes %s could not be built less than %s minutes ago; KUBE=%s tries again\n' \
      "$CURRENT_VERSION" "$REMEMBERED" "${CURRENT_VERSION%.*}" >"$failed"
    return 1
  fi
  build_from_modules || die "Kubernetes $CURRENT_VERSION could not be built: see above"
  keep "$CURRENT_VERSION"
}

provide_debian() {
  cached "$DEBIAN_VERSION" && return
  check_distribution
  lock
  cached "$DEBIAN_VERSION" && return
  build_from_debian
  keep "$DEBIAN_VERSION"
}

main() {
  local assets=${KUBEBUILDER_ASSETS:-} version=$CURRENT_VERSION
  if [[ -n "$assets" ]]; then
    if has_binaries "$assets" kube-apiserver etcd; then
      printf '%s\n' "$assets"
      return
    fi
    say "KUBEBUILDER_ASSETS has no kube-apiserver and etcd: looking elsewhere"
  fi

  case ${KUBE:-} in
  '')
    if ! provide_current if-possible; then
      version=$DEBIAN_VERSION
      say "testing with Kubernetes $version instead, which has no admission policies, no CEL rules," \
        "no selectable fields and no watch lists: what depends on them is NOT TESTED"
      provide_debian
    fi
    ;;
  "$DEBIAN_VERSION" | "${DEBIAN_VERSION%.*}")
    version=$DEBIAN_VERSION
    provide_debian
    ;;
  "$CURRENT_VERSION" | "${CURRENT_VERSION%.*}") provide_current asked || exit ;;
  *)
    die "KUBE=$KUBE: this builds ${CURRENT_VERSION%.*} and ${DEBIAN_VERSION%.*};" \
      "for another version set KUBEBUILDER_ASSETS"
    ;;
  esac
  printf '%s\n' "$CACHE/kubernetes-$version"
}

main "$@"
