# shellcheck shell=bash
# Builds Kubernetes 1.20.2 from Debian 12's source package, which contains upstream's complete source
# with vendored dependencies, although Debian builds only kubectl from it. It takes about four
# minutes and 3 GB of scratch space on two cores. Sourced by build-server.sh.

readonly GO_PACKAGE=golang-1.19-go
readonly GO_ROOT=usr/lib/go-1.19
readonly SOURCE="$SCRATCH/go/src/k8s.io/kubernetes" # where GOPATH mode looks for it

without_source() { # subject of the message
  die "$* no source of Kubernetes $DEBIAN_VERSION with a Go that builds it: set KUBEBUILDER_ASSETS" \
    "to a directory with kube-apiserver and etcd, as created by setup-envtest"
}

# Checked before apt, so that tests fail at once on other distributions.
check_distribution() {
  grep -qs '^VERSION_CODENAME=bookworm$' /etc/os-release || without_source "this distribution has"
}

# All versions of the source package in apt's lists, possibly none.
source_versions() {
  private_apt apt-cache showsrc --only-source kubernetes 2>/dev/null |
    sed -n 's/^Version: //p'
}

download() {
  local source_version
  update_package_lists
  source_version=$(source_versions | grep -F "really$DEBIAN_VERSION-" | sort -V | tail -n 1) ||
    without_source "apt finds"
  private_apt apt-cache show "$GO_PACKAGE" >/dev/null 2>&1 ||
    without_source "apt finds"

  mkdir -p "$SCRATCH/packages"
  (cd "$SCRATCH/packages" && private_apt apt-get source --download-only "kubernetes=$source_version") >&2
}

# Without Debian's patches, which only change kubectl; kubectl comes from its package.
unpack() {
  mkdir -p "$SOURCE"
  tar -xzf "$SCRATCH"/packages/kubernetes_*.orig.tar.gz -C "$SOURCE" --strip-components=1
  unpack_packages "$GO_PACKAGE" "${GO_PACKAGE/%-go/-src}" golang-github-modern-go-reflect2-dev \
    etcd-server kubernetes-client
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
    cd "$SOURCE" || exit
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
    cd "$SOURCE" || exit
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
  IFS=. read -r major minor _ <<<"$DEBIAN_VERSION"
  for package in component-base/version client-go/pkg/version; do
    package="k8s.io/kubernetes/vendor/k8s.io/$package"
    printf -- '-X %s.gitVersion=v%s -X %s.gitMajor=%s -X %s.gitMinor=%s ' \
      "$package" "$DEBIAN_VERSION" "$package" "$major" "$package" "$minor"
  done
}

# Fills $SCRATCH/result.
build_from_debian() {
  say "downloading the parts of Kubernetes $DEBIAN_VERSION"
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
}
