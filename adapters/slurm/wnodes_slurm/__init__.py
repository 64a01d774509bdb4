"""Slurm adapter of wnodes: a batch job in its own virtual machine, asked for by ``--vm-image=NAME``."""
