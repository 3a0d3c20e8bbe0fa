"""Policies: which feasible pair. Pure plug-ins; the table is POLICIES."""
