"""Stores: where gateways share index and ledger."""
