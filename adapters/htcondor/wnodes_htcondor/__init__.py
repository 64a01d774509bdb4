"""wnodes adapter for HTCondor; see README.md and the contract in plugin.py."""
