#!/usr/bin/env python3
"""Prints the features of libvirt's x86 CPU models: src/compat/baseline/x86_models.txt.

    scripts/cpu-models.py virsh -c qemu:///session >src/compat/baseline/x86_models.txt

The arguments are a virsh command with its connection; both need libvirt 11.6 or newer
(--ignore-host). Each model is given to hypervisor-cpu-baseline twice, so that the answer contains all
of its features, whatever the host supports. Nothing is started or changed.

A line has the name, the vendor (- if libvirt names none), the model from which it differs least (- if
none), and the difference: +feature, -feature, and ~feature for one that newer QEMUs have removed from
the model.
"""

import os
import re
import subprocess
import sys
import tempfile

MACHINE = ["--virttype", "qemu", "--machine", "q35"]


def virsh(*arguments):
    command = [*sys.argv[1:], *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def features(model):
    """Returns the features that a model has, and those that were removed from it."""
    with tempfile.NamedTemporaryFile("w", suffix=".xml") as file:
        file.write(f"<cpu><model>{model}</model></cpu>" * 2)
        file.flush()
        os.chmod(file.name, 0o644)
        answer = virsh(
            "hypervisor-cpu-baseline", file.name, *MACHINE, "--features", "--ignore-host"
        )

    def with_policy(policy):
        return set(re.findall(f"policy='{policy}' name='([^']*)'", answer))

    closest = re.search("<model[^>]*>([^<]*)</model>", answer).group(1)
    removed = with_policy("disable") if closest == model else set()
    return with_policy("require"), removed


def main():
    document = virsh("domcapabilities", *MACHINE)
    done = {}
    for attributes, name in re.findall("<model ([^>]*usable=[^>]*)>([^<]*)</model>", document):
        vendor = re.search("vendor='([^']*)'", attributes)
        vendor = vendor.group(1) if vendor else "unknown"
        # libvirt writes Zhaoxin's two identifications as one word pair.
        vendor = "-" if vendor == "unknown" else vendor.replace(" ", "_")
        has, removed = features(name)
        base = min(done, key=lambda other: len(has ^ done[other]), default=None)
        if base is None or len(has ^ done[base]) >= len(has):
            base, common = "-", set()
        else:
            common = done[base]
        words = [name, vendor, base]
        words += [f"+{feature}" for feature in sorted(has - common)]
        words += [f"-{feature}" for feature in sorted(common - has)]
        words += [f"~{feature}" for feature in sorted(removed)]
        print(*words)
        done[name] = has


if __name__ == "__main__":
    main()
