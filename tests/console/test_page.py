"""The console in a headless browser: what it shows, how it fares, and how it is used."""

import asyncio
import json
import os
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from playwright.async_api import Browser, expect
from tests.console.fake_view import (
    OSS,
    QWEN,
    TODAY,
    FakeRole,
    FakeToday,
    FakeView,
    busy_view,
    empty_view,
    failing_view,
)
from tests.console.stand import TOKEN, FakeGateway, Look, Stand, chromium, looking
from tests.controller.running_system import RunningSystem

pytestmark = [pytest.mark.integration]

NOTHING = "\N{EN DASH}"
TIMES = "\N{MULTIPLICATION SIGN}"

PICTURES = os.environ.get("EXPERTMESH_PICTURES")
"""A folder where the screenshots are kept, as docs/images."""


@pytest.fixture
async def browser() -> AsyncIterator[Browser]:
    async with chromium() as started:
        yield started


@pytest.fixture
async def stand() -> AsyncIterator[Stand]:
    """Busy; a test gives it another view before it starts."""
    made = Stand(busy_view(), FakeToday(TODAY))
    yield made
    await made.stop()


async def _enter(look: Look, stand: Stand) -> None:
    await look.page.goto(stand.link())
    await expect(look.page.locator("#tiles .tile")).to_have_count(10)


async def _picture(look: Look, name: str, tmp_path: Path, height: int = 900) -> None:
    await look.page.set_viewport_size({"width": 1280, "height": height})
    folder = Path(PICTURES) if PICTURES else tmp_path
    file = folder / f"console-{name}.png"
    await look.page.screenshot(path=file)
    assert file.stat().st_size > 20_000, "the picture is as good as blank"


# What it shows


async def test_an_empty_system(browser: Browser, stand: Stand, tmp_path: Path) -> None:
    stand.view, stand.today = empty_view(), FakeToday(TODAY)
    await stand.start()
    async with looking(browser) as look:
        await _enter(look, stand)
        assert await look.text("#health") == "Live"
        assert await look.text("#tile-queued .value") == "0"
        assert await look.text("#tile-groups .value") == "0 / 0"
        assert await look.text("#tile-cost-now .value") == "$1.50"
        assert await look.text("#tile-ttft .value") == NOTHING
        row = await look.page.locator("#model-rows tr > *").all_inner_texts()
        assert row[-2:] == [NOTHING, "load"], "there is nothing to look back on"
        assert await look.page.locator(".cell[data-state=free]").count() == 4
        assert await look.text("#decisions-empty") == "No decision yet."
        await _picture(look, "empty", tmp_path)
        assert look.complaints == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_a_busy_system_shows_what_the_api_says(
    browser: Browser, stand: Stand, tmp_path: Path, scheme: str
) -> None:
    await stand.start()
    shown = stand.view.shown
    async with looking(browser, color_scheme=scheme) as look:
        await _enter(look, stand)
        await expect(look.page.locator("svg.heat rect")).to_have_count(4 * 128)
        tiles = {
            "queued": "214",
            "running": "548",
            "wait": "4.2 s",
            "ttft": "2.31 s",
            "tpot": "41 ms",
            "tokens": "25,550",
            "groups": "3 / 4",
            "cost-now": f"${shown.usd_per_hour:.2f}",
            "cost-today": "$3,456.79",
            "tariff-today": "$5,120.50",
        }
        for name, value in tiles.items():
            assert await look.text(f"#tile-{name} .value") == value, name
        assert await look.text("#platform") == "somewhere"

        for pool in shown.pools:
            text = await look.text(f".pool[data-pool='{pool.name}'] .pool-head + p")
            assert f"{len(pool.nodes)} of at most {pool.max_nodes} nodes" in text
            assert f"groups ${pool.groups_usd_per_hour:.2f}/h" in text
            assert f"idle ${pool.idle_usd_per_hour:.2f}/h" in text
        for group in shown.groups:
            own = f".group[data-group='{group.name}']"
            assert await look.text(f"{own} .group-state") == group.state
            assert f"${group.usd_per_hour:.2f}/h" in await look.text(f"{own} summary .note")
            assert await look.page.locator(f"{own} .rank-row").count() == group.data
            cells = look.page.locator(f".cell[title^='{group.name} rank ']")
            assert await cells.count() == group.data
        heat = stand.view.experts[shown.groups[0].name]
        note = await look.text(f".group[data-group='{shown.groups[0].name}'] .heat-note")
        assert note == f"Experts, last 10 s: heaviest rank {heat.imbalance:.2f} {TIMES} the mean."

        row = await look.page.locator(f"tr[data-model='{QWEN}'] > *").all_inner_texts()
        assert row == [
            *(QWEN, "2 / 3", "2.61 / 2.02", "214", "487", "4.2 s", "2.31 s / 2.00 s"),
            *("41 ms / 50 ms", "$90.24 / $120.00", "$1,743.36 / $1,210.10", "load"),
        ]
        past = look.page.locator(f"tr[data-model='{QWEN}'] > [title='over 24 h']")
        assert await past.inner_text() == "$1,743.36 / $1,210.10"
        assert f"{OSS} (advise)" in await look.text("#model-rows")
        seqs = await look.page.locator(".decision").evaluate_all(
            "all => all.map(one => Number(one.dataset.seq))"
        )
        assert seqs == [one["seq"] for one in stand.view.made]
        await _picture(look, "busy" if scheme == "light" else "busy-dark", tmp_path, 1350)
        assert look.complaints == []


async def test_values_follow_the_controller(browser: Browser, stand: Stand) -> None:
    stand.view = empty_view()
    await stand.start()
    async with looking(browser) as look:
        await _enter(look, stand)
        busy = busy_view()
        stand.view.shown, stand.view.made = busy.shown, busy.made
        stand.view.now_s += 3.0
        await expect(look.page.locator("#tile-queued .value")).to_have_text("214")
        await expect(look.page.locator(".decision")).to_have_count(5)
        empty = empty_view()
        stand.view.shown = empty.shown
        await expect(look.page.locator(".group")).to_have_count(0)
        await expect(look.page.locator(".cell[data-state=free]")).to_have_count(4)


async def test_text_of_the_controller_is_no_markup(browser: Browser, stand: Stand) -> None:
    stand.view.made[0]["reason"] = "<img src=x onerror=alert(1)>"
    await stand.start()
    async with looking(browser) as look:
        await _enter(look, stand)
        assert await look.page.locator("#decision-list img").count() == 0
        assert "<img src=x" in await look.text(".decision:first-child .reason")


# How it fares


async def test_a_failing_controller_says_what_fails(
    browser: Browser, stand: Stand, tmp_path: Path
) -> None:
    stand.view, stand.today = failing_view(), FakeToday(TODAY, is_down=True)
    await stand.start()
    async with looking(browser) as look:
        await _enter(look, stand)
        health = look.page.locator("#health")
        await expect(health).to_have_attribute("data-level", "bad")
        text = await look.text("#health")
        for step, why in stand.view.problems.items():
            assert f"{step} ({why})" in text
        assert await look.text("#tile-groups .note") == "1 lost"
        assert await look.text("#tile-cost-today .value") == NOTHING
        assert await look.text("#tile-cost-today .note") == "the ledger does not answer"
        assert "connection refused" in await look.text("#decisions-empty")
        assert "nodes not known" in await look.text(".pool[data-pool=h200-od]")
        await _picture(look, "failing", tmp_path)


async def test_a_loop_that_stands_still_greys_the_page_with_its_age(
    browser: Browser, stand: Stand
) -> None:
    await stand.start()
    async with looking(browser) as look:
        await _enter(look, stand)
        assert await look.page.locator("body[data-stale]").count() == 0
        stand.view.now_s += 90.0
        await expect(look.page.locator("body[data-stale]")).to_have_count(1)
        assert "stands still" in await look.text("#health")
        # It goes on counting while the test looks.
        assert re.search(r"\b9\d s old", await look.text("#health"))


async def test_a_follower_names_its_leader(browser: Browser, stand: Stand) -> None:
    stand.view = FakeView(made=busy_view().made)
    stand.role = FakeRole(leads=False, leader_url="http://10.0.0.7:8090")
    await stand.start()
    async with looking(browser) as look:
        await look.page.goto(stand.link())
        await expect(look.page.locator("#health")).to_have_text(
            "This controller follows; ask the leader, http://10.0.0.7:8090/console/"
        )
        await expect(look.page.locator(".decision")).to_have_count(5)


async def test_the_page_comes_back_after_a_restart_of_the_controller(
    browser: Browser, stand: Stand
) -> None:
    await stand.start()
    async with looking(browser) as look:
        await _enter(look, stand)
        await stand.stop()
        await expect(look.page.locator("body[data-stale]")).to_have_count(1)
        await expect(look.page.locator("#health")).to_contain_text("old; trying again")
        assert await look.text("#tile-queued .value") == "214", "the last values stay"
        stand.view = empty_view()
        await stand.start()
        await expect(look.page.locator("#health")).to_have_text("Live")
        await expect(look.page.locator("#tile-queued .value")).to_have_text("0")
        assert await look.page.locator("body[data-stale]").count() == 0


# Who may look


async def test_without_a_session_there_is_only_the_question_who_asks(
    browser: Browser, stand: Stand
) -> None:
    await stand.start()
    async with looking(browser) as look:
        await look.page.goto(f"{stand.url}/console/")
        assert await look.page.locator("#view").is_hidden()
        await look.page.fill("#secret", "a wrong one")
        await look.page.keyboard.press("Enter")
        await expect(look.page.locator("#enter-error")).to_contain_text("neither the mesh token")
        assert await look.page.locator("#view").is_hidden()
        await look.page.fill("#secret", TOKEN)
        await look.page.keyboard.press("Enter")
        await expect(look.page.locator("#tiles .tile")).to_have_count(10)
        kept = await look.page.evaluate(
            "JSON.stringify([{...sessionStorage}, {...localStorage}, document.cookie,"
            " location.href, document.querySelector('#secret').value])"
        )
        assert TOKEN not in kept
        await look.page.reload()
        await expect(look.page.locator("#tiles .tile")).to_have_count(10)
        await look.page.click("#leave")
        assert await look.page.locator("#enter").is_visible()
        await look.page.reload()
        assert await look.page.locator("#enter").is_visible()


async def test_a_link_counts_more_than_a_session_that_has_ended(
    browser: Browser, stand: Stand
) -> None:
    await stand.start()
    async with looking(browser) as look:
        await look.page.goto(f"{stand.url}/console/")
        await look.page.evaluate("sessionStorage.setItem('expertmesh session', 'an old one')")
        await look.page.reload()
        await expect(look.page.locator("#enter-error")).to_contain_text("session has ended")
        await look.page.evaluate("sessionStorage.setItem('expertmesh session', 'an old one')")
        await look.page.goto("about:blank")
        await _enter(look, stand)


async def test_a_link_opens_once_and_leaves_the_address(browser: Browser, stand: Stand) -> None:
    await stand.start()
    link = stand.link()
    async with looking(browser) as look:
        await look.page.goto(link)
        await expect(look.page.locator("#tiles .tile")).to_have_count(10)
        assert look.page.url == f"{stand.url}/console/"
    async with looking(browser) as look:
        await look.page.goto(link)
        await expect(look.page.locator("#enter-error")).to_contain_text("a link that was used")


# How it is used


async def test_it_can_be_used_by_keyboard(browser: Browser, stand: Stand) -> None:
    await stand.start()
    async with looking(browser) as look:
        await _enter(look, stand)
        await look.page.evaluate("document.activeElement.blur()")
        seen: list[str] = []
        for _ in range(70):
            await look.page.keyboard.press("Tab")
            seen.append(
                await look.page.evaluate(
                    "(() => { const e = document.activeElement; const s = getComputedStyle(e);"
                    " return `${e.id || e.closest('[id]')?.id || e.tagName} ${s.outlineStyle}` })()"
                )
            )
        names = [one.split()[0] for one in seen]
        for wanted in ("theme", "leave", "decision-model", "wi-model", "chat-key", "chat-text"):
            assert wanted in names, wanted
        assert all(one.endswith(" solid") for one in seen if not one.startswith("BODY")), seen

        first = look.page.locator(".group").first
        assert await first.evaluate("one => one.open")
        await first.locator("summary").focus()
        await look.page.keyboard.press("Enter")
        assert not await first.evaluate("one => one.open")
        await asyncio.sleep(1.5)
        assert not await first.evaluate("one => one.open"), "a new state opened it again"


async def test_a_phone_needs_no_scrolling_to_the_side(browser: Browser, stand: Stand) -> None:
    await stand.start()
    phone = {"width": 360, "height": 740}
    async with looking(browser, viewport=phone, has_touch=True, is_mobile=True) as look:
        await _enter(look, stand)
        width = await look.page.evaluate("document.documentElement.scrollWidth")
        assert width <= phone["width"]
        small = await look.page.locator("button:visible, select:visible").evaluate_all(
            "all => all.map(e => e.getBoundingClientRect()).filter(r => r.height < 36).length"
        )
        assert small == 0


async def test_nothing_jumps_while_it_runs(browser: Browser, stand: Stand) -> None:
    await stand.start()
    async with looking(browser) as look:
        await look.page.add_init_script(
            "window.shifts = []; new PerformanceObserver(list => list.getEntries().forEach(e =>"
            " shifts.push([e.startTime, e.value]))).observe({type: 'layout-shift', buffered: true})"
        )
        await _enter(look, stand)
        await look.page.wait_for_timeout(500)
        began = await look.page.evaluate("performance.now()")
        for step in range(3):
            stand.view.now_s += 1.0
            stand.view.shown = busy_view().shown if step % 2 else _louder(busy_view()).shown
            await look.page.wait_for_timeout(1100)
        shifts = await look.page.evaluate("shifts")
        assert sum(value for at, value in shifts if at > began) < 0.01, shifts


def _louder(view: FakeView) -> FakeView:
    from dataclasses import replace

    assert view.shown is not None
    models = tuple(replace(model, queued=model.queued * 1000 + 7) for model in view.shown.models)
    view.shown = replace(view.shown, models=models)
    return view


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("view", [busy_view, failing_view])
async def test_text_stands_out_from_what_is_behind_it(
    browser: Browser, stand: Stand, scheme: str, view: Any
) -> None:
    """WCAG 2 AA: 4.5 to 1, by computed colours."""
    stand.view = view()
    await stand.start()
    async with looking(browser, color_scheme=scheme) as look:
        await _enter(look, stand)
        faint = await look.page.evaluate(_FAINT)
        assert faint == []


async def test_the_switch_of_colours_is_kept(browser: Browser, stand: Stand) -> None:
    await stand.start()
    async with looking(browser, color_scheme="dark") as look:
        await _enter(look, stand)

        async def page_colour() -> str:
            return str(await look.page.evaluate("getComputedStyle(document.body).backgroundColor"))

        dark = await page_colour()
        await look.page.click("#theme")
        assert await look.text("#theme") == "Light"
        assert await page_colour() != dark
        await look.page.reload()
        assert await page_colour() != dark
        await look.page.click("#theme")
        assert await page_colour() == dark


async def test_decisions_can_be_narrowed_to_a_model(browser: Browser, stand: Stand) -> None:
    await stand.start()
    async with looking(browser) as look:
        await _enter(look, stand)
        await look.page.select_option("#decision-model", OSS)
        await expect(look.page.locator(".decision")).to_have_count(2)
        await look.page.select_option("#decision-model", "")
        await expect(look.page.locator(".decision")).to_have_count(5)


async def test_a_decision_explains_itself_and_the_policy_answers_what_if(
    browser: Browser, stand: Stand
) -> None:
    system = RunningSystem()
    await system.pass_s(20)
    system.gateway.in_flight = {"em-tiny-cheap-1": 6}
    system.gateway.queued = 4
    await system.pass_s(20)
    stand.view = _Live(system)
    await stand.start()
    async with looking(browser) as look:
        await _enter(look, stand)
        started = look.page.locator(".decision[data-acts]").first
        await started.locator("summary").click()
        seq = int(await started.get_attribute("data-seq") or 0)
        explained = await system.controller.explained(seq)
        assert explained is not None
        rows = started.locator("table.candidates tbody tr")
        await expect(rows).to_have_count(len(explained["candidates"]))
        text = await started.inner_text()
        for one in (*explained["counterfactuals"], *explained["inputs"]):
            assert (one.get("text") or one["says"]) in text

        await look.page.fill("#wi-queue", "0")
        await look.page.fill("#wi-more", "max_groups=1")
        await look.page.click("#what-if-form button")
        after = look.page.locator("#what-if-after")
        await expect(after).to_contain_text("with queue=0, max_groups=1")
        await expect(after).to_contain_text(f"wants 1 {TIMES}")
        assert f"wants 1 {TIMES} cheap" in await look.text("#what-if-before")
        await look.page.fill("#wi-more", "nonsense=1")
        await look.page.click("#what-if-form button")
        await expect(look.page.locator("#what-if-answer .error")).to_contain_text(
            "'nonsense' cannot be changed"
        )


class _Live:
    """A real controller on a simulated clock."""

    def __init__(self, system: RunningSystem) -> None:
        self._system = system

    @property
    def now_s(self) -> float:
        return self._system.clock()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._system.controller, name)


async def test_the_chat_streams_through_the_gateway(browser: Browser, stand: Stand) -> None:
    gateway = FakeGateway()
    await gateway.server.start_server()
    stand.gateway_url = str(gateway.server.make_url("")).rstrip("/")
    await stand.start()
    gateway.origin = stand.url
    try:
        async with looking(browser) as look:
            await _enter(look, stand)
            await look.page.select_option("#chat-model", OSS)
            await look.page.fill("#chat-key", "sk-em-good")
            await look.page.fill("#chat-text", "Tell me a story")
            await look.page.keyboard.press("Enter")
            answer = look.page.locator(f"#chat-log [data-who='{OSS}'] span")
            await expect(answer).to_have_text("Once upon a <b>time</b>")
            await expect(look.page.locator("#chat-note")).to_contain_text("9 tokens in, 3 out")
            key, body = gateway.asked[0]
            assert key == "Bearer sk-em-good"
            assert (body["model"], body["stream"]) == (OSS, True)
            assert body["messages"] == [{"role": "user", "content": "Tell me a story"}]
            stored = await look.page.evaluate(
                "JSON.stringify([{...sessionStorage}, {...localStorage}])"
            )
            assert "sk-em-good" not in stored
            assert look.complaints == []

            await look.page.fill("#chat-text", "And then?")
            await look.page.click("#chat-send")
            await expect(look.page.locator(f"[data-who='{OSS}']")).to_have_count(2)
            await expect(look.page.locator("#chat-note")).to_contain_text("3 out")
            assert [one["role"] for one in gateway.asked[1][1]["messages"]] == [
                *("user", "assistant", "user")
            ]

            await look.page.fill("#chat-key", "sk-em-bad")
            await look.page.fill("#chat-text", "Hello")
            await look.page.click("#chat-send")
            await expect(look.page.locator("#chat-note")).to_have_text("this key is not known")

            gateway.origin = ""
            await look.page.fill("#chat-text", "Hello")
            await look.page.click("#chat-send")
            await expect(look.page.locator("#chat-note")).to_contain_text("gateway.cors_origins")
    finally:
        await gateway.server.close()


async def test_without_a_gateway_there_is_no_chat(browser: Browser, stand: Stand) -> None:
    stand.gateway_url = None
    await stand.start()
    async with looking(browser) as look:
        await _enter(look, stand)
        assert await look.page.locator("#chat-off").is_visible()
        assert await look.page.locator("#chat-form").is_hidden()


async def test_nothing_comes_from_elsewhere(browser: Browser, stand: Stand) -> None:
    await stand.start()
    async with looking(browser) as look:
        asked: list[str] = []
        look.page.on("request", lambda request: asked.append(request.url))
        await _enter(look, stand)
        assert len(asked) > 10
        assert all(url.startswith(f"{stand.url}/console/") for url in asked), json.dumps(asked)


_FAINT = """
(() => {
  const parse = (text) => {
    const found = text.match(/[\\d.]+/g).map(Number);
    return found.length === 4 ? found : [...found, 1];
  };
  const light = ([r, g, b]) => {
    const [x, y, z] = [r, g, b].map((c) => c / 255)
      .map((c) => (c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
    return 0.2126 * x + 0.7152 * y + 0.0722 * z;
  };
  const behind = (node) => {
    for (let one = node; one; one = one.parentElement) {
      const colour = parse(getComputedStyle(one).backgroundColor);
      if (colour[3] === 1) return colour;
    }
    return [255, 255, 255, 1];
  };
  const faint = [];
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walk.nextNode()) {
    const node = walk.currentNode.parentElement;
    if (!walk.currentNode.textContent.trim() || !node.checkVisibility()) continue;
    if (node.closest("svg, script, :disabled")) continue;
    const [one, other] = [light(parse(getComputedStyle(node).color)), light(behind(node))];
    const ratio = (Math.max(one, other) + 0.05) / (Math.min(one, other) + 0.05);
    const text = node.textContent.slice(0, 40);
    if (ratio < 4.5) faint.push(`${ratio.toFixed(2)} ${node.className} ${text}`);
  }
  return [...new Set(faint)];
})()
"""
