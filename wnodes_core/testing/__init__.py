"""Contract suites that plug-in authors inherit in their own tests."""
