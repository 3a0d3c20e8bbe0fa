"""Sluice: a request-level gateway for disaggregated LLM serving."""
