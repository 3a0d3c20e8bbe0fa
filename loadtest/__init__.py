"""Test bench: workloads, engine model, simulator, emulated engines, clients, reports."""
