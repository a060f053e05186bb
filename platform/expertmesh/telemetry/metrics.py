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
GATEWAY_SLO = Metric(
    "em_gateway_slo_requests_total",
    "counter",
    "Requests by what became of their latency targets: met, slow_start, slow_tokens, failed",
    ("model", "result"),
)
GATEWAY_TENANT_REQUESTS = Metric(
    "em_gateway_tenant_requests_total", "counter", "Requests of which usage is kept", ("tenant",)
)
GATEWAY_TENANT_TOKENS = Metric(
    "em_gateway_tenant_tokens_total",
    "counter",
    "Tokens by direction: in, cached, out",
    ("tenant", "direction"),
)
GATEWAY_TENANT_REVENUE = Metric(
    "em_gateway_tenant_tariff_usd_total", "counter", "Tariff price of the usage", ("tenant",)
)
GATEWAY_FLEET_AGE = Metric(
    "em_gateway_fleet_age_seconds",
    "gauge",
    "Time since the controller last answered; of the worker that waits longest",
    merge="max",
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
CONTROLLER_QUEUED = Metric(
    "em_controller_queued_requests", "gauge", "Requests that wait, over all gateways", ("model",)
)
CONTROLLER_OLDEST_WAIT = Metric(
    "em_controller_oldest_wait_seconds",
    "gauge",
    "Time that the oldest queued request has waited",
    ("model",),
)
CONTROLLER_PREDICTED_WAIT = Metric(
    "em_controller_predicted_wait_seconds",
    "gauge",
    "Wait predicted for a request that comes now; +Inf when the groups fall behind",
    ("model",),
)
CONTROLLER_LOAD = Metric(
    "em_controller_load_groups",
    "gauge",
    "Load and capacity in units of one group: now, expected, spare, needed, held, ready, coming",
    ("model", "part"),
)
CONTROLLER_NEED = Metric(
    "em_controller_needed_groups", "gauge", "Groups that the load asks for", ("model",)
)
CONTROLLER_TARGET = Metric(
    "em_controller_target_groups",
    "gauge",
    "Groups wanted, by option: pool and size",
    ("model", "option"),
)
CONTROLLER_BINDING = Metric(
    "em_controller_binding",
    "gauge",
    "1 for what keeps the number of groups from being another one",
    ("model", "binding"),
)
CONTROLLER_DECISIONS = Metric(
    "em_controller_decisions_total",
    "counter",
    "Actions decided on, by what bound the number of groups then",
    ("model", "action", "binding"),
)
CONTROLLER_ADVICE = Metric(
    "em_controller_advised_actions",
    "gauge",
    "Actions that it would take if the model's mode let it",
    ("model", "action"),
)
CONTROLLER_TRANSITIONS = Metric(
    "em_controller_transitions_total",
    "counter",
    "Groups that went from one state to another",
    ("model", "pool", "before", "after"),
)
CONTROLLER_FORECAST_ERROR = Metric(
    "em_controller_forecast_error_groups",
    "histogram",
    "Distance between the load and what was forecast for it, in groups, per 30 s",
    ("model",),
    (0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0),
)
CONTROLLER_FORECAST_MARGIN = Metric(
    "em_controller_forecast_margin",
    "gauge",
    "Groups kept in hand above the forecast, over the root of the groups forecast",
    ("model",),
)
CONTROLLER_EXPECTED_START = Metric(
    "em_controller_expected_start_seconds",
    "gauge",
    "Time that a group's start is expected to take, from the starts seen",
    ("model", "option"),
)
CONTROLLER_LEARNED_RATIO = Metric(
    "em_controller_learned_time_ratio",
    "gauge",
    "Time of a group that a request takes, over the planned time",
    ("model", "option"),
)
CONTROLLER_ZONE_LOSSES = Metric(
    "em_controller_zone_losses_per_hour",
    "gauge",
    "Losses of a spot zone that are expected each hour",
    ("zone",),
    merge="max",
)
CONTROLLER_ZONE_AVOIDED = Metric(
    "em_controller_zone_avoided",
    "gauge",
    "1 for a spot zone that gets no new groups, as it has lately been lost",
    ("zone",),
    merge="max",
)
CONTROLLER_HINDSIGHT = Metric(
    "em_controller_hindsight_usd",
    "gauge",
    "Cost of the model's groups over the last day: spent, and the least for the same work by one "
    "who knew it in advance",
    ("model", "part"),
)
CONTROLLER_HINDSIGHT_SPAN = Metric(
    "em_controller_hindsight_span_seconds",
    "gauge",
    "Length of the time that hindsight looks at: a day, or what the ledger has of it",
    ("model",),
)
CONTROLLER_HINDSIGHT_TIME = Metric(
    "em_controller_hindsight_timestamp_seconds",
    "gauge",
    "Unix time at which that time ends",
    ("model",),
)
CONTROLLER_LOAD_ERROR = Metric(
    "em_controller_load_error_groups",
    "gauge",
    "Load less the one that decisions of the last hour had expected then, in groups, by quantile",
    ("model", "quantile"),
)
CONTROLLER_WITHIN_SPARE = Metric(
    "em_controller_within_spare_ratio",
    "gauge",
    "Share of these loads that the expected one and its spare carried",
    ("model",),
)
CONTROLLER_WAIT_ERROR = Metric(
    "em_controller_wait_error_seconds",
    "gauge",
    "Oldest wait less the one that decisions of the last hour had predicted, by quantile",
    ("model", "quantile"),
)
CONTROLLER_START_ERROR = Metric(
    "em_controller_start_over_expected_ratio",
    "gauge",
    "Median time of the last hour's starts over the time that was expected of them",
    ("model", "option"),
)
CONTROLLER_SLO = Metric(
    "em_controller_slo_attainment_target",
    "gauge",
    "Share of the requests that shall meet the latency targets",
    ("model",),
)
CONTROLLER_WAIT_LIMIT = Metric(
    "em_controller_wait_limit_seconds",
    "gauge",
    "Longest time that a request of the model may wait",
    ("model",),
)
CONTROLLER_BUDGET_RATE = Metric(
    "em_controller_budget_usd_per_hour", "gauge", "Budget of the model by the hour", ("model",)
)
CONTROLLER_BUDGET_DAY = Metric(
    "em_controller_budget_usd_per_day", "gauge", "Budget of the model by the UTC day", ("model",)
)
CONTROLLER_SPENT_TODAY = Metric(
    "em_controller_spent_today_usd",
    "gauge",
    "Cost of the model's groups since midnight UTC",
    ("model",),
)
CONTROLLER_PRICE = Metric(
    "em_controller_pool_usd_per_node_hour", "gauge", "Price of a node of the pool", ("pool",)
)
CONTROLLER_PRICE_TIME = Metric(
    "em_controller_price_timestamp_seconds",
    "gauge",
    "Unix time at which the pool's price was read",
    ("pool",),
)
CONTROLLER_EXTERNAL_PRICE = Metric(
    "em_controller_external_usd_per_mtok",
    "gauge",
    "Price of a million tokens at an external provider: in, cached, out",
    ("model", "pool", "direction"),
)
CONTROLLER_FAILING = Metric(
    "em_controller_failing_step",
    "gauge",
    "Failures in a row of a step of the loop, for those that fail",
    ("step",),
)
CONTROLLER_COST = Metric(
    "em_controller_cost_usd_total",
    "counter",
    "Cost by the ledger: attributed, external, idle, starting, draining, idle_nodes",
    ("model", "pool", "part"),
)
CONTROLLER_ENERGY = Metric(
    "em_controller_energy_joules_total",
    "counter",
    "Energy of the accelerators by the ledger, where their draw is known",
    ("model", "pool"),
)
CONTROLLER_MONEY_TIME = Metric(
    "em_controller_ledger_timestamp_seconds",
    "gauge",
    "Unix time up to which the ledger has been counted",
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

# Groups, as their engines tell
GROUP_RUNNING = Metric(
    "em_group_running_requests",
    "gauge",
    "Requests in the batches of the group's engines",
    ("model", "pool", "group"),
)
GROUP_WAITING = Metric(
    "em_group_waiting_requests",
    "gauge",
    "Requests queued inside the group's engines",
    ("model", "pool", "group"),
)
GROUP_KV_USE = Metric(
    "em_group_kv_use_ratio",
    "gauge",
    "Share of the KV cache in use, mean over the ranks",
    ("model", "pool", "group"),
)
GROUP_KV_TOKENS = Metric(
    "em_group_kv_tokens",
    "gauge",
    "Tokens that fit into the KV cache, over all ranks",
    ("model", "pool", "group"),
)
GROUP_PREEMPTIONS = Metric(
    "em_group_preemptions_total",
    "counter",
    "Requests that lost their place in the KV cache",
    ("model", "pool", "group"),
)
GROUP_TOKENS = Metric(
    "em_group_tokens_total",
    "counter",
    "Tokens of the group's engines: in (computed), cached, out",
    ("model", "pool", "group", "direction"),
)
RANK_TOKENS = Metric(
    "em_rank_expert_tokens_total",
    "counter",
    "Tokens routed to the experts of each rank, summed over layers",
    ("model", "pool", "group", "rank"),
)
LAYER_IMBALANCE = Metric(
    "em_expert_layer_imbalance_ratio",
    "gauge",
    "Tokens of a layer's busiest expert over the mean of its experts, lately",
    ("model", "pool", "group", "layer"),
)
EXPERT_TOKENS = Metric(
    "em_expert_tokens_total",
    "counter",
    "Tokens routed to each expert, summed over layers",
    ("model", "pool", "group", "expert"),
)

ALL = tuple(value for value in list(globals().values()) if isinstance(value, Metric))
