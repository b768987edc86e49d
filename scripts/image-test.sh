#!/usr/bin/env bash
# Runs the program in the image archive of scripts/image.sh as the DaemonSet does (uid 0, no
# capability, libvirt's socket mounted) and as the image's own user, on a dedicated libvirtd, and prints
# measurements. Requires root and buildah. Stops everything it started.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
PATH=$PATH:/usr/sbin:/sbin
readonly archive=${CARGO_TARGET_DIR:-$PWD/target}/virtnode-image.tar
readonly OTHER=65534 # nobody: an unprivileged libvirtd needs neither systemd nor rights on /dev/kvm
readonly ROOT_PORT=19478 USER_PORT=19479
readonly LIBVIRT='qemu+unix:///system?name=qemu:///session&socket=/run/libvirt/libvirt-sock'

say() { printf '%s: %s\n' "${0##*/}" "$*" >&2; }

die() {
  say "$*"
  exit 1
}

[[ -e $archive ]] || die "$archive does not exist: build it with scripts/image.sh"
((EUID == 0)) || die "this needs root, to enter the image"

scratch=$(mktemp -d /tmp/virtnode-image.XXXXXX)
chmod 755 "$scratch"

# Finds the program's own process, not buildah's, by the port on its command line.
process_of() { # port
  local directory
  for directory in /proc/[0-9]*; do
    if [[ $(tr '\0' ' ' 2>/dev/null <"$directory/cmdline") == "/usr/bin/virtnode run "*":$1 " ]]; then
      echo "${directory#/proc/}"
    fi
  done 2>/dev/null
}

libvirtd=
clean_up() {
  local process
  for process in $(process_of $ROOT_PORT) $(process_of $USER_PORT) $libvirtd; do
    kill "$process" 2>/dev/null || true
  done
  wait || true
  eventually 30 rm -rf -- "$scratch"
}
trap clean_up EXIT
trap 'exit 130' INT TERM HUP

eventually() { # seconds, command...
  local until=$((SECONDS + $1))
  shift
  until "$@" >/dev/null 2>&1; do
    ((SECONDS < until)) || return 1
    sleep 0.1
  done
}

mkdir -p "$scratch"/lv/{run,config/libvirt,cache,home}
echo 'stdio_handler = "file"' >"$scratch/lv/config/libvirt/qemu.conf"
chown -R $OTHER:$OTHER "$scratch/lv"
chmod 755 "$scratch/lv"
env -i PATH="$PATH" HOME="$scratch/lv/home" XDG_RUNTIME_DIR="$scratch/lv/run" \
  XDG_CONFIG_HOME="$scratch/lv/config" XDG_CACHE_HOME="$scratch/lv/cache" \
  setpriv --reuid $OTHER --regid $OTHER --clear-groups libvirtd >"$scratch/libvirtd.log" 2>&1 &
libvirtd=$!
readonly sockets=$scratch/lv/run/libvirt
eventually 60 test -S "$sockets/libvirt-sock" || die "libvirtd does not start: $(tail -n 5 "$scratch/libvirtd.log")"
# Access for root without capabilities and for the image's user; on a host the group grants it.
chmod 755 "$scratch/lv/run" "$sockets"
chmod 777 "$sockets/libvirt-sock"

printf '[storage]\ndriver = "vfs"\ngraphroot = "%s/graph"\nrunroot = "%s/run"\n' "$scratch" "$scratch" \
  >"$scratch/storage.conf"
printf '{"default": [{"type": "insecureAcceptAnything"}]}' >"$scratch/policy.json"
export CONTAINERS_STORAGE_CONF=$scratch/storage.conf STORAGE_DRIVER=vfs BUILDAH_ISOLATION=chroot
container=$(buildah from -q --signature-policy "$scratch/policy.json" "oci-archive:$archive")

# Runs it until it is ready, and prints its resident memory in MB.
run_as() { # user, port
  local user=$1 port=$2 running memory
  mkdir -p "$scratch/state-$port" "$scratch/run-$port"
  chown "$user" "$scratch/state-$port" "$scratch/run-$port"
  buildah run --cap-drop ALL --user "$user" \
    --volume "$sockets:/run/libvirt:ro" --volume "$scratch/state-$port:/var/lib/virtnode" \
    --volume "$scratch/run-$port:/run/virtnode" \
    "$container" -- /usr/bin/virtnode run --connect "$LIBVIRT" --listen "127.0.0.1:$port" \
    >"$scratch/log-$port" 2>&1 &
  running=$!
  eventually 180 curl -sf "http://127.0.0.1:$port/readyz" ||
    die "as $user it is not ready: $(curl -s "http://127.0.0.1:$port/readyz"; cat "$scratch/log-$port")"
  [[ -S $scratch/run-$port/virtnode.sock && -s $scratch/state-$port/labels.json ]] ||
    die "as $user it has no socket or no labels: $(cat "$scratch/log-$port")"
  capabilities=$(sed -n 's/^CapEff:\t//p' "/proc/$(process_of "$port")/status")
  [[ $capabilities == 0000000000000000 ]] || die "as $user it has capabilities: $capabilities"
  memory=$(curl -s "http://127.0.0.1:$port/metrics" | awk '/^process_resident_memory_bytes/ { printf "%.1f", $2 / 1e6 }')
  kill -TERM "$(process_of "$port")"
  wait "$running" || die "as $user it failed: $(cat "$scratch/log-$port")"
  echo "$memory"
}

version=$(buildah run --cap-drop ALL "$container" -- /usr/bin/virtnode --version)
as_root=$(run_as 0:0 $ROOT_PORT)
as_user=$(run_as 65534:65534 $USER_PORT)

tar -xf "$archive" -C "$scratch" --one-top-level=oci
# What containerd names the image that it imports.
name=$(sed -n 's/.*"org.opencontainers.image.ref.name":"\([^"]*\)".*/\1/p' "$scratch/oci/index.json")
expected=localhost/virtnode:$(sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml | head -n 1)
[[ $name == "$expected" ]] || die "the image in $archive is named '$name', not $expected"
manifest=$scratch/oci/blobs/sha256/$(sed -n 's/.*"digest":"sha256:\([0-9a-f]*\)".*/\1/p' "$scratch/oci/index.json")
layers=$(grep -o '"layers":.*' "$manifest" | grep -o '"size":[0-9]*' | cut -d : -f 2)
root=$(buildah mount "$container")
megabytes() { awk '{ sum += $1 } END { printf "%.1f MB", sum / 1e6 }'; }
printf 'image: %s, compressed, in %s layer(s); %s unpacked\n' "$(megabytes <<<"$layers")" \
  "$(wc -l <<<"$layers")" "$(du -sb "$root" | megabytes)"
printf 'the program in it: %s (%s)\n' "$(stat -c %s "$root/usr/bin/virtnode" | megabytes)" "$version"
printf 'libraries in it: %s\n' "$(find "$root" -name '*.so*' -type f | wc -l)"
printf 'resident memory, connected to libvirt: %s MB as uid 0 without capabilities, %s MB as the image'\''s user\n' \
  "$as_root" "$as_user"
