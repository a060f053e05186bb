"""Policies by name: parameters, defaults, and what is refused."""

import pytest
from tests.simulator.baselines.views import groups, option, scenario, started, view

from expertmesh.errors import SetupError
from expertmesh.launch.policies import policy_names, read_policy, without_gaps
from expertmesh.simulator.synthetic import steps


def refusal(text: str) -> str:
    with pytest.raises(SetupError) as caught:
        read_policy(text)
    return str(caught.value)


@pytest.mark.parametrize("name", [name for name in policy_names() if name != "expertmesh"])
def test_every_name_makes_a_policy_that_starts_a_group_for_requests(name: str) -> None:
    text = {"static": "static:groups=1", "skyserve": "skyserve:requests_per_s=1"}.get(name, name)
    policy = read_policy(text)(scenario())
    assert policy.name == name
    moves = ()
    for now_s in range(0, 200, 10):
        moves = moves or policy.decide(view(now_s, queued=5, arrivals_per_s=0.5))
    assert started(moves)[:1] == [0]


def test_parameters_are_read_by_their_kind() -> None:
    policy = read_policy("dynamo:load_scaling=false,predictor=kalman,headroom=1.5,least=2")
    made = policy(scenario())
    assert (made.load_scaling, made.predictor, made.headroom, made.least) == (  # type: ignore[attr-defined]
        False,
        "kalman",
        1.5,
        2,
    )


def test_an_optional_parameter_is_read_too() -> None:
    moves = read_policy("static:groups=2,option=1")(scenario(option("a"), option("b"))).decide(
        view(room=(9, 9))
    )
    assert started(moves) == [1, 1]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("keda", "unknown; known are"),
        ("static", "groups has no default; write static:groups=…"),
        ("skyserve", "requests_per_s has no default"),
        ("static:count=3", "'count': no such parameter; it has groups, option"),
        ("static:groups", "'groups': write parameter=value"),
        ("static:groups=many", "groups: 'many': write a whole number"),
        ("keda-waiting:threshold=few", "threshold: 'few': write a number"),
        ("dynamo:load_scaling=yes", "load_scaling: 'yes': write true or false"),
        ("dynamo:predictor=luck", "predictor: 'luck': write one of constant, arima, kalman"),
        ("static:scenario=x", "no such parameter"),
        ("static:_state=x", "no such parameter"),
    ],
)
def test_mistakes(text: str, said: str) -> None:
    assert said in refusal(text)


def test_what_has_no_default_is_taken_from_the_load() -> None:
    """1000 prompt tokens and 400 output tokens take half a second of a group, as planned."""
    load = steps([(600.0, 10.0)], prompt_tokens=1000, output_tokens=400).load(10.0)
    made = scenario()
    name, _, count = without_gaps("static", made, load).partition("=")
    assert name == "static:groups"
    assert int(count) > 1
    rate = float(without_gaps("skyserve", made, load).partition("=")[2])
    assert rate == pytest.approx(2.0, rel=0.01)
    assert without_gaps("static:groups=3", made, load) == "static:groups=3"


def test_static_without_enough_groups() -> None:
    load = steps([(600.0, 500.0)]).load(10.0)
    with pytest.raises(SetupError, match="1 groups of od/t1d8e8 cannot serve the peak"):
        without_gaps("static", scenario(option(max_groups=1)), load)


class TestRayServe:
    """Ray's own rules, with the time of the simulation."""

    def test_twice_the_target_doubles_after_thirty_seconds(self) -> None:
        policy = read_policy("ray-serve:target_ongoing_requests=5")(scenario())
        counts = [
            len(started(policy.decide(view(now_s, groups=groups(2, in_flight=10)))))
            for now_s in (0, 10, 20, 30)
        ]
        assert counts == [0, 0, 0, 2]

    def test_fewer_after_ten_minutes(self) -> None:
        policy = read_policy("ray-serve")(scenario())
        moved = [
            len(policy.decide(view(now_s, groups=groups(4, in_flight=1))))
            for now_s in range(0, 601, 10)
        ]
        assert moved == [0] * 60 + [2]

    def test_from_zero_at_once(self) -> None:
        policy = read_policy("ray-serve")(scenario())
        assert policy.decide(view(0.0)) == ()
        assert started(policy.decide(view(10.0, queued=1))) == [0]

    def test_the_mean_of_half_a_minute_counts(self) -> None:
        policy = read_policy("ray-serve:target_ongoing_requests=10,upscale_delay_s=0")(scenario())
        assert policy.decide(view(0.0, groups=groups(2, in_flight=10))) == ()
        assert policy.decide(view(10.0, groups=groups(2, in_flight=10))) == ()
        # 20, 20 and 50 are 30 in the mean.
        assert started(policy.decide(view(20.0, groups=groups(2, in_flight=25)))) == [0]
