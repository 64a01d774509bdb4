"""Hypervisor backends: libvirt, and a fake one for tests without a guest."""
