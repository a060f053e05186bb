"""Run every query of a dashboard on a real Prometheus that scrapes what it is pointed at."""

import json
import math
import shutil
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from dashboards.queries import PanelQuery, panel_queries
from grafana_foundation_sdk.models.dashboard import Dashboard

START_TIMEOUT_S = 30.0
STOP_TIMEOUT_S = 10.0
POLL_S = 0.2


@dataclass(frozen=True, slots=True)
class Target:
    """One `/metrics` to scrape."""

    job: str
    address: str
    """`host:port`"""
    bearer_token: str | None = None
    metrics_path: str = "/metrics"


@dataclass(frozen=True, slots=True)
class QueryProblem:
    panel: str
    expression: str
    problem: str

    def __str__(self) -> str:
        return f"{self.panel}: {self.problem}: {self.expression}"


class PrometheusError(Exception):
    """Prometheus did not start, or does not reach its targets."""


class QueryFailed(Exception):
    """Prometheus refused the query; the message is its own."""


def check_dashboard(
    dashboard: Dashboard,
    targets: Sequence[Target],
    *,
    scrapes: int = 3,
    scrape_timeout_s: float = 60.0,
    answer_timeout_s: float = 60.0,
    traffic: Callable[[], None] | None = None,
    rules: dict[str, Any] | None = None,
) -> tuple[QueryProblem, ...]:
    """What is wrong with the dashboard's queries; empty when each of them has an answer.

    Waits until all targets are up and `scrapes` scrapes of each are in. Rates need something that
    moves between scrapes: `traffic` is called again and again until every query is answered or
    `answer_timeout_s` is over; without it, the targets must be busy by themselves.
    """
    with prometheus(targets, rules=rules) as server:
        server.wait_for_scrapes(scrapes, timeout_s=scrape_timeout_s)
        return server.wait_for_answers(
            panel_queries(dashboard), timeout_s=answer_timeout_s, traffic=traffic
        )


@contextmanager
def prometheus(
    targets: Sequence[Target], *, scrape_interval_s: int = 1, rules: dict[str, Any] | None = None
) -> Iterator["PrometheusServer"]:
    """A Prometheus on a free loopback port; stopped, and its data removed, at the end.

    `rules`: the content of a file of rules; they are evaluated at every scrape.
    """
    program = shutil.which("prometheus")
    if program is None:
        raise PrometheusError("prometheus is missing: run scripts/install-tools.sh")
    # Its configuration holds tokens: the folder is readable for its owner alone.
    with tempfile.TemporaryDirectory(prefix="promql-check-") as name:
        folder = Path(name)
        config = folder / "prometheus.yaml"
        content = scrape_config(targets, scrape_interval_s)
        if rules is not None:
            often = [
                {**group, "interval": f"{scrape_interval_s}s"} for group in rules.get("groups", ())
            ]
            (folder / "rules.yaml").write_text(yaml.safe_dump({"groups": often}))
            content = {**content, "rule_files": [str(folder / "rules.yaml")]}
        config.write_text(yaml.safe_dump(content))
        port = _free_port()
        with (folder / "log").open("wb") as log:
            process = subprocess.Popen(
                [
                    program,
                    f"--config.file={config}",
                    f"--storage.tsdb.path={folder / 'data'}",
                    f"--web.listen-address=127.0.0.1:{port}",
                    "--log.level=warn",
                ],
                stdout=log,
                stderr=subprocess.STDOUT,
            )
            try:
                server = PrometheusServer(f"http://127.0.0.1:{port}", tuple(targets))
                _wait_until_ready(server, process, folder / "log")
                yield server
            finally:
                process.terminate()
                try:
                    process.wait(STOP_TIMEOUT_S)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()


def scrape_config(targets: Sequence[Target], scrape_interval_s: int) -> dict[str, Any]:
    interval = f"{scrape_interval_s}s"
    jobs = []
    for target in targets:
        job: dict[str, Any] = {
            "job_name": target.job,
            "metrics_path": target.metrics_path,
            "static_configs": [{"targets": [target.address]}],
        }
        if target.bearer_token is not None:
            job["authorization"] = {"type": "Bearer", "credentials": target.bearer_token}
        jobs.append(job)
    return {
        "global": {"scrape_interval": interval, "scrape_timeout": interval},
        "scrape_configs": jobs,
    }


class PrometheusServer:
    def __init__(self, url: str, targets: tuple[Target, ...]) -> None:
        self.url = url
        self._targets = targets

    def wait_for_scrapes(self, scrapes: int, *, timeout_s: float) -> None:
        """Until each target is up and was scraped well `scrapes` times.

        Prometheus itself takes about six seconds before the first scrape.
        """
        deadline_s = time.monotonic() + timeout_s
        while True:
            good = {
                sample["metric"]["job"]: float(sample["value"][1])
                for sample in self.samples("sum_over_time(up[1h])")
            }
            short = [each for each in self._targets if good.get(each.job, 0) < scrapes]
            if not short:
                return
            if time.monotonic() > deadline_s:
                raise PrometheusError(self._explain(short, scrapes, timeout_s))
            time.sleep(POLL_S)

    def wait_for_answers(
        self,
        queries: Sequence[PanelQuery],
        *,
        timeout_s: float,
        traffic: Callable[[], None] | None = None,
    ) -> tuple[QueryProblem, ...]:
        """What is still failed or empty when the time is over."""
        deadline_s = time.monotonic() + timeout_s
        while True:
            if traffic is not None:
                traffic()
            problems = self.problems(queries)
            if not problems or time.monotonic() > deadline_s:
                return problems
            time.sleep(POLL_S)

    def problems(self, queries: Sequence[PanelQuery]) -> tuple[QueryProblem, ...]:
        found = []
        for query in queries:
            problem = self._problem(query.expression)
            if problem is not None:
                found.append(QueryProblem(query.panel, query.expression, problem))
        return tuple(found)

    def rule_problems(self) -> tuple[str, ...]:
        """Rules that could not be evaluated, or whose texts could not be filled in."""
        groups = self._get("/api/v1/rules")["data"]["groups"]
        found = []
        for rule in (rule for group in groups for rule in group["rules"]):
            if rule["health"] != "ok":
                found.append(f"{rule['name']}: {rule['health']} {rule.get('lastError', '')}")
            for alert in rule.get("alerts", ()):
                texts = " ".join(alert["annotations"].values())
                if "error" in texts.lower() and "<error" in texts.lower():
                    found.append(f"{rule['name']}: {texts}")
        return tuple(found)

    def samples(self, expression: str) -> list[dict[str, Any]]:
        answer = self._get("/api/v1/query", query=expression)
        if answer["status"] != "success":
            raise QueryFailed(answer["error"])
        result = answer["data"]["result"]
        if answer["data"]["resultType"] == "scalar":
            return [{"metric": {}, "value": result}]
        return list(result)

    def _problem(self, expression: str) -> str | None:
        try:
            samples = self.samples(expression)
        except QueryFailed as error:
            return f"refused ({error})"
        if not samples:
            return "empty"
        if not any(math.isfinite(float(sample["value"][1])) for sample in samples):
            return f"no number ({samples[0]['value'][1]})"
        return None

    def _explain(self, short: list[Target], scrapes: int, timeout_s: float) -> str:
        active = self._get("/api/v1/targets")["data"]["activeTargets"]
        errors = {
            each["labels"]["job"]: each["lastError"] or f"so far {each['health']}"
            for each in active
        }
        reasons = "; ".join(
            f"{each.job} ({each.address}): {errors.get(each.job, 'not scraped yet')}"
            for each in short
        )
        return f"fewer than {scrapes} good scrapes after {timeout_s:g} s: {reasons}"

    def _get(self, path: str, **parameters: str) -> dict[str, Any]:
        url = f"{self.url}{path}?{urllib.parse.urlencode(parameters)}"
        try:
            with urllib.request.urlopen(url, timeout=10) as reply:
                answer: dict[str, Any] = json.load(reply)
        except urllib.error.HTTPError as refusal:
            with refusal:
                answer = json.load(refusal)
        return answer


def _wait_until_ready(
    server: PrometheusServer, process: subprocess.Popen[bytes], log: Path
) -> None:
    deadline_s = time.monotonic() + START_TIMEOUT_S
    while True:
        try:
            with urllib.request.urlopen(f"{server.url}/-/ready", timeout=1):
                return
        except OSError:
            status = process.poll()
            if status is not None or time.monotonic() > deadline_s:
                state = f"ended with status {status}" if status is not None else "is not ready"
                lines = "\n".join(log.read_text(errors="replace").splitlines()[-10:])
                raise PrometheusError(f"Prometheus {state}; its last lines:\n{lines}") from None
            time.sleep(POLL_S)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port
