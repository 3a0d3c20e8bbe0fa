"""What a locustfile sets up once per process: options, percentiles, the goodput of the run, and its page.

Percentiles of Locust's tables and charts are those people ask of an LLM service: 50, 90, 95 and 99.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import locust.stats
from locust import events
from locust.env import Environment

from loadtest.locusts.goodput import Goodput
from loadtest.locusts.options import add_common, options_of, slo_of

PERCENTILES = [0.5, 0.9, 0.95, 0.99]


class Session:
    """The run of this process. Locust imports a locustfile once, so there is one."""

    def __init__(self, *add_options: Callable[[argparse.ArgumentParser], None]) -> None:
        locust.stats.PERCENTILES_TO_REPORT = PERCENTILES
        locust.stats.PERCENTILES_TO_STATISTICS = PERCENTILES
        locust.stats.PERCENTILES_TO_CHART = PERCENTILES
        self._add_options = (add_common, *add_options)
        self._goodput: Goodput | None = None
        events.init_command_line_parser.add_listener(self._add)
        events.init.add_listener(self._init)
        events.quitting.add_listener(self._quitting)

    @property
    def goodput(self) -> Goodput:
        """The outcomes so far; only after Locust has begun."""
        assert self._goodput is not None, "Locust's init event comes first"
        return self._goodput

    def _add(self, parser: argparse.ArgumentParser, **_: object) -> None:
        for add_options in self._add_options:
            add_options(parser)

    def _init(self, environment: Environment, **_: object) -> None:
        options = options_of(environment)
        goodput = self._goodput = Goodput(environment, lambda: slo_of(options))
        if environment.web_ui is not None and environment.web_ui.app is not None:

            @environment.web_ui.app.route("/goodput")
            def figures() -> dict[str, object]:
                return asdict(goodput.report())

    def _quitting(self, environment: Environment, **_: object) -> None:
        self.goodput.show()
        if path := options_of(environment).report_json:
            self.goodput.save(Path(path))
        environment.process_exit_code = self.goodput.exit_code()
