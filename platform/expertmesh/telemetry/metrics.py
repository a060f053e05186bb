"""Every metric that ExpertMesh exports, named once; dashboards and alerts import these names."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Metric:
    name: str
    """As queried; counters end in `_total`."""
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()
    merge: Literal["sum", "max"] = "sum"
    """How the gauges of several workers behind one port make one."""


LATENCY_BUCKETS_S = (
    0.005,
    0.01,
    0.025,
    0.05,
    0.1,
    0.25,
    0.5,
    1.0,
    2.5,
    5.0,
    10.0,
    30.0,
    60.0,
    120.0,
)
TOKEN_TIME_BUCKETS_S = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0)

# Gateway
GATEWAY_REQUESTS = Metric(
    "em_gateway_requests_total", "counter", "Requests answered", ("model", "endpoint", "status")
)
GATEWAY_TTFT = Metric(
    "em_gateway_ttft_seconds",
    "histogram",
    "Time from accepting a request to its first body byte",
    ("model", "pool"),
    LATENCY_BUCKETS_S,
)
GATEWAY_TPOT = Metric(
    "em_gateway_tpot_seconds",
    "histogram",
    "Mean time per output token after the first, per request",
    ("model", "pool"),
    TOKEN_TIME_BUCKETS_S,
)
GATEWAY_DURATION = Metric(
    "em_gateway_request_duration_seconds",
    "histogram",
    "Time from accepting a request to its last byte",
    ("model", "pool"),
    LATENCY_BUCKETS_S,
)
GATEWAY_QUEUE_WAIT = Metric(
    "em_gateway_queue_wait_seconds",
    "histogram",
    "Time a request waited for a ready group or its turn",
    ("model", "priority"),
    LATENCY_BUCKETS_S,
)
GATEWAY_QUEUED = Metric(
    "em_gateway_queued_requests", "gauge", "Requests waiting for a group", ("model",)
)
GATEWAY_QUEUED_TOKENS = Metric(
    "em_gateway_queued_tokens",
    "gauge",
    "Prompt and maximum completion tokens of the waiting requests, estimated",
    ("model",),
)
GATEWAY_HELD_STREAMS = Metric(
    "em_gateway_held_streams",
    "gauge",
    "Waiting requests whose stream has begun, with comments only",
    ("model",),
)
GATEWAY_OPEN = Metric(
    "em_gateway_open_requests", "gauge", "Requests accepted and not yet answered to their end"
)
GATEWAY_IN_FLIGHT = Metric(
    "em_gateway_in_flight_requests", "gauge", "Requests at a group now", ("model", "group", "pool")
)
GATEWAY_RETRIES = Metric(
    "em_gateway_retries_total",
    "counter",
    "Requests sent again to another group, by what the first one did",
    ("model", "reason"),
)
GATEWAY_REJECTIONS = Metric(
    "em_gateway_rejections_total",
    "counter",
    "Requests refused for want of room or capacity",
    ("model", "reason"),
)
GATEWAY_LIMIT_REFUSALS = Metric(
    "em_gateway_limit_refusals_total",
    "counter",
    "Requests refused by a limit of their tenant or key, by the kind of limit",
    ("model", "kind"),
)
GATEWAY_CLIENT_ABORTS = Metric(
    "em_gateway_client_aborts_total",
    "counter",
    "Requests whose client went away before the end",
    ("model",),
)
GATEWAY_EXTERNAL_REQUESTS = Metric(
    "em_gateway_external_requests_total",
    "counter",
    "Requests sent to an external provider",
    ("model", "pool"),
)
GATEWAY_EJECTED_RANKS = Metric(
    "em_gateway_ejected_ranks",
    "gauge",
    "Ranks that get no requests because they failed, as the worker with most of them sees it",
    ("model",),
    merge="max",
)
GATEWAY_UPSTREAM_CONNECTIONS = Metric(
    "em_gateway_upstream_connections", "gauge", "Connections to ranks: idle, busy", ("state",)
)
GATEWAY_TOKENS = Metric(
    "em_gateway_tokens_total",
    "counter",
    "Tokens by direction: in, cached, out",
    ("model", "pool", "direction"),
)
GATEWAY_REVENUE = Metric(
    "em_gateway_tariff_usd_total", "counter", "Tariff price of the usage served", ("model", "pool")
)
GATEWAY_USAGE_PENDING = Metric(
    "em_gateway_usage_pending_records", "gauge", "Usage records that wait for the ledger"
)
GATEWAY_USAGE_GIVEN_UP = Metric(
    "em_gateway_usage_given_up_total",
    "counter",
    "Usage records that went to the log because the ledger could not take them",
)
GATEWAY_ACCESS_LOG_DROPPED = Metric(
    "em_gateway_access_log_dropped_total",
    "counter",
    "Lines of the access log dropped because its reader was too slow or gone",
)

# Controller
CONTROLLER_GROUPS = Metric(
    "em_controller_groups", "gauge", "Groups by state", ("model", "pool", "state")
)
CONTROLLER_DESIRED_GROUPS = Metric(
    "em_controller_desired_groups", "gauge", "Groups that the policy wants", ("model",)
)
CONTROLLER_DEMAND = Metric(
    "em_controller_demand_requests", "gauge", "Queued and running requests", ("model",)
)
CONTROLLER_DECISIONS = Metric(
    "em_controller_decisions_total", "counter", "Decisions by action", ("model", "action")
)
CONTROLLER_SPEND = Metric(
    "em_controller_spend_usd_total", "counter", "Cost of the capacity held", ("model", "pool")
)
CONTROLLER_SPEND_RATE = Metric(
    "em_controller_spend_usd_per_hour", "gauge", "Cost rate of the groups held", ("model", "pool")
)
CONTROLLER_REPORT_AGE = Metric(
    "em_controller_gateway_report_age_seconds",
    "gauge",
    "Age of a gateway's last report",
    ("gateway",),
)
CONTROLLER_LEADS = Metric(
    "em_controller_leads", "gauge", "1 while this controller leads, 0 while it follows", ()
)
CONTROLLER_TERM = Metric(
    "em_controller_term", "gauge", "Number of the leader's term in the journal; 0 on a follower", ()
)
CONTROLLER_LOOP_DURATION = Metric(
    "em_controller_loop_seconds", "histogram", "Duration of one loop", (), LATENCY_BUCKETS_S
)
CONTROLLER_START_DURATION = Metric(
    "em_controller_group_start_seconds",
    "histogram",
    "Time from asking for a group to its being ready",
    ("model", "pool"),
    (5.0, 10.0, 20.0, 30.0, 45.0, 60.0, 90.0, 120.0, 300.0, 600.0, 1200.0),
)
EXPERT_TOKENS = Metric(
    "em_expert_tokens_total",
    "counter",
    "Tokens routed to each expert, summed over layers",
    ("model", "group", "expert"),
)

ALL = tuple(value for value in list(globals().values()) if isinstance(value, Metric))
