#!/usr/bin/env bash
# Demonstrates virtnode on this machine: builds it, runs the daemon on the local libvirt without a
# cluster, prints the labels, hotplugs a guest that uses its new resources and one that does not,
# prints some metrics, and stops everything it started, also on Ctrl-C and on failure. Starts libvirt
# if none answers. Run it as root, as a user with access to libvirt, or with sudo available.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
PATH=$PATH:/usr/sbin:/sbin:$HOME/.cargo/bin # libvirtd, and cargo for a shell opened before rustup was installed

readonly URI=qemu:///system
readonly PROBE_SECONDS=90 # a libvirt that probes all QEMU binaries takes 4 s for each
# Detached from the terminal, so that virsh does not prompt for a password: timeout runs it in the
# background, where the prompt would block forever. A user rejected by polkit continues with sudo.
readonly VIRSH=(setsid --wait timeout "$PROBE_SECONDS" virsh -q -c "$URI")
readonly READY_SECONDS=180
readonly STOP_SECONDS=20
readonly BOOT_SECONDS=120 # 4 s on an idle machine
readonly GOOD=demo-good STUBBORN=demo-nr-cpus-1 # the guests' names

as=()           # prefix for access to libvirt: nothing, or sudo
started=()      # processes to stop at the end, in start order
daemon_pid=     # virtnode's
networks=       # network interfaces before libvirt was started
image=          # directory with the guests' kernel and initramfs; empty if there is none
image_pid=      # of the process that builds it
guests=()       # domains to destroy at the end
scratch=$(mktemp -d "${TMPDIR:-/tmp}/virtnode-demo.XXXXXX")
readonly scratch
readonly log=$scratch/virtnode.log

say() { printf '\n== %s\n' "$*"; }

note() { printf '   %s\n' "$*"; }

die() {
  printf '\ndemo: %s\n' "$*" >&2
  exit 1
}

as_root() {
  if ((EUID == 0)); then
    "$@"
  else
    sudo "$@"
  fi
}

# A zombie counts as ended.
alive() { grep -q '^State:[[:space:]]*[^ZX]' "/proc/$1/status" 2>/dev/null; }

# Waits until a command succeeds; fails on timeout or when a process that it depends on has ended.
wait_until() { # seconds, process id or nothing, command...
  local deadline=$((SECONDS + $1)) process=$2
  shift 2
  until "$@"; do
    ((SECONDS < deadline)) || return 1
    [[ -z $process ]] || alive "$process" || return 1
    sleep 0.1
  done
}

gone() { ! alive "$1"; }

# Ignores daemons in containers, which have another root directory, and a user's session daemons:
# neither uses the system's socket.
runs() { # name of a program
  local comm
  for comm in /proc/[0-9]*/comm; do
    if [[ $(cat "$comm" 2>/dev/null) == "$1" && $(stat -c %u "${comm%/comm}" 2>/dev/null) == 0 ]] &&
      as_root test "${comm%comm}root/" -ef /; then
      return 0
    fi
  done
  return 1
}

signal() { # name of a signal, process id
  # shellcheck disable=SC2016 # for the inner shell, whose own kill needs no package
  kill "-$1" "$2" 2>/dev/null || as_root sh -c 'kill "-$1" "$2"' sh "$1" "$2" 2>/dev/null || true
}

stop() { # name, process id; sets clean_up's status when it cannot
  alive "$2" || return 0
  signal TERM "$2"
  if ! wait_until "$STOP_SECONDS" '' gone "$2"; then
    note "$1 (process $2) did not stop within $STOP_SECONDS s of SIGTERM: killing it."
    signal KILL "$2"
    if ! wait_until "$STOP_SECONDS" '' gone "$2"; then
      note "$1 (process $2) is still running: stop it by hand."
      status=1
    fi
  fi
}

# libvirt's networks outlive it. A network whose bridge did not exist before was created by the
# libvirt started here (Ubuntu starts "default" automatically), so it is stopped with it.
stop_networks() {
  local network bridge
  while read -r network; do
    [[ -n $network ]] || continue
    bridge=$("${as[@]}" timeout 20 virsh -q -c "$URI" net-info "$network" 2>/dev/null | sed -n 's/^Bridge: *//p')
    if [[ -n $bridge && " $networks " != *" $bridge "* ]]; then
      "${as[@]}" timeout 20 virsh -q -c "$URI" net-destroy "$network" >/dev/null 2>&1 ||
        note "libvirt's network $network could not be stopped: virsh net-destroy $network does it."
    fi
  done < <("${as[@]}" timeout 20 virsh -q -c "$URI" net-list --name 2>/dev/null || true)
}

virsh_() { "${as[@]}" "${VIRSH[@]}" "$@"; }

# Contains only the boot files of the guests, which QEMU's user must be able to read.
guest_files() { printf '%s' "$scratch.guests"; }

stop_guests() { # sets clean_up's status when it cannot
  local name
  for name in "${guests[@]}"; do
    if virsh_ domstate "$name" >/dev/null 2>&1 && ! virsh_ destroy "$name" >/dev/null; then
      note "The guest $name is still running: virsh -c $URI destroy $name stops it."
      status=1
    fi
    "${as[@]}" rm -f "/var/log/libvirt/qemu/$name.log" 2>/dev/null
  done
  rm -rf -- "$(guest_files)" 2>/dev/null || as_root rm -rf -- "$(guest_files)"
}

clean_up() {
  local status=$? index name process
  trap - EXIT
  trap '' INT TERM # once is enough
  set +e
  if ((status != 0)) && [[ -s $log ]]; then
    printf '\n-- the end of the daemon'\''s log --\n' >&2
    tail -n 60 "$log" >&2
  fi
  if [[ -n $daemon_pid ]]; then
    stop virtnode "$daemon_pid"
  fi
  if [[ -n $image_pid ]]; then
    kill "$image_pid" 2>/dev/null
    wait "$image_pid" 2>/dev/null
  fi
  stop_guests
  if ((${#started[@]} > 0)); then
    stop_networks
  fi
  for ((index = ${#started[@]} - 1; index >= 0; index--)); do
    name=${started[index]%:*}
    process=${started[index]##*:}
    stop "$name" "$process"
  done
  rm -rf -- "$scratch" 2>/dev/null || as_root rm -rf -- "$scratch"
  if ((status == 0)); then
    say "Stopped what this demo started${started[*]:+, libvirt included}; nothing is left running or published."
  fi
  exit "$status"
}
trap clean_up EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP

# 0: libvirt answers · 1: not running, or access denied · 2: no answer in time
libvirt_answers() {
  local status=0
  "$@" "${VIRSH[@]}" version >"$scratch/version" 2>"$scratch/refusal" ||
    status=$?
  ((status != 124)) || return 2
  ((status == 0)) || return 1
}

find_libvirt() {
  local status=0
  libvirt_answers || status=$?
  if ((status == 1 && EUID != 0)); then
    status=0
    libvirt_answers sudo || status=$?
    as=(sudo)
  fi
  ((status != 2)) ||
    die "libvirt is running but did not answer within $PROBE_SECONDS s (virsh -c $URI version)."
  return "$status"
}

# Started by hand, to work without systemd and to be able to stop it. virtlogd, which receives the
# domains' output, must be started here as well.
start_libvirt() {
  local name
  if runs libvirtd || runs virtqemud; then # a second one would replace the first one's socket
    die "libvirt is running, but rejects $URI: $(tail -n 1 "$scratch/refusal")"
  fi
  networks=$(cd /sys/class/net && echo *)
  for name in virtlogd libvirtd; do
    ! runs "$name" || continue
    without_kvm "$name" -d -p "$scratch/$name.pid" ||
      die "$name does not start; see the errors above or /var/log/libvirt/$name.log."
    started+=("$name:$(as_root cat "$scratch/$name.pid")")
  done
  if ((EUID != 0)); then
    as=(sudo)
  fi
  wait_until "$PROBE_SECONDS" "${started[-1]##*:}" libvirt_answers "${as[@]}" ||
    die "the libvirtd started here does not answer: $(tail -n 1 "$scratch/refusal")" \
      "Its log is /var/log/libvirt/libvirtd.log."
}

# True if /dev/kvm exists but QEMU's user cannot open it. libvirt then probes all QEMU binaries for
# each query, which takes minutes in total.
kvm_is_closed() {
  [[ -e /dev/kvm && $(stat -c '%G %A' /dev/kvm) != "kvm crw-rw"* && $(stat -c %A /dev/kvm) != *rw-? ]]
}

explain_kvm() {
  if [[ ! -e /dev/kvm ]]; then
    note "This machine has no /dev/kvm: the labels describe QEMU's software emulation."
  elif kvm_is_closed; then
    note "QEMU's user cannot open /dev/kvm ($(stat -c '%U:%G %A' /dev/kvm)): the labels describe QEMU's"
    note "software emulation. A running libvirt probes every QEMU binary again for each query,"
    note "about 4 s each; a libvirt started here does not see /dev/kvm."
  fi
}

# Runs a command as root in a mount namespace without /dev/kvm; other processes are not affected.
# shellcheck disable=SC2016 # for the inner shell
readonly WITHOUT_KVM='set -e
dev=$(mktemp -d)
mount -t tmpfs -o mode=755 dev "$dev"
for entry in /dev/*; do
  if [ "$entry" = /dev/kvm ]; then
    continue
  elif [ -d "$entry" ] && [ ! -L "$entry" ]; then
    mkdir "$dev/${entry##*/}"
    mount --rbind "$entry" "$dev/${entry##*/}"
  else
    cp -a "$entry" "$dev/"
  fi
done
mount --move "$dev" /dev
rmdir "$dev"
exec "$@"'
without_kvm() {
  local enter=(unshare --mount --propagation private sh -c "$WITHOUT_KVM" sh)
  if kvm_is_closed && as_root "${enter[@]}" true 2>"$scratch/refusal"; then
    as_root "${enter[@]}" "$@"
  else
    as_root "$@"
  fi
}

free_port() {
  local port
  for ((tries = 0; tries < 50; tries++)); do
    port=$((20000 + RANDOM % 12000))
    if ! (: <"/dev/tcp/127.0.0.1/$port") 2>/dev/null; then
      echo "$port"
      return
    fi
  done
  die "found no free TCP port on 127.0.0.1."
}

# A guest of the test lab in software emulation, which needs no KVM: one of four vCPUs, 512 MiB, and
# 2 GiB of virtio-mem with nothing plugged. tests/it/support/guest.rs explains the unusual parts.
guest_xml() { # name, words for the guest: see tests/lab/guest-init
  local files
  files=$(guest_files)
  cat <<XML
<domain type='qemu'>
  <name>$1</name>
  <maxMemory slots='1' unit='MiB'>4096</maxMemory>
  <memory unit='MiB'>2560</memory>
  <vcpu current='1'>4</vcpu>
  <sysinfo type='smbios'><system><entry name='serial'>VMware-lab</entry></system></sysinfo>
  <os>
    <type arch='x86_64' machine='q35'>hvm</type>
    <kernel>$files/vmlinuz</kernel>
    <initrd>$files/initramfs.gz</initrd>
    <cmdline>console=ttyS0 quiet panic=-1 $2</cmdline>
    <smbios mode='sysinfo'/>
  </os>
  <features><acpi/><apic/><vmport state='on'/></features>
  <cpu mode='custom' match='exact'>
    <model>qemu64</model>
    <topology sockets='4' cores='1' threads='1'/>
    <feature name='hypervisor' policy='disable'/>
    <numa><cell id='0' cpus='0-3' memory='512' unit='MiB'/></numa>
  </cpu>
  <on_crash>destroy</on_crash>
  <devices>
    <memory model='virtio-mem'>
      <target>
        <size unit='MiB'>2048</size><node>0</node><block unit='MiB'>2</block>
        <requested unit='MiB'>0</requested>
      </target>
    </memory>
    <channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>
    <serial type='file'><source path='$files/$1.console'/></serial>
    <memballoon model='virtio'><stats period='1'/></memballoon>
    <controller type='usb' model='none'/>
  </devices>
</domain>
XML
}

# Continues the demo without guests.
no_guest() {
  note "$*"
  note "Without a guest, the demo skips hotplug."
  image=
}

# Starts building the image in the background: the first time, packages are downloaded and unpacked.
build_image() {
  if [[ $(uname -m) == x86_64 ]]; then
    tests/lab/build-guest.sh </dev/null >"$scratch/image" 2>"$scratch/image.log" &
    image_pid=$!
  fi
}

find_image() {
  local status=0
  if [[ -z $image_pid ]]; then
    no_guest "The guests that show hotplug are x86_64 Linux; this machine is $(uname -m)."
    return
  fi
  wait "$image_pid" || status=$?
  image_pid=
  if ((status == 0)); then
    image=$(<"$scratch/image")
    note "$image"
  else
    cat "$scratch/image.log" >&2
    no_guest "The guests could not be built: see above."
  fi
}

# Boots a guest without waiting for it.
start_guest() { # name, words
  local files refusal
  files=$(guest_files)
  if virsh_ domstate "$1" >/dev/null 2>&1; then
    no_guest "This machine already has a domain $1, which the demo does not touch."
    return
  fi
  guest_xml "$1" "$2" >"$scratch/$1.xml"
  (umask 0 && : >"$files/$1.console")
  guests+=("$1")
  if ! virsh_ create "$scratch/$1.xml" >/dev/null 2>"$scratch/refusal"; then
    refusal=$(grep . "$scratch/refusal" | tail -n 1) || true
    no_guest "libvirt does not start a guest: ${refusal:-no answer within $PROBE_SECONDS s}"
  fi
}

start_guests() {
  local files
  files=$(guest_files)
  if ! mkdir -m 755 "$files" || ! cp -- "$image"/{vmlinuz,initramfs.gz} "$files"; then
    no_guest "The guests' files could not be written to $files."
    return
  fi
  start_guest "$GOOD" 'lab.cpus=online lab.blocks=online'
  [[ -z $image ]] || start_guest "$STUBBORN" 'lab.cpus=online nr_cpus=1'
}

booted() { virsh_ guestvcpus "$1" >/dev/null 2>&1; }

# The state that the guest last printed on its console.
console_state() { # name
  sed -n 's/\r$//; s/^lab: \(present=.*\)/\1/p' "$(guest_files)/$1.console" 2>/dev/null | tail -n 1 || true
}

says() { # name, pattern
  [[ $(console_state "$1") =~ $2 ]]
}

witness() { # name, pattern of the expected state
  local words
  wait_until 5 '' says "$1" "$2" || true
  words=$(console_state "$1")
  [[ -z $words ]] || note "The guest's own console: CPUs ${words/total=/MemTotal=} KiB"
}

# Runs virtnode hotplug as a user would, and explains its exit code.
hotplug() { # expected exit code, arguments...
  local expected=$1 status=0
  shift
  printf '\n   $ virtnode hotplug %s\n' "$*"
  "${as[@]}" "$virtnode" --socket "$scratch/virtnode.sock" hotplug "$@" >"$scratch/output" 2>&1 || status=$?
  sed 's/^/   /; s/[[:space:]]*$//' "$scratch/output"
  case $status in
  0) note "(exit code 0: done, and verified)" ;;
  3) note "(exit code 3: accepted by the hypervisor, not used by the guest)" ;;
  *) note "(exit code $status)" ;;
  esac
  if ((status != expected)); then
    note "The expected exit code is $expected; on a very busy machine a guest may be too slow."
  fi
}

show_hotplug() {
  local name
  for name in "${guests[@]}"; do
    if ! wait_until "$BOOT_SECONDS" '' booted "$name"; then
      no_guest "The guest $name did not boot within $BOOT_SECONDS s."
      return
    fi
  done
  say "A guest that uses new resources: 2 more vCPUs, 512 MiB more"
  hotplug 0 vcpus "$GOOD" 3
  hotplug 0 memory "$GOOD" 1GiB
  witness "$GOOD" 'online=0-2 total=9'
  say "A guest booted with nr_cpus=1, whose kernel rejects new vCPUs"
  hotplug 3 vcpus "$STUBBORN" 3
  note "libvirt counts $(virsh_ vcpucount "$STUBBORN" --live) vCPUs and reports success."
  witness "$STUBBORN" 'online=0 '
}

ready() { curl -fsS --max-time 5 -o "$scratch/ready" "$address/readyz" 2>/dev/null; }

sample() { # pattern
  grep -E "^($1)([{ ]|\$)" "$scratch/metrics" | sed 's/^/   /' || note "(none)"
}

scripts/install-deps.sh demo

# In parallel with building virtnode.
build_image

say "Looking for libvirt at $URI"
explain_kvm
if find_libvirt; then
  note "libvirt is running:"
else
  note "libvirt does not answer; starting it for this demo:"
  start_libvirt
fi
sed -n '/[^[:space:]]/s/^/   /p' "$scratch/version"

say "Building virtnode (the first time takes a few minutes)"
cargo build --release --locked
target=$(cargo metadata --locked --format-version 1 --no-deps |
  sed -n 's/.*"target_directory":"\([^"]*\)".*/\1/p')
readonly virtnode=$target/release/virtnode

say "The guests' kernel and programs (built once, from the distribution's packages)"
find_image
if [[ -n $image ]]; then
  start_guests # they boot in the background
fi

address=http://127.0.0.1:$(free_port)
readonly address
say "Running the daemon without any cluster: labels go to a file, metrics to $address"
command=("$virtnode" run --publish file --state-directory "$scratch/state"
  --socket "$scratch/virtnode.sock" --connect "$URI" --listen "${address#http://}")
note "${command[*]}"
# The shell writes its process id and then becomes the daemon: with sudo, \$! would be sudo's.
# shellcheck disable=SC2016 # for the inner shell
"${as[@]}" sh -c 'echo $$ >"$0" && exec "$@"' "$scratch/virtnode.pid" "${command[@]}" \
  </dev/null >"$log" 2>&1 &
wait_until 10 "$!" test -s "$scratch/virtnode.pid" || die "the daemon did not start."
daemon_pid=$(<"$scratch/virtnode.pid")
begin=$SECONDS
if ! wait_until "$READY_SECONDS" "$daemon_pid" ready; then
  alive "$daemon_pid" || die "the daemon ended before it was ready."
  curl -sS --max-time 5 "$address/readyz" >&2 || true
  die "the daemon was not ready within $READY_SECONDS s; see above for the missing parts."
fi
note "Ready after $((SECONDS - begin)) s: libvirt was read and the labels are in the file."

say "The labels of this node (virtnode labels)"
"${as[@]}" "$virtnode" labels --connect "$URI"

if [[ -n $image ]]; then
  show_hotplug
fi

curl -fsS --max-time 5 -o "$scratch/metrics" "$address/metrics" ||
  die "the daemon does not answer at $address/metrics."
say "libvirt connected (1), and maximum vCPUs of one domain on this node (0: unknown)"
sample 'virtnode_hypervisor_connected|virtnode_max_vcpus'
say "Published labels by family, and machine types of this architecture"
sample 'virtnode_labels|virtnode_machine_types|virtnode_machine_types_deprecated'
if [[ -n $image ]]; then
  say "The guests' vCPUs, and the verdicts"
  sample 'virtnode_domain_vcpus'
  sample 'virtnode_hotplug_results_total' | grep -v ' 0$' || true
fi
say "Labels rejected as invalid, by reason"
sample 'virtnode_labels_rejected'
say "libvirt's latency by call: number of calls, mean in milliseconds"
awk -F '[{}" ]+' '
  /^virtnode_hypervisor_call_duration_seconds_sum/ { sum[$3] = $NF }
  /^virtnode_hypervisor_call_duration_seconds_count/ { count[$3] = $NF }
  END {
    for (call in count)
      if (count[call] > 0)
        printf "   %-22s %3d %10.1f\n", call, count[call], 1000 * sum[call] / count[call]
  }' "$scratch/metrics" | sort
