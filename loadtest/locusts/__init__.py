"""Locust users for LLM serving: streams with TTFT and TBT, traces replayed open loop, goodput. Imports nothing.

`import locust` makes the standard library's sockets cooperative (gevent), so nothing outside this package and the
locustfiles imports it.
"""
