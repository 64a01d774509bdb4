"""wnodes: any batch job in its own virtual machine, on any LRMS."""

__version__ = "0.1.0"
