"""Policies that look at predicted times."""
