#!/usr/bin/env python3
"""Measures `virtnode sockets` with 250 launchers, for docs/figures.md.

    scripts/sockets-figures.py [PROGRAM]      default: target/release/virtnode

The launchers are sockets of this script, so that only the broker is measured. Needs no root. Prints the
broker's memory beyond pages that it shares, the duration of a call with and without it, and its CPU time
when nothing happens. Everything it starts ends with it.
"""

import os
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time

LAUNCHERS = 250
CALLS = 3000
IDLE_SECONDS = 20
REMOTE = 0x20008086
GET_VERSION, GET_XML = 4, 14
CALL, REPLY = 0, 1


def message(procedure, kind, body=b""):
    return struct.pack(">7I", 28 + len(body), REMOTE, 1, procedure, kind, 1, 0) + body


def receive(stream, length):
    received = 0
    while received < length:
        part = stream.recv(min(length - received, 1 << 16))
        if not part:
            sys.exit("the connection ended")
        received += len(part)


def call(client, daemon, answer_bytes=8):
    """One call: the question reaches the daemon, and its answer the client."""
    request = message(GET_VERSION, CALL)
    reply = message(GET_VERSION, REPLY, bytes(answer_bytes))
    client.sendall(request)
    receive(daemon, len(request))
    sender = threading.Thread(target=daemon.sendall, args=(reply,)) if answer_bytes > 65536 else None
    if sender:
        sender.start()
    else:
        daemon.sendall(reply)
    receive(client, len(reply))
    if sender:
        sender.join()


def median_microseconds(client, daemon):
    durations = []
    for _ in range(CALLS):
        start = time.perf_counter()
        call(client, daemon)
        durations.append(time.perf_counter() - start)
    return statistics.median(durations) * 1e6


def memory(pid, when):
    figures = {}
    with open(f"/proc/{pid}/smaps_rollup", encoding="ascii") as rollup:
        for line in rollup:
            words = line.split()
            if words[-1] == "kB":
                figures[words[0].rstrip(":")] = int(words[1])
    print(f"{when}: {figures['Anonymous']} kB anonymous, {figures['Rss']} kB resident")


def cpu_seconds(pid):
    with open(f"/proc/{pid}/stat", encoding="ascii") as stat:
        fields = stat.read().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def measure(program, directory):
    pods, served = directory + "/pods", directory + "/served"
    os.mkdir(served)
    uids = [f"{number:08x}-0000-4000-8000-00000000beef" for number in range(LAUNCHERS)]
    listeners = []
    for uid in uids:
        volume = f"{pods}/{uid}/volumes/kubernetes.io~empty-dir/libvirt-runtime"
        os.makedirs(volume)
        listener = socket.socket(socket.AF_UNIX)
        # A socket's address may have 107 bytes.
        listener.bind(directory + "/s")
        os.rename(directory + "/s", volume + "/virtqemud-sock")
        listener.listen()
        listeners.append(listener)
    arguments = [program, "sockets", "--directory", pods, "--serve", served]
    broker = subprocess.Popen(arguments, stderr=subprocess.DEVNULL)
    try:
        while len(os.listdir(served)) < LAUNCHERS:
            if broker.poll() is not None:
                sys.exit("the broker ended")
            time.sleep(0.05)
        memory(broker.pid, f"{LAUNCHERS} sockets served")
        pairs = []
        for uid, listener in zip(uids, listeners):
            client = socket.socket(socket.AF_UNIX)
            client.connect(f"{served}/{uid}.sock")
            daemon, _ = listener.accept()
            call(client, daemon)
            pairs.append((client, daemon))
        memory(broker.pid, f"{LAUNCHERS} connections")
        for client, daemon in pairs:
            call(client, daemon, 100_000)
        memory(broker.pid, "after an answer of 100 kB on each")
        through = median_microseconds(*pairs[0])
        direct = median_microseconds(*socket.socketpair())
        print(f"a call: {through:.0f} us through the broker, {direct:.0f} us without: +{through - direct:.0f} us")
        before = cpu_seconds(broker.pid)
        time.sleep(IDLE_SECONDS)
        used = cpu_seconds(broker.pid) - before
        print(f"idle: {100 * used / IDLE_SECONDS:.2f} % of a core")
    finally:
        broker.terminate()
        broker.wait()


def main():
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    program = sys.argv[1] if len(sys.argv) > 1 else root + "/target/release/virtnode"
    with tempfile.TemporaryDirectory(prefix="s-", dir="/tmp") as directory:
        measure(program, directory)


main()
