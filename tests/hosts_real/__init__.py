"""Tests that drive a real WebUI over HTTP; docs/hosts.md says how to run them."""
