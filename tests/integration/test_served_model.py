"""Real clients against the real system: what a served model answers, refuses, costs and shows."""

import asyncio
import json
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from typing import Any

import anthropic
import httpx
import openai
import psutil
import pytest
from tests.dashboards.promql_check import PrometheusServer, Target, prometheus
from tests.integration.running_system import MODEL, RunningSystem, wait_until

from expertmesh.core.metering.report import By
from expertmesh.store.database import open_database
from expertmesh.store.ledger import Ledger
from expertmesh.store.report import usage_cells

pytestmark = [pytest.mark.integration]

QUESTION: Any = [{"role": "user", "content": "Tell me a story about a fox."}]
CLEAR: Any = [{"role": "user", "content": "What is expert parallelism?"}]
"""Its greedy answer has no near-ties, so it is the same whatever else is in the batch."""


@pytest.fixture
def client(system: RunningSystem, key: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{system.gateway_url}/v1", api_key=key, max_retries=0)


def test_a_chat_answers_in_words(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=QUESTION, max_tokens=60, temperature=0
    )
    text = answer.choices[0].message.content or ""
    assert text.startswith("Once upon a time"), text
    assert answer.usage is not None and answer.usage.completion_tokens > 10


def test_a_stream_says_the_same_in_pieces(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(
        model=MODEL, messages=CLEAR, max_tokens=40, temperature=0
    )
    pieces = [
        chunk.choices[0].delta.content or ""
        for chunk in client.chat.completions.create(
            model=MODEL, messages=CLEAR, max_tokens=40, temperature=0, stream=True
        )
    ]
    assert "".join(pieces) == whole.choices[0].message.content
    assert len(pieces) > 10


def test_completions_responses_and_tokenize_pass_through(
    client: openai.OpenAI, system: RunningSystem, key: str
) -> None:
    completion = client.completions.create(model=MODEL, prompt="Once upon", max_tokens=5)
    assert completion.usage is not None and completion.usage.completion_tokens == 5
    response = client.responses.create(
        model=MODEL, input="What is the sea?", max_output_tokens=20, store=False
    )
    assert response.output_text
    tokens = httpx.post(
        f"{system.gateway_url}/tokenize",
        headers={"Authorization": f"Bearer {key}"},
        json={"model": MODEL, "prompt": "the sea"},
    )
    assert tokens.json()["count"] == len(tokens.json()["tokens"]) > 0


def test_the_anthropic_sdk_gets_its_own_api(system: RunningSystem, key: str) -> None:
    client = anthropic.Anthropic(base_url=system.gateway_url, api_key=key, max_retries=0)
    message = client.messages.create(model=MODEL, max_tokens=30, messages=QUESTION)
    assert message.content[0].type == "text" and message.content[0].text
    with client.messages.stream(model=MODEL, max_tokens=30, messages=QUESTION) as stream:
        assert "".join(stream.text_stream)
    counted = client.messages.count_tokens(model=MODEL, messages=QUESTION)
    assert counted.input_tokens == message.usage.input_tokens


def test_what_the_engine_had_in_its_cache_costs_less(client: openai.OpenAI) -> None:
    story = "Once upon a time there was a fox who lived by the sea with a friend. " * 20
    asked: dict[str, Any] = {
        "model": MODEL,
        "messages": [{"role": "user", "content": story}],
        "max_tokens": 8,
        "temperature": 0.0,
        "extra_headers": {"x-session-id": "one-rank"},
    }
    first, second = (client.chat.completions.with_raw_response.create(**asked) for _ in range(2))
    usage = second.parse().usage
    assert usage is not None and usage.prompt_tokens_details is not None
    assert (usage.prompt_tokens_details.cached_tokens or 0) >= 128
    assert float(second.headers["x-em-cost-usd"]) < float(first.headers["x-em-cost-usd"])


def test_the_model_is_listed(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL


@pytest.mark.parametrize(
    ("change", "status", "words"),
    [
        ({"model": "gpt-9"}, 404, MODEL),
        ({"messages": [{"role": "user", "content": "long " * 3000}]}, 400, "1024"),
        ({"max_tokens": -1}, 400, "max_tokens"),
    ],
    ids=["unknown model", "prompt longer than the context", "value that makes no sense"],
)
def test_a_wrong_request_gets_the_openai_error(
    system: RunningSystem, key: str, change: dict[str, Any], status: int, words: str
) -> None:
    answer = httpx.post(
        f"{system.gateway_url}/v1/chat/completions",
        headers={"Authorization": f"Bearer {key}"},
        json={"model": MODEL, "messages": QUESTION} | change,
    )
    assert answer.status_code == status
    error = answer.json()["error"]
    assert words in error["message"] and {"type", "param", "code"} <= error.keys()


def test_a_prompt_too_long_gets_the_anthropic_error(system: RunningSystem, key: str) -> None:
    client = anthropic.Anthropic(base_url=system.gateway_url, api_key=key, max_retries=0)
    with pytest.raises(anthropic.BadRequestError) as caught:
        client.messages.create(
            model=MODEL, max_tokens=5, messages=[{"role": "user", "content": "long " * 3000}]
        )
    body: Any = caught.value.body
    assert body["type"] == "error" and body["error"]["type"] == "invalid_request_error"


def test_nobody_enters_without_a_key(system: RunningSystem) -> None:
    url = f"{system.gateway_url}/v1/chat/completions"
    body = {"model": MODEL, "messages": QUESTION}
    assert httpx.post(url, json=body).status_code == 401
    wrong = httpx.post(url, json=body, headers={"Authorization": "Bearer sk-em-wrong"})
    assert wrong.status_code == 401 and wrong.json()["error"]["type"]


def test_a_client_that_goes_away_frees_the_engine(system: RunningSystem, key: str) -> None:
    urls = [rank["base_url"] for rank in system.groups("ready")[0]["ranks"]]

    def running() -> int:
        return sum(system.rank(url, "/em/info")["running"] for url in urls)

    body = {"model": MODEL, "messages": QUESTION, "max_tokens": 900, "stream": True}
    body["ignore_eos"] = True
    with httpx.stream(
        "POST",
        f"{system.gateway_url}/v1/chat/completions",
        headers={"Authorization": f"Bearer {key}"},
        json=body,
        timeout=60,
    ) as stream:
        assert stream.status_code == 200
        # Kept by name: httpx closes the stream when its iterator is collected.
        pieces = stream.iter_bytes()
        next(pieces)
        wait_until(lambda: running() == 1, 10, "the engine runs the request")
        left_s = time.monotonic()
    wait_until(lambda: running() == 0, 5, "the engine has dropped the request")
    assert time.monotonic() - left_s < 5


def test_ranks_hold_half_of_the_experts_each_and_count_all_tokens(
    system: RunningSystem, client: openai.OpenAI
) -> None:
    urls = [rank["base_url"] for rank in system.groups("ready")[0]["ranks"]]
    client.chat.completions.create(model=MODEL, messages=QUESTION, max_tokens=20, temperature=0)
    shares = [
        wait_until(lambda url=url: system.rank(url, "/em/info")["expert_tokens"], 15, "counts")
        for url in urls
    ]
    assert {len(share) for share in shares} == {8}
    assert len({expert for share in shares for expert in share}) == 16
    assert all(sum(share.values()) > 0 for share in shares)
    capacities = [system.rank(url, "/em/info") for url in urls]
    # Each rank says its own: the engine does not start with less than one full context.
    assert all(info["kv_tokens"] >= 1024 and info["max_running"] >= 1 for info in capacities)
    assert len({(info["kv_tokens"], info["max_running"]) for info in capacities}) == 1


def test_the_controller_sees_the_tokens_of_a_burst(
    system: RunningSystem, client: openai.OpenAI
) -> None:
    """All that clients were told, but for prompt tokens that came from a cache."""
    group = system.groups("ready")[0]
    name, urls = group["name"], [rank["base_url"] for rank in group["ranks"]]
    story = "Once upon a time a fox met a crow, and the crow had a piece of cheese. " * 12

    def totals() -> tuple[int, int]:
        ranks = [system.rank(url, "/em/info") for url in urls]
        return (
            sum(rank["uncached_prompt_tokens_total"] for rank in ranks),
            sum(rank["output_tokens_total"] for rank in ranks),
        )

    def seen() -> list[tuple[float, float]]:
        """Tokens in the span, as the engines tell and as gateways tell."""
        fleet = system.fleet()
        return [
            (
                rates["uncached_prompt_tokens_per_s"] * rates["span_s"],
                rates["output_tokens_per_s"] * rates["span_s"],
            )
            for rates in (fleet["doing"].get(name), fleet["flows"].get(MODEL))
            if rates is not None
        ]

    def ask(number: int) -> tuple[int, int, int]:
        usage = client.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": f"{story} What then? {number % 4}"}],
            max_tokens=10 + number,
            temperature=0,
        ).usage
        assert usage is not None and usage.prompt_tokens_details is not None
        cached = usage.prompt_tokens_details.cached_tokens or 0
        return usage.prompt_tokens - cached, cached, usage.completion_tokens

    wait_until(lambda: seen() == [(0.0, 0.0)] * 2, 30, "the system is quiet", system.describe)
    before = totals()
    began_s = time.monotonic()
    with ThreadPoolExecutor(4) as pool:
        counts = list(pool.map(ask, range(12)))
    took_s = time.monotonic() - began_s
    prompt, cached, output = (sum(count[i] for count in counts) for i in range(3))
    assert cached > 128
    after = totals()
    assert (after[0] - before[0], after[1] - before[1]) == (prompt, output)

    assert took_s < 8, f"the burst took {took_s:.1f} s and is in no span as a whole"

    def whole() -> list[tuple[float, float]]:
        found = seen()
        reached = all(o >= 0.98 * output and p >= 0.98 * prompt for p, o in found)
        return found if len(found) == 2 and reached else []

    wanted = pytest.approx((prompt, output), rel=0.02)
    assert wait_until(whole, 9, "both have seen the burst", system.describe) == [wanted] * 2


def test_ranks_offer_no_admin_routes_and_nothing_without_the_mesh_token(
    system: RunningSystem,
) -> None:
    url = system.groups("ready")[0]["ranks"][0]["base_url"]
    headers = {"X-EM-Mesh-Token": system.state.mesh_token()}
    for path in ("/collective_rpc", "/sleep", "/scale_elastic_ep", "/v1/load_lora_adapter"):
        assert httpx.post(url + path, headers=headers, json={}).status_code == 404, path
    assert httpx.get(url + "/health").status_code == 200
    for path in ("/v1/models", "/metrics", "/em/info", "/em/experts"):
        assert httpx.get(url + path).status_code == 401, path


def test_no_http_port_of_the_system_answers_without_a_token(system: RunningSystem) -> None:
    """Ports of Ray's own gRPC and of torch's rendezvous speak no HTTP and are not asked."""
    guarded = {
        system.gateway_url: ("/v1/models", "/metrics"),
        system.controller_url: ("/v1/fleet", "/v1/decisions", "/metrics"),
        system.dashboard_url: ("/api/v0/nodes", "/api/serve/applications/"),
    }
    for url, paths in guarded.items():
        for path in paths:
            assert httpx.get(url + path).status_code == 401, url + path


def test_every_address_that_the_system_chooses_is_loopback(system: RunningSystem) -> None:
    """All but the rendezvous stores of torch.distributed, which cannot be told an address."""
    exposed = set()
    for process in [*system.processes(), *system.process_tree()]:
        try:
            connections = process.net_connections(kind="tcp")
            name = process.name()
        except psutil.Error:
            continue
        for connection in connections:
            address = connection.laddr.ip if connection.laddr else ""
            local = address.startswith("127.") or address in ("::1", "::ffff:127.0.0.1")
            if connection.status == psutil.CONN_LISTEN and not local:
                exposed.add(name)
    assert all(name.startswith(("VLLM", "ray::ServeRepli", "python")) for name in exposed), exposed


def test_usage_and_cost_add_up(system: RunningSystem, client: openai.OpenAI) -> None:
    def usage() -> dict[str, Any]:
        return dict(json.loads(system.run("usage", "--by", "tenant", "--json").stdout))

    before = {row["tenant"]: row for row in usage()["rows"]}.get("tests", {"requests": 0})
    answer = client.chat.completions.create(model=MODEL, messages=QUESTION, max_tokens=12)
    assert answer.usage is not None

    def recorded() -> dict[str, Any]:
        row = {row["tenant"]: row for row in usage()["rows"]}.get("tests", {})
        return row if row.get("requests", 0) > before["requests"] else {}

    after = wait_until(recorded, 15, "the ledger holds the request")
    tokens_out = answer.usage.completion_tokens
    assert after["completion_tokens"] - before.get("completion_tokens", 0) == tokens_out
    total = usage()["total"]
    parts = ("attributed", "idle", "starting", "draining", "idle_nodes")
    amounts = [Decimal(total[f"{name}_usd"]) for name in parts]
    assert min(amounts) >= 0 < amounts[0]
    assert sum(amounts) == Decimal(total["capacity_usd"])
    assert amounts[2] > 0, "the group's start has cost"
    for by in ("model", "pool", "day", "key"):
        # The group costs on between two looks; what has been served does not change.
        grouped = json.loads(system.run("usage", "--by", by, "--json").stdout)
        assert grouped["total"]["tariff_usd"] == total["tariff_usd"]
        for name in ("capacity_usd", *(f"{name}_usd" for name in parts)):
            rows = sum(Decimal(row[name]) for row in grouped["rows"])
            assert rows == Decimal(grouped["total"][name]), (by, name)
    focus = json.loads(system.run("usage", "--focus", "--json").stdout)["Rows"]
    assert sum(Decimal(row["BilledCost"]) for row in focus) >= Decimal(total["capacity_usd"])


def test_status_shows_the_group(system: RunningSystem) -> None:
    shown = system.run(
        *("status", "--once", "--platform", "test", "--controller-url", system.controller_url)
    ).stdout
    assert "ready" in shown and "cheap" in shown and "0.60" in shown


MAY_BE_EMPTY = {
    "Accelerators": "it runs on CPUs",
    "Accelerators' memory in use": "it runs on CPUs",
    "Advice": "the model's mode is act",
    "Budget left today": "it has no budget",
    "Clients that went away": "others stay to the end",
    "Earned, and the same at providers": "no provider serves it",
    "Failing steps": "none fails",
    "Forecast error": "a forecast falls due after as long as a start takes",
    "Load less the one expected": "a forecast falls due after as long as a start takes",
    "Load within what was kept ready": "a forecast falls due after as long as a start takes",
    "Oldest wait less the one predicted": "nobody waits",
    "Power of the accelerators": "it runs on CPUs",
    "Ranks that get no requests": "none has failed",
    "Refused by a limit": "the tenant has no limit",
    "Sent again": "no attempt fails",
    "Sent to providers": "there is none",
    "Spend rate by model and pool": "it has no budget",
    "Spot zones": "no pool is spot",
    "Starts": "its group started before Prometheus",
    "Time of a request over the plan": "nothing is planned on CPUs",
    "Turned away": "there is room",
    "Wait in the queue": "nobody waits",
    "Wait of requests that waited": "nobody waits",
    "annotation Decisions": "nothing is decided on",
}
"""Panels with a query that has nothing to show in a system that is well, and why."""


async def test_every_query_of_every_panel_and_alert_is_answered(
    system: RunningSystem, key: str
) -> None:
    from dashboards.alerts import alerts, recordings, rules
    from dashboards.build import dashboards
    from dashboards.queries import PanelQuery, panel_queries

    def traffic() -> None:
        client = openai.OpenAI(base_url=f"{system.gateway_url}/v1", api_key=key)
        for _ in client.chat.completions.create(
            model=MODEL, messages=QUESTION, max_tokens=20, stream=True
        ):
            pass

    def check() -> None:
        asked = [query for board in dashboards().values() for query in panel_queries(board)]
        asked += [PanelQuery(each.record, each.record) for each in recordings()]
        wanted = [query for query in asked if query.panel not in MAY_BE_EMPTY]
        targets = [*scraped(system), *ray_targets(system)]
        with prometheus(targets, rules=rules()) as server:
            server.wait_for_scrapes(3, timeout_s=60)
            # The ledger is counted two minutes late.
            problems = server.wait_for_answers(wanted, timeout_s=200, traffic=traffic)
            assert not problems, "\n".join(map(str, problems))
            others = [query for query in asked if query.panel in MAY_BE_EMPTY]
            refused = [each for each in server.problems(others) if "refused" in each.problem]
            assert not refused, refused
            for alert in alerts():
                server.samples(alert.expr)  # raises when it is refused
            assert server.rule_problems() == ()
            firing = server.samples('ALERTS{alertstate="firing"}')
            assert not firing, firing

    await asyncio.to_thread(check)


async def test_what_is_shown_is_what_clients_saw_and_what_the_ledger_holds(
    system: RunningSystem, key: str
) -> None:
    """Requests, tokens, latency, revenue and cost, each within 2 %."""
    headers = {"Authorization": f"Bearer {key}"}
    body = {"model": MODEL, "messages": QUESTION, "max_tokens": 250, "ignore_eos": True}

    def ask(client: httpx.Client) -> tuple[float, dict[str, Any]]:
        began_s = time.perf_counter()
        answer = client.post(
            f"{system.gateway_url}/v1/chat/completions", headers=headers, json=body, timeout=60
        )
        took_s = time.perf_counter() - began_s
        return took_s, dict(answer.raise_for_status().json()["usage"])

    def usage() -> dict[str, Any]:
        return dict(json.loads(system.run("usage", "--json").stdout)["total"])

    shown = {
        "requests": 'sum(em_gateway_requests_total{status="200"})',
        "tokens in": 'sum(em_gateway_tokens_total{direction=~"in|cached"})',
        "tokens out": 'sum(em_gateway_tokens_total{direction="out"})',
        "seconds": "sum(em_gateway_request_duration_seconds_sum)",
        "tenant's tokens": 'sum(em_gateway_tenant_tokens_total{tenant="tests"})',
        "revenue": "sum(em_gateway_tariff_usd_total)",
        "judged": "sum(em_gateway_slo_requests_total)",
    }

    def read(server: PrometheusServer) -> dict[str, float]:
        time.sleep(3)  # two scrapes
        return {
            name: float(server.samples(expression)[0]["value"][1])
            for name, expression in shown.items()
        }

    def check() -> None:
        with httpx.Client() as client, prometheus(scraped(system)) as server:
            ask(client)
            server.wait_for_scrapes(3, timeout_s=60)
            ledger, before = usage(), read(server)
            answers = [ask(client) for _ in range(8)]
            after = read(server)
            grown = {name: after[name] - before[name] for name in shown}
            tokens_in = sum(counts["prompt_tokens"] for _, counts in answers)
            tokens_out = sum(counts["completion_tokens"] for _, counts in answers)
            assert grown["requests"] == grown["judged"] == len(answers)
            assert grown["tokens in"] == tokens_in and grown["tokens out"] == tokens_out
            assert grown["tenant's tokens"] == tokens_in + tokens_out
            assert grown["seconds"] == pytest.approx(sum(took for took, _ in answers), rel=0.02)

            def recorded() -> bool:
                return bool(usage()["requests"] == ledger["requests"] + len(answers))

            wait_until(recorded, 15, "the ledger holds the requests")
            now = usage()
            assert now["prompt_tokens"] - ledger["prompt_tokens"] == tokens_in
            assert now["completion_tokens"] - ledger["completion_tokens"] == tokens_out
            revenue = Decimal(now["tariff_usd"]) - Decimal(ledger["tariff_usd"])
            assert grown["revenue"] == pytest.approx(float(revenue), rel=0.02)
            costs = server.samples("em_controller_cost_usd_total")
            (until,) = server.samples("em_controller_ledger_timestamp_seconds")
            (spent,) = server.samples("sum(em_controller_spend_usd_total)")
            by_ledger, held_usd = asyncio.run(
                _cost(system.state.store_url, float(until["value"][1]), float(spent["value"][0]))
            )
            shown_usd = sum(float(each["value"][1]) for each in costs)
            assert shown_usd == pytest.approx(by_ledger, rel=0.02)
            # A turn and a scrape may each be seconds old, which are much of a system this young.
            seconds_usd = 0.6 * 6 / 3600
            wanted = pytest.approx(held_usd, rel=0.02, abs=seconds_usd)
            assert float(spent["value"][1]) == wanted
            # Hindsight begins when a whole minute has been in the ledger for two.
            past = wait_until(
                lambda: server.samples("em_controller_hindsight_usd"), 240, "hindsight is shown"
            )
            by_part = {each["metric"]["part"]: float(each["value"][1]) for each in past}
            (ends,) = server.samples("em_controller_hindsight_timestamp_seconds")
            until_s = float(ends["value"][1])
            (span,) = server.samples("em_controller_hindsight_span_seconds")
            since_s = until_s - float(span["value"][1])
            by_report, _ = asyncio.run(
                _cost(system.state.store_url, until_s, until_s, since_s=since_s, model=MODEL)
            )
            assert by_part["spent"] == pytest.approx(by_report, rel=0.02)
            assert 0 < by_part["least"] <= by_part["spent"]

    await asyncio.to_thread(check)


async def _cost(
    store_url: str,
    until_s: float,
    now_s: float,
    *,
    since_s: float | None = None,
    model: str | None = None,
) -> tuple[float, float]:
    """By the ledger's report until then, of all or of one model's groups, and of the groups that
    are held until now."""
    database = await open_database(store_url)
    try:
        ledger = Ledger(database)
        rows = (await usage_cells(ledger, since_s, until_s)).grouped(By.MODEL).rows
        chosen = rows.values() if model is None else [rows[model]]
        report = sum(row.capacity_nano_usd for row in chosen) / 1e9
        held = sum(
            hold.usd_per_hour * ((hold.ended_at_s or now_s) - hold.started_at_s) / 3600
            for hold in await ledger.capacity()
        )
        return report, float(held)
    finally:
        await database.close()


def scraped(system: RunningSystem) -> list[Target]:
    token = system.state.mesh_token()
    return [
        Target("gateway", system.gateway_url.removeprefix("http://"), token),
        Target("controller", system.controller_url.removeprefix("http://"), token),
    ]


def ray_targets(system: RunningSystem) -> list[Target]:
    """As Ray's own discovery names them: each node, and what is on the head besides."""
    found = httpx.get(
        f"{system.dashboard_url}/api/prometheus/sd",
        headers={"Authorization": f"Bearer {system.state.ray_token()}"},
    ).raise_for_status()
    addresses = [address for each in found.json() for address in each["targets"]]
    # The head, and two nodes of each of the two pools.
    assert len(addresses) >= 5
    return [Target(f"ray-{number}", address) for number, address in enumerate(addresses)]


def test_a_second_system_in_the_folder_and_a_port_in_use_are_refused(
    system: RunningSystem, tmp_path_factory: pytest.TempPathFactory
) -> None:
    files = ("-f", str(system.platform_file), "-f", str(system.deployment_file))
    second = system.run("up", *files, check=False)
    assert second.returncode == 2
    assert "a system runs in this folder already" in second.stderr
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        other = tmp_path_factory.mktemp("other")
        text = system.platform_file.read_text()
        gateway_port = system.gateway_url.rpartition(":")[2]
        platform_file = other / "platform.yaml"
        platform_file.write_text(
            text.replace(gateway_port, str(port)).replace("name: test", "name: other")
        )
        refused = system.run(
            "up", "-f", str(platform_file), "-f", str(system.deployment_file), check=False
        )
    assert refused.returncode == 2
    assert f"gateway.port: {port}" in refused.stderr
