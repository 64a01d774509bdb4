"""Storage providers: how a folder of the host is seen in the guest."""
