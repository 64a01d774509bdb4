"""The LSF adapter of wnodes; see plugin.py for the contract with LSF."""
