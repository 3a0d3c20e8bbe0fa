"""The pure core: plain data in, decisions out. No clock, no IO, no await (kept by tests/test_architecture.py)."""
