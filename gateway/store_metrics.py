"""What `/metrics` says of the store and of the other gateways."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from gateway.sharing import Sharing, StoreState


class StoreMetrics(Collector):
    """Reads a gateway's part in the common view whenever Prometheus asks."""

    def __init__(self, sharing: Sharing) -> None:
        self._sharing = sharing

    def collect(self) -> Iterator[Metric]:
        """Every family."""
        sharing = self._sharing
        leases, follower = sharing.leases, sharing.follower.counts
        is_up = sharing.state is StoreState.CONNECTED
        yield GaugeMetricFamily("sluice_store_up", "1: connected; 0: each by its own view.", value=float(is_up))
        yield GaugeMetricFamily("sluice_store_peers", "Other gateways that live.", value=leases.owner_count)
        yield GaugeMetricFamily("sluice_store_peer_requests", "In flight by others.", value=len(leases))
        yield CounterMetricFamily("sluice_store_losses", "How often the store was lost.", value=sharing.away_count)
        dropped = sharing.outbox.dropped_count
        yield CounterMetricFamily("sluice_store_dropped_events", "Not told: the store was away or slow.", value=dropped)
        yield CounterMetricFamily("sluice_store_followed_events", "Read from others.", value=follower.events)
        skipped = CounterMetricFamily("sluice_store_skipped_messages", "Read and not believed.", labels=["reason"])
        skipped.add_metric(["malformed"], follower.malformed)
        skipped.add_metric(["unknown_version"], follower.unknown_versions)
        skipped.add_metric(["fenced"], leases.counts.fenced + follower.fenced)
        yield skipped
        yield CounterMetricFamily("sluice_store_expired_leases", "Ended by time.", value=leases.counts.expired)

    def describe(self) -> Iterator[Metric]:
        """Nothing: it would collect to find its names out."""
        return iter(())
