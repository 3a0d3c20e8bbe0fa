"""Policies that look for the engine which holds the prompt's prefix, and at load so as not to drown it."""
