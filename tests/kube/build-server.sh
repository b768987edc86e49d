#!/usr/bin/env bash
# Prints the directory with a real Kubernetes API server for the tests: kube-apiserver, etcd,
# kube-scheduler and kubectl. Sources, in this order:
#
#   1. KUBEBUILDER_ASSETS, if it names a directory with kube-apiserver and etcd
#      (as created by setup-envtest);
#   2. the cache, filled by an earlier run;
#   3. Debian 12's source package, which contains upstream's complete source with
#      vendored dependencies, although Debian builds only kubectl from it. The build
#      takes about five minutes and 3 GB of scratch space on two cores.
#
# Writes only to the cache and installs nothing: apt downloads the packages with a private
# state, and they are unpacked, so root is not required. (Installing etcd-server would also
# start a service.)
#
# stdout: the directory and nothing else. stderr: progress and errors.
set -euo pipefail

readonly VERSION=1.20.2
readonly GO_PACKAGE=golang-1.19-go
readonly GO_ROOT=usr/lib/go-1.19
readonly BINARIES=(kube-apiserver kube-scheduler etcd kubectl)

readonly CACHE="${XDG_CACHE_HOME:-$HOME/.cache}/virtnode-test"
readonly TARGET="$CACHE/kubernetes-$VERSION"
# A fixed name, so that a run under the lock can remove the leftovers of a killed one.
readonly SCRATCH="$CACHE/kubernetes-$VERSION.building"
readonly SOURCE="$SCRATCH/go/src/k8s.io/kubernetes" # where GOPATH mode looks for it
readonly UNPACKED="$SCRATCH/unpacked"

say() { printf '%s: %s\n' "${0##*/}" "$*" >&2; }

die() {
  say "$*"
  exit 1
}

die_without_source() { # subject of the message
  die "$* no source of Kubernetes $VERSION with a Go that builds it: set KUBEBUILDER_ASSETS" \
    "to a directory with kube-apiserver and etcd, as created by setup-envtest"
}

has_binaries() { # directory name...
  local directory=$1 name
  shift
  for name in "$@"; do
    [[ -x "$directory/$name" ]] || return 1
  done
}

# apt with the machine's sources and keys, and a private state. As root it would otherwise
# switch to the user _apt, which cannot enter a cache below root's home.
private_apt() { # apt tool and arguments
  local tool=$1
  shift
  "$tool" -qq \
    -o Dir::Etc::sourcelist=/dev/null \
    -o Dir::Etc::sourceparts="$SCRATCH/apt/sources" \
    -o Dir::State::lists="$SCRATCH/apt/lists" \
    -o Dir::Cache="$SCRATCH/apt/cache" \
    -o Acquire::Languages=none \
    -o APT::Sandbox::User=root \
    "$@"
}

# The machine's sources, with source packages enabled, in both of apt's formats.
copy_sources_with_source_packages() {
  local file
  mkdir -p "$SCRATCH"/apt/{sources,lists/partial,cache/archives/partial}
  for file in /etc/apt/sources.list.d/*.sources; do
    [[ -r "$file" ]] || continue
    sed -E 's/^Types:.*/Types: deb deb-src/I' "$file" >"$SCRATCH/apt/sources/${file##*/}"
  done
  for file in /etc/apt/sources.list /etc/apt/sources.list.d/*.list; do
    [[ -r "$file" ]] || continue
    sed -nE 's/^[[:space:]]*deb[[:space:]]+(.*)/deb \1\ndeb-src \1/p' "$file" \
      >"$SCRATCH/apt/sources/${file##*/}"
  done
}

# All versions of the source package in apt's lists, possibly none.
source_versions() {
  private_apt apt-cache showsrc --only-source kubernetes 2>/dev/null |
    sed -n 's/^Version: //p'
}

download() {
  local source_version
  copy_sources_with_source_packages
  # Not fatal: an unrelated third-party source may be unreachable.
  private_apt apt-get update >&2 || say "apt-get update had errors"
  source_version=$(source_versions | grep -F "really$VERSION-" | sort -V | tail -n 1) ||
    die_without_source "apt finds"
  private_apt apt-cache show "$GO_PACKAGE" >/dev/null 2>&1 ||
    die_without_source "apt finds"

  mkdir -p "$SCRATCH/packages"
  (
    cd "$SCRATCH/packages"
    private_apt apt-get source --download-only "kubernetes=$source_version"
    private_apt apt-get download "$GO_PACKAGE" "${GO_PACKAGE/%-go/-src}" \
      golang-github-modern-go-reflect2-dev etcd-server kubernetes-client
  ) >&2
}

# Without Debian's patches, which only change kubectl; kubectl comes from its package.
unpack() {
  local package
  mkdir -p "$SOURCE" "$UNPACKED"
  tar -xzf "$SCRATCH"/packages/kubernetes_*.orig.tar.gz -C "$SOURCE" --strip-components=1
  for package in "$SCRATCH"/packages/*.deb; do
    dpkg-deb -x "$package" "$UNPACKED"
  done
}

# The vendored reflect2 1.0.1 depends on internals of Go's runtime that changed in Go 1.18: the server
# would build and become ready, but panic at every write with a JSON map.
replace_reflect2() {
  local vendored="$SOURCE/vendor/github.com/modern-go/reflect2"
  rm -r "$vendored"
  cp -r "$UNPACKED/usr/share/gocode/src/github.com/modern-go/reflect2" "$vendored"
}

# GOPATH mode, since the source has no module cache; pure Go, since a C compiler may be missing.
go_in_source() { # arguments of go
  (
    cd "$SOURCE"
    env -u GOFLAGS -u GOBIN -u GOOS -u GOARCH \
      GOROOT="$UNPACKED/$GO_ROOT" GOPATH="$SCRATCH/go" GOCACHE="$SCRATCH/go-cache" \
      GOTMPDIR="$SCRATCH" GOENV=off GO111MODULE=off CGO_ENABLED=0 \
      "$UNPACKED/$GO_ROOT/bin/go" "$@"
  )
}

# The only generated file that is not in upstream's source.
generate_openapi() {
  local packages
  packages=$(
    cd "$SOURCE"
    grep -lR --include='*.go' '^// *+k8s:openapi-gen=' pkg vendor/k8s.io |
      grep -vE '^vendor/k8s.io/(code-generator|sample-apiserver)/' |
      sed -E 's|^|k8s.io/kubernetes/|; s|/[^/]*$||' |
      LC_ALL=C sort -u | paste -sd,
  )
  go_in_source run ./vendor/k8s.io/kube-openapi/cmd/openapi-gen \
    --input-dirs "$packages" \
    --output-package k8s.io/kubernetes/pkg/generated/openapi \
    --output-file-base zz_generated.openapi \
    --go-header-file vendor/k8s.io/code-generator/hack/boilerplate.go.txt \
    --report-filename "$SCRATCH/openapi-violations" >&2
}

# Without these flags the server's version is v0.0.0-master+$Format:%h$.
version_flags() {
  local package major minor
  IFS=. read -r major minor _ <<<"$VERSION"
  for package in component-base/version client-go/pkg/version; do
    package="k8s.io/kubernetes/vendor/k8s.io/$package"
    printf -- '-X %s.gitVersion=v%s -X %s.gitMajor=%s -X %s.gitMinor=%s ' \
      "$package" "$VERSION" "$package" "$major" "$package" "$minor"
  done
}

build() {
  rm -rf "$SCRATCH"
  mkdir -p "$SCRATCH/result"
  trap 'rm -rf "$SCRATCH"' EXIT

  say "downloading the parts of Kubernetes $VERSION"
  download
  say "unpacking"
  unpack
  replace_reflect2
  say "generating the OpenAPI definitions"
  generate_openapi
  say "building kube-apiserver and kube-scheduler, which takes minutes"
  go_in_source build -ldflags "-s -w $(version_flags)" -o "$SCRATCH/result/" \
    ./cmd/kube-apiserver ./cmd/kube-scheduler >&2
  cp "$UNPACKED/usr/bin/etcd" "$UNPACKED/usr/bin/kubectl" "$SCRATCH/result/"

  "$SCRATCH/result/kube-apiserver" --version | grep -qx "Kubernetes v$VERSION" ||
    die "the built server does not report version $VERSION"
  # Renamed last, so that a directory with this name is always complete.
  rm -rf "$TARGET"
  mv -T "$SCRATCH/result" "$TARGET"
  say "built Kubernetes $VERSION in ${SECONDS} s"
}

main() {
  local assets=${KUBEBUILDER_ASSETS:-}
  if [[ -n "$assets" ]]; then
    if has_binaries "$assets" kube-apiserver etcd; then
      printf '%s\n' "$assets"
      return
    fi
    say "KUBEBUILDER_ASSETS has no kube-apiserver and etcd: looking elsewhere"
  fi

  if ! has_binaries "$TARGET" "${BINARIES[@]}"; then
    # Checked before apt, so that tests fail at once on other distributions.
    grep -qs '^VERSION_CODENAME=bookworm$' /etc/os-release ||
      die_without_source "this distribution has"
    mkdir -p "$CACHE"
    exec 9>"$TARGET.lock"
    # A waiting caller uses the result of the other one.
    flock -n 9 || {
      say "waiting for another process that builds Kubernetes $VERSION"
      flock 9
    }
    has_binaries "$TARGET" "${BINARIES[@]}" || build
  fi
  printf '%s\n' "$TARGET"
}

main "$@"
