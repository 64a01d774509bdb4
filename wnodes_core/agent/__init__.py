"""wnodesd, one per node: who may have a lease, and that nothing of it is left when it ends."""
