#!/bin/sh
# The <emulator> of every domain: QEMU with the batch system's signals blocked.
#
# Slurm sends SIGTERM to each process of a step, QEMU included, and QEMU quits on it, while the
# user's program in the guest is still owed its grace time. libvirt resets signal masks before it
# starts an emulator, so they are blocked here, after libvirt and before QEMU. SIGKILL remains.
# libvirt's capability probes (-machine none) are ended with SIGTERM and must stay deaf to nothing:
# with it blocked a probe took 12 s.
PATH=/usr/bin:/bin
export PATH
for qemu in /usr/bin/qemu-system-x86_64 /usr/libexec/qemu-kvm; do
    [ -x "$qemu" ] || continue
    case " $* " in *" -machine none"*) exec "$qemu" "$@" ;; esac
    exec env --block-signal=TERM,INT,HUP,QUIT,USR2,ALRM "$qemu" "$@"
done
echo "$0: no QEMU for x86_64: want the package qemu-system-x86 (Debian) or qemu-kvm (EL)" >&2
exit 127
