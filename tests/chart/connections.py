"""Which connections the rendered NetworkPolicies allow, read as a network plugin reads them."""

from ipaddress import ip_address, ip_network
from typing import Any

from tests.chart.rendering import Rendered

Labels = dict[str, str]
ELSEWHERE = "elsewhere"
"""A pod in another namespace."""


def pods(rendered: Rendered) -> dict[str, Labels]:
    """Labels by component, as the pods have them."""
    labels = [template["metadata"]["labels"] for template in rendered.pod_templates().values()]
    return {each["app.kubernetes.io/component"]: each for each in labels}


def selects(selector: dict[str, Any], labels: Labels) -> bool:
    expressions = selector.get("matchExpressions", [])
    assert all(each["operator"] == "In" for each in expressions)
    return selector.get("matchLabels", {}).items() <= labels.items() and all(
        labels.get(each["key"]) in each["values"] for each in expressions
    )


def may_connect(rendered: Rendered, source: str, target: str, port: int) -> bool:
    """By the policies of the target; both are components, the source may be ELSEWHERE."""
    everybody, ports = pods(rendered), _named_ports(rendered)[target]
    policies = _policies(rendered, "Ingress", everybody[target])
    return not policies or any(
        _is_among(rule.get("from"), source, everybody)
        and _is_open(rule.get("ports"), port, "TCP", ports)
        for policy in policies
        for rule in policy["ingress"]
    )


def may_leave(
    rendered: Rendered, source: str, target: str, port: int, protocol: str = "TCP"
) -> bool:
    """By the policies of the source; `target` is a component, an address, or `namespace/NAME`."""
    everybody = pods(rendered)
    ports = _named_ports(rendered).get(target, {})
    policies = _policies(rendered, "Egress", everybody[source])
    return not policies or any(
        _is_among(rule.get("to"), target, everybody)
        and _is_open(rule.get("ports"), port, protocol, ports)
        for policy in policies
        for rule in policy["egress"]
    )


def _policies(rendered: Rendered, direction: str, labels: Labels) -> list[dict[str, Any]]:
    return [
        each["spec"]
        for each in rendered.all("NetworkPolicy")
        if direction in each["spec"]["policyTypes"] and selects(each["spec"]["podSelector"], labels)
    ]


def _named_ports(rendered: Rendered) -> dict[str, dict[str, int]]:
    return {
        template["metadata"]["labels"]["app.kubernetes.io/component"]: {
            port["name"]: port["containerPort"]
            for port in template["spec"]["containers"][0].get("ports", [])
        }
        for template in rendered.pod_templates().values()
    }


def _is_among(peers: list[dict[str, Any]] | None, who: str, everybody: dict[str, Labels]) -> bool:
    if not peers:
        return True
    if who in everybody:
        return any(
            "podSelector" in peer and selects(peer["podSelector"], everybody[who]) for peer in peers
        )
    if who == ELSEWHERE:
        return any(peer.get("namespaceSelector") == {} for peer in peers)
    if who.startswith("namespace/"):
        labels = {"kubernetes.io/metadata.name": who.removeprefix("namespace/")}
        return any(
            "namespaceSelector" in peer and selects(peer["namespaceSelector"], labels)
            for peer in peers
        )
    return any("ipBlock" in peer and _is_within(peer["ipBlock"], who) for peer in peers)


def _is_within(block: dict[str, Any], address: str) -> bool:
    within, *excepted = (ip_network(each) for each in (block["cidr"], *block.get("except", [])))
    found = ip_address(address)
    return found in within and not any(found in each for each in excepted)


def _is_open(
    rules: list[dict[str, Any]] | None, port: int, protocol: str, names: dict[str, int]
) -> bool:
    if rules is None:
        return True
    for each in rules:
        first = names.get(each["port"]) if isinstance(each["port"], str) else each["port"]
        if first is None or each["protocol"] != protocol:
            continue
        if first <= port <= each.get("endPort", first):
            return True
    return False
