# shellcheck shell=bash
# apt without installing anything: packages are downloaded with a private state below SCRATCH and
# unpacked, so root is not required. Sourced by build-server.sh.

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

# Downloads packages and unpacks them below $UNPACKED.
unpack_packages() { # package...
  local package
  mkdir -p "$SCRATCH/packages" "$UNPACKED"
  (cd "$SCRATCH/packages" && private_apt apt-get download "$@") >&2 || return
  for package in "$SCRATCH"/packages/*.deb; do
    dpkg-deb -x "$package" "$UNPACKED"
  done
}

update_package_lists() {
  copy_sources_with_source_packages
  # Not fatal: an unrelated third-party source may be unreachable.
  private_apt apt-get update >&2 || say "apt-get update had errors"
}
