# shellcheck shell=bash
# Builds a current Kubernetes, and the etcd that it requires, from Go modules: server/go.mod has the
# versions and server/go.sum the checksums. The go command's own settings (GOPROXY and others) say
# where modules come from. Go itself is the one on the PATH, otherwise the distribution's, unpacked;
# a newer toolchain, if needed, is a Go module as well. Sourced by build-server.sh.

readonly PROGRAMS=(k8s.io/kubernetes/cmd/{kube-apiserver,kube-scheduler,kubectl})
readonly ETCD=go.etcd.io/etcd/server/v3
GO_NEEDED=$(sed -n 's/^go //p' "$SERVER/go.mod")
readonly GO_NEEDED
GO= # the go command, set by can_build_from_modules

# Pure Go, since a C compiler may be missing; modules and objects go away with the scratch directory.
# Debian's Go does not fetch toolchains unless told to. LIMIT is a timeout in seconds.
go_in_server() { # arguments of go
  (
    cd "$SERVER" || exit
    env -u GOBIN -u GOOS -u GOARCH -u GOROOT GO111MODULE=on GOWORK=off CGO_ENABLED=0 \
      GOTOOLCHAIN="${GOTOOLCHAIN:-auto}" GOFLAGS="-modcacherw -buildvcs=false" \
      GOPATH="$SCRATCH/go" GOMODCACHE="$SCRATCH/go/pkg/mod" GOCACHE="$SCRATCH/go-cache" \
      GOTMPDIR="$SCRATCH" ${LIMIT:+timeout "$LIMIT"} "$GO" "$@"
  )
}

# True if the go command is new enough, or fetches a toolchain that is.
go_is_new_enough() {
  local found
  found=$(LIMIT=300 go_in_server env GOVERSION) || return
  [[ $(printf '%s\n' "go$GO_NEEDED" "${found%% *}" | sort -V | head -n 1) == "go$GO_NEEDED" ]]
}

# The distribution's Go, unpacked and not installed.
unpack_go() {
  local package root
  command -v apt-get >/dev/null && command -v dpkg-deb >/dev/null || return
  say "go is not on the PATH: unpacking the distribution's"
  update_package_lists
  package=$(private_apt apt-cache depends golang-go 2>/dev/null |
    sed -nE 's/^ *Depends: (golang-[0-9.]+-go)$/\1/p' | head -n 1)
  [[ -n $package ]] || return
  unpack_packages "$package" "${package/%-go/-src}" || return
  root=$UNPACKED/usr/lib/${package%-go}
  root=${root/golang-/go-}
  # Debian links Go's own files from usr/lib to usr/share, by relative and by absolute links.
  GO=$root/bin/go
  [[ -x $GO ]] && "$GO" env GOROOT >/dev/null
}

# Go older than 1.21 does not fetch toolchains, but can download one like any other module.
fetch_toolchain() {
  local module directory
  module=golang.org/toolchain@v0.0.1-go$GO_NEEDED.$("$GO" env GOOS)-$("$GO" env GOARCH)
  say "fetching Go $GO_NEEDED"
  # In a module of its own: an old Go may not understand the go.mod of server/ or of a directory above.
  mkdir -p "$SCRATCH/toolchain"
  printf 'module toolchain\n' >"$SCRATCH/toolchain/go.mod"
  directory=$(
    cd "$SCRATCH/toolchain" || exit
    env -u GOROOT GO111MODULE=on GOFLAGS=-modcacherw GOPATH="$SCRATCH/go" \
      GOMODCACHE="$SCRATCH/go/pkg/mod" "$GO" mod download -json "$module" |
      sed -nE 's/^\s*"Dir": "(.*)",?$/\1/p'
  ) || return
  [[ -d $directory ]] || return
  # Files of modules are not executable.
  chmod -R u+x "$directory/bin" "$directory/pkg/tool"
  GO=$directory/bin/go
}

# False, after a sentence that names the reason, if there is no usable Go or no modules can be had.
can_build_from_modules() {
  if command -v go >/dev/null; then
    GO=$(command -v go)
  elif ! unpack_go; then
    say "Kubernetes $CURRENT_VERSION cannot be built: there is no go, neither on the PATH nor as the" \
      "distribution's package golang-go"
    return 1
  fi
  if ! go_is_new_enough && ! { fetch_toolchain && go_is_new_enough; }; then
    say "Kubernetes $CURRENT_VERSION cannot be built: $GO is older than $GO_NEEDED and cannot fetch" \
      "a newer Go (GOPROXY, GOTOOLCHAIN)"
    return 1
  fi
  if ! LIMIT=300 go_in_server mod download k8s.io/kubernetes >&2; then
    say "Kubernetes $CURRENT_VERSION cannot be built: the module k8s.io/kubernetes cannot be" \
      "downloaded (see above, and GOPROXY)"
    return 1
  fi
}

version_flags_of_modules() {
  local package major minor
  IFS=. read -r major minor _ <<<"$CURRENT_VERSION"
  for package in k8s.io/component-base/version k8s.io/client-go/pkg/version; do
    printf -- '-X %s.gitVersion=v%s -X %s.gitMajor=%s -X %s.gitMinor=%s ' \
      "$package" "$CURRENT_VERSION" "$package" "$major" "$package" "$minor"
  done
}

# Counts the packages that `go build -v` names, and passes everything else through.
show_progress() { # number of packages
  awk -v total="$1" '
    /^[^ :]+$/ { if (++count % 200 == 0) print "  " count " of at most " total " packages"; next }
    { print }' >&2
}

# Fills $SCRATCH/result.
build_from_modules() {
  local packages
  say "building Kubernetes $CURRENT_VERSION and etcd with $(go_in_server env GOVERSION), which takes" \
    "minutes"
  packages=$(go_in_server list -deps "${PROGRAMS[@]}" "$ETCD" | wc -l) || return
  go_in_server build -v -ldflags "-s -w" -o "$SCRATCH/result/etcd" "$ETCD" 2>&1 |
    show_progress "$packages" || return
  go_in_server build -v -ldflags "-s -w $(version_flags_of_modules)" -o "$SCRATCH/result/" \
    "${PROGRAMS[@]}" 2>&1 | show_progress "$packages"
}
