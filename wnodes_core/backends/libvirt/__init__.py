"""The libvirt backend: a private QEMU driver inside the keeper, no daemon, no root."""
