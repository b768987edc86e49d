#!/usr/bin/env bash
# Builds the image from Containerfile and prints its size.
#
#   scripts/image.sh              with the public base images, by podman, docker or buildah
#   scripts/image.sh --local      without a registry: debootstrap creates both base images from this
#                                 machine's release, this machine's Rust compiles, and buildah
#                                 builds the image. Requires root; used by make image-test.
#
# The image is localhost/virtnode:VERSION, also in the archive: ctr imports no image without a name,
# and says nothing. The OCI archive virtnode-image.tar in the target directory
# can be loaded on nodes: ctr -n k8s.io images import virtnode-image.tar
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
version=$(sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml | head -n 1)
readonly version
readonly name=localhost/virtnode:$version
commit=$(git rev-parse --short=12 HEAD 2>/dev/null || echo unknown)
readonly commit
target=${CARGO_TARGET_DIR:-$PWD/target}
readonly target
readonly archive=$target/virtnode-image.tar

say() { printf '%s: %s\n' "${0##*/}" "$*" >&2; }

die() {
  say "$*"
  exit 1
}

public() {
  local tool
  for tool in podman docker buildah; do
    command -v "$tool" >/dev/null || continue
    say "building $name with $tool"
    "$tool" build -t "$name" --build-arg "COMMIT=$commit" -f Containerfile .
    case $tool in
    buildah) buildah push -q "$name" "oci-archive:$archive:$name" ;;
    podman) podman save -q --format oci-archive -o "$archive" "$name" ;;
    docker) docker save -o "$archive" "$name" ;;
    esac
    return
  done
  die "none of podman, docker and buildah is installed"
}

# Creates a base image of this machine's release with some packages, in the cache.
base_image() { # name, package...
  local base=$1 directory container
  shift
  directory=$cache/image-$base-$release
  if [[ ! -e $directory/complete ]]; then
    say "building the base image $base of $release (once)"
    rm -rf -- "$directory"
    mkdir -p "$directory"
    debootstrap --variant=minbase --include="$(
      IFS=,
      echo "$*"
    )" "$release" "$directory/root" "$mirror" >"$directory/log" 2>&1 ||
      die "debootstrap failed: see $directory/log"
    rm -rf -- "$directory"/root/var/cache/apt/archives/*.deb "$directory"/root/var/lib/apt/lists/*
    touch "$directory/complete"
  fi
  container=$(buildah from scratch)
  tar -C "$directory/root" --exclude=./dev -c . >"$scratch/base.tar"
  buildah add -q "$container" "$scratch/base.tar" / >/dev/null
  buildah config "${settings[@]}" "$container"
  buildah commit -q --rm "$container" "localhost/$base" >/dev/null
  rm -- "$scratch/base.tar"
}

without_registry() {
  local cargo_home rustup_home
  ((EUID == 0)) || die "--local needs root, for debootstrap and chroot"
  if ! command -v buildah >/dev/null || ! command -v debootstrap >/dev/null; then
    die "--local needs buildah and debootstrap: scripts/install-deps.sh image"
  fi
  # shellcheck disable=SC1091 # the system's own file
  release=$(. /etc/os-release && echo "$VERSION_CODENAME")
  # shellcheck disable=SC2016 # apt's own placeholder
  mirror=$(apt-get indextargets --format '$(REPO_URI)' "Codename: $release" \
    'Created-By: Packages' 'Component: main' | head -n 1)
  cache=${XDG_CACHE_HOME:-$HOME/.cache}/virtnode-test
  # Storage that goes away with the rest, without overlay: that takes rights a sandbox may not give.
  export STORAGE_DRIVER=vfs BUILDAH_ISOLATION=chroot
  printf '[storage]\ndriver = "vfs"\ngraphroot = "%s/graph"\nrunroot = "%s/run"\n' \
    "$scratch" "$scratch" >"$scratch/storage.conf"
  printf '{"default": [{"type": "insecureAcceptAnything"}]}' >"$scratch/policy.json"
  export CONTAINERS_STORAGE_CONF=$scratch/storage.conf
  settings=()
  base_image virtnode-base libvirt0
  # Reuse this machine's toolchain, downloaded crates and previous build.
  cargo fetch --locked -q
  cargo_home=${CARGO_HOME:-$HOME/.cargo}
  rustup_home=${RUSTUP_HOME:-$HOME/.rustup}
  mkdir -p "$target"
  settings=(--env "CARGO_HOME=$cargo_home" --env "RUSTUP_HOME=$rustup_home"
    --env CARGO_TARGET_DIR=/target --env CARGO_NET_OFFLINE=true
    --env "PATH=$cargo_home/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
  base_image virtnode-rust gcc libc6-dev pkg-config libvirt-dev ca-certificates
  say "building $name"
  buildah build-using-dockerfile -q --layers=false --pull-never --signature-policy "$scratch/policy.json" \
    --build-arg RUST=localhost/virtnode-rust --build-arg BASE=localhost/virtnode-base \
    --build-arg "COMMIT=$commit" \
    --volume "$cargo_home:$cargo_home" --volume "$rustup_home:$rustup_home:ro" \
    --volume "$target:/target" \
    -t "$name" -f Containerfile . >&2
  rm -f -- "$archive"
  buildah push -q --signature-policy "$scratch/policy.json" "$name" "oci-archive:$archive:$name"
}

case ${1:-} in
'') public ;;
--local)
  scratch=$(mktemp -d)
  trap 'rm -rf -- "$scratch"' EXIT
  without_registry
  ;;
*) die "'$1' is not a valid argument: --local or nothing" ;;
esac
