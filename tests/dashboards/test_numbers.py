"""Numbers of panels, from series whose answer can be worked out by hand: by promtool."""

import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml
from dashboards.build import dashboards
from dashboards.queries import panel_queries


@dataclass(frozen=True, slots=True)
class Case:
    sentence: str
    board: str
    panel: str
    series: dict[str, str]
    """In promtool's notation, a value each minute."""
    shown: dict[str, float] = field(default_factory=dict)
    """By labels."""
    query: int = 0
    """Of the panel's queries."""


def price(direction: str, usd: str) -> dict[str, str]:
    labels = f'model="m",pool="away",direction="{direction}"'
    return {f"em_controller_external_usd_per_mtok{{{labels}}}": f"{usd}x20"}


def tokens(direction: str, growth: str, pool: str = "here") -> dict[str, str]:
    labels = f'model="m",pool="{pool}",direction="{direction}"'
    return {f"em_gateway_tokens_total{{{labels}}}": f"0+{growth}x20"}


def past(model: str, spent: float, least: float) -> dict[str, str]:
    name = "em_controller_hindsight_usd"
    return {
        f'{name}{{model="{model}",part="spent"}}': f"{spent}x20",
        f'{name}{{model="{model}",part="least"}}': f"{least}x20",
    }


CASES = (
    Case(
        "a provider's bill has prompts, cached prompts and answers in it",
        "cost",
        "Earned, and the same at providers",
        {
            **price("in", "2"),
            **price("cached", "0.5"),
            **price("out", "8"),
            **tokens("in", "300"),
            **tokens("cached", "100", pool="elsewhere"),
            **tokens("out", "100"),
        },
        # 300 at 2, 100 at 0.5 and 100 at 8 dollars, for each 100 that were generated.
        {'{model="m", pool="away"}': (300 * 2 + 100 * 0.5 + 100 * 8) / 100},
        query=1,
    ),
    Case(
        "regret is what need not have been spent, of all models together",
        "autoscaler",
        "Regret",
        {**past("a", 60.0, 45.0), **past("b", 20.0, 15.0)},
        {"{}": 0.25},
    ),
    Case(
        "of models that nothing was spent on there is none",
        "autoscaler",
        "Regret",
        past("a", 0.0, 0.0),
    ),
    Case(
        "what was spent is compared model by model, where there was work",
        "autoscaler",
        "Spent over the least",
        {**past("a", 60.0, 40.0), **past("idle", 20.0, 0.0)},
        {'{model="a"}': 1.5},
    ),
)


@pytest.mark.parametrize("case", CASES, ids=[case.sentence for case in CASES])
def test_the_number(case: Case, tmp_path: Path) -> None:
    found = [q for q in panel_queries(dashboards()[case.board]) if q.panel == case.panel]
    checks = {
        "evaluation_interval": "1m",
        "tests": [
            {
                "interval": "1m",
                "input_series": [
                    {"series": name, "values": values} for name, values in case.series.items()
                ],
                "promql_expr_test": [
                    {
                        "expr": found[case.query].expression,
                        "eval_time": "15m",
                        "exp_samples": [
                            {"labels": labels, "value": value}
                            for labels, value in case.shown.items()
                        ],
                    }
                ],
            }
        ],
    }
    file = tmp_path / "case.yaml"
    file.write_text(yaml.safe_dump(checks))
    answer = subprocess.run(
        ["promtool", "test", "rules", str(file)], capture_output=True, text=True, timeout=60
    )
    assert answer.returncode == 0, answer.stdout + answer.stderr
