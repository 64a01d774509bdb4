"""A real HTCondor for the tests marked ``condor``."""
