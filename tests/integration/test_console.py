"""The console of the real system, in a real browser."""

import json
import re

import pytest
from playwright.async_api import expect
from tests.console.stand import chromium, looking
from tests.integration.running_system import MODEL, RunningSystem

pytestmark = [pytest.mark.integration]


def _status(system: RunningSystem, *arguments: str) -> str:
    where = ("--controller-url", system.controller_url, "--platform", "test")
    return system.run("status", *where, *arguments).stdout


async def test_the_page_shows_the_real_group_and_its_chat_streams(
    system: RunningSystem, key: str
) -> None:
    (group,) = system.groups("ready")
    async with chromium() as browser, looking(browser) as look:
        page = look.page
        page.set_default_timeout(60_000)
        await page.goto(_status(system, "--link").strip())
        own = f".group[data-group='{group['name']}']"
        await expect(page.locator(f"{own} .group-state")).to_have_text("ready")
        await expect(page.locator("#health")).to_have_text("Live")
        assert await page.locator(f"{own} .rank-row").count() == group["world_size"]
        cells = page.locator(f".node .cell[title^='{group['name']} rank ']")
        assert await cells.count() == group["world_size"]
        assert await look.text("#tile-cost-now .value") == "$1.50"
        assert re.fullmatch(r"\$\d+\.\d\d+", await look.text("#tile-cost-today .value"))

        await page.fill("#chat-key", key)
        await page.fill("#chat-text", "Tell me a story about a fox.")
        await page.click("#chat-send")
        answer = page.locator(f"#chat-log [data-who='{MODEL}'] span")
        await expect(page.locator("#chat-note")).to_contain_text("out", timeout=120_000)
        assert len(await answer.inner_text()) > 20
        # Ranks count what their experts do every few seconds.
        await expect(page.locator(f"{own} svg.heat rect")).not_to_have_count(0, timeout=30_000)
        note = page.locator(f"{own} .heat-note")
        await expect(note).to_contain_text("heaviest rank", timeout=30_000)

        newest = page.locator(".decision").first
        await newest.locator("summary").click()
        await expect(newest.locator("table.candidates")).to_be_visible(timeout=30_000)
        await page.fill("#wi-queue", "500")
        await page.click("#what-if-form button")
        await expect(page.locator("#what-if-after")).to_contain_text("500 queued", timeout=30_000)
        assert look.complaints == []


def test_status_shows_the_real_group(system: RunningSystem) -> None:
    (group,) = system.groups("ready")
    text = _status(system)
    assert "\x1b" not in text
    (line,) = (line for line in text.splitlines() if line.split()[:1] == [group["name"]])
    assert line.split()[1:3] == ["ready", "2/2"]
    shown = json.loads(_status(system, "--json"))
    assert shown["overview"]["state"]["picture"]["groups"][0]["name"] == group["name"]


def test_up_prints_a_link_to_the_console(system: RunningSystem) -> None:
    assert f"{system.controller_url}/console/#ticket=" in system.log("up")
