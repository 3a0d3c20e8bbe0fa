"""Reading an engine's /metrics the way a person would: the sum of a metric's samples with some labels."""

from __future__ import annotations

import aiohttp
from prometheus_client.parser import text_string_to_metric_families


class Metrics:
    """One scrape of an engine."""

    def __init__(self, text: str) -> None:
        self._samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]

    def value(self, name: str, **labels: str) -> float:
        """The sum over the samples of that full name (with `_total`) that carry these labels. KeyError when none."""
        found = [
            sample.value for sample in self._samples if sample.name == name and labels.items() <= sample.labels.items()
        ]
        if not found:
            raise KeyError(f"{name}{labels}")
        return sum(found)

    @property
    def busy_count(self) -> float:
        """Requests running and waiting."""
        return self.value("vllm:num_requests_running") + self.value("vllm:num_requests_waiting")

    @property
    def failed_transfer_count(self) -> float:
        """Transfers that failed, and readers that came after the lease was over."""
        late = self.value("vllm:nixl_num_notifications_after_expiry_total")
        return self.value("vllm:nixl_num_failed_transfers_total") + late

    def prompt_tokens(self, source: str) -> float:
        """Prompt tokens so far that came from `local_compute`, `local_cache_hit` or `external_kv_transfer`."""
        return self.value("vllm:prompt_tokens_by_source_total", source=source)


async def read_metrics(session: aiohttp.ClientSession, url: str) -> Metrics:
    """A scrape of the engine at the base URL."""
    async with session.get(f"{url}/metrics") as response:
        response.raise_for_status()
        return Metrics(await response.text())
