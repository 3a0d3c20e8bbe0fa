"""Policies that look at load alone: counts of requests, queues and KV usage."""
