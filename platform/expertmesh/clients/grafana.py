"""Folder, data source, dashboards and alert contact of a Grafana, brought to what is wanted.

What is there is read first, so that a second run changes nothing and every change can be shown.
"""

import difflib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final
from urllib.parse import urlsplit

import requests
from grafana_client import GrafanaApi  # type: ignore[import-untyped]
from grafana_client.client import (  # type: ignore[import-untyped]
    GrafanaClientError,
    GrafanaException,
    GrafanaUnauthorizedError,
    TokenAuth,
)

from expertmesh.errors import SetupError, UpstreamUnavailable

TIMEOUT_S: Final = 10.0
_CONTACT_UID: Final = "expertmesh-contact"
_NOT_OURS: Final = ("id", "version", "schemaVersion")
"""Keys of a dashboard that Grafana counts by itself, or raises when it brings an old form to its
own."""
_EDITABLE: Final = {"X-Disable-Provenance": "true"}
"""What is written stays open to changes by hand; without it only this API could change it."""


@dataclass(frozen=True, slots=True)
class Folder:
    uid: str
    title: str


@dataclass(frozen=True, slots=True)
class DataSource:
    """A Prometheus."""

    uid: str
    name: str
    url: str
    """As Grafana's server reaches it."""


@dataclass(frozen=True, slots=True)
class Contact:
    """Whom Grafana tells of alerts."""

    name: str
    kind: str
    """Grafana's word: `email`, `webhook`, …"""
    settings: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Wanted:
    folder: Folder
    dashboards: tuple[Mapping[str, Any], ...]
    """Their JSON, each with its own `uid`."""
    data_source: DataSource | None = None
    contact: Contact | None = None


@dataclass(frozen=True, slots=True)
class Change:
    what: str
    """For a person: `dashboard expertmesh-cost`."""
    is_new: bool
    diff: tuple[str, ...]
    """Lines of a unified diff, from what is there to what is wanted."""
    apply: Callable[[], None] = field(repr=False, compare=False)


class Grafana:
    def __init__(self, url: str, token: str, timeout_s: float = TIMEOUT_S) -> None:
        """`token`: of a service account that may edit dashboards, data sources and contact points.
        Raises SetupError when the URL is none."""
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query:
            raise SetupError(f"{url}: is no URL of a Grafana; write http://host:port")
        if parts.username is not None:
            raise SetupError("the URL of Grafana holds a password; give a token instead")
        self._url = url.rstrip("/")
        path = parts.path.strip("/")
        self._api = GrafanaApi(
            TokenAuth(token),
            host=parts.hostname,
            port=parts.port,
            url_path_prefix=f"{path}/" if path else "",
            protocol=parts.scheme,
            timeout=timeout_s,
        )

    def changes(self, wanted: Wanted) -> tuple[Change, ...]:
        """What has to be done, in that order; nothing when all is as it is wanted.

        Raises UpstreamUnavailable, and SetupError when the token is not good enough.
        """
        found = [self._folder(wanted.folder)]
        if wanted.data_source is not None:
            found.append(self._data_source(wanted.data_source))
        found += [self._dashboard(each, wanted.folder.uid) for each in wanted.dashboards]
        if wanted.contact is not None:
            found.append(self._contact(wanted.contact))
        return tuple(change for change in found if change is not None)

    def apply(self, change: Change) -> None:
        """Raises as `changes` does."""
        self._ask(change.apply)

    def _folder(self, wanted: Folder) -> Change | None:
        there = self._read(lambda: self._api.folder.get_folder(wanted.uid))
        api = self._api.folder
        known = None if there is None else {"title": there["title"]}
        return _change(
            f"folder {wanted.uid}",
            known,
            {"title": wanted.title},
            lambda: (
                api.create_folder(wanted.title, wanted.uid)
                if there is None
                else api.update_folder(wanted.uid, title=wanted.title, overwrite=True)
            ),
        )

    def _data_source(self, wanted: DataSource) -> Change | None:
        body = {
            "uid": wanted.uid,
            "name": wanted.name,
            "type": "prometheus",
            "url": wanted.url,
            "access": "proxy",
        }
        there = self._read(lambda: self._api.datasource.get_datasource_by_uid(wanted.uid))
        api = self._api.datasource
        # What somebody has set besides stays, such as a password.
        known = None if there is None else {name: there.get(name) for name in body}
        return _change(
            f"data source {wanted.uid}",
            known,
            body,
            lambda: (
                api.create_datasource(body)
                if there is None
                else api.update_datasource_by_uid(wanted.uid, {**there, **body})
            ),
        )

    def _dashboard(self, wanted: Mapping[str, Any], folder: str) -> Change | None:
        uid = str(wanted["uid"])
        there = self._read(lambda: self._api.dashboard.get_dashboard(uid))
        known = None
        if there is not None:
            found = _ours(_without(there["dashboard"]), _without(wanted))
            known = {"folder": there.get("meta", {}).get("folderUid", ""), **found}
        body = {
            "dashboard": {**wanted, "id": None},
            "folderUid": folder,
            "overwrite": True,
            "message": "expertmesh dashboards push",
        }
        return _change(
            f"dashboard {uid}",
            known,
            {"folder": folder, **_without(wanted)},
            lambda: self._api.dashboard.update_dashboard(body),
        )

    def _contact(self, wanted: Contact) -> Change | None:
        api = self._api.alertingprovisioning
        body = {
            "uid": _CONTACT_UID,
            "name": wanted.name,
            "type": wanted.kind,
            "settings": dict(wanted.settings),
            "disableResolveMessage": False,
        }
        points = self._read(api.get_contactpoints) or []
        there = next((point for point in points if point.get("uid") == _CONTACT_UID), None)
        known = None
        if there is not None:
            settings = {name: there.get("settings", {}).get(name) for name in wanted.settings}
            known = {**{name: there.get(name) for name in body}, "settings": settings}
        return _change(
            f"contact point {wanted.name}",
            known,
            body,
            lambda: (
                api.create_contactpoint(body, disable_provenance=True)
                if there is None
                else self._api.client.PUT(
                    f"/v1/provisioning/contact-points/{_CONTACT_UID}", json=body, headers=_EDITABLE
                )
            ),
        )

    def _read(self, ask: Callable[[], Any]) -> Any:
        """None when Grafana does not have it."""
        try:
            return self._ask(ask)
        except GrafanaClientError as error:
            if error.status_code == 404:
                return None
            raise SetupError(f"{self._url}: {error}") from error

    def _ask(self, ask: Callable[[], Any]) -> Any:
        try:
            return ask()
        except GrafanaUnauthorizedError as error:
            raise SetupError(
                f"{self._url}: does not take the token; make one of a service account with the "
                "role Admin"
            ) from error
        except GrafanaClientError as error:
            if error.status_code == 403:
                raise SetupError(
                    f"{self._url}: the token may not do this: {error}; give its service account "
                    "the role Admin"
                ) from error
            if error.status_code == 404:
                raise
            raise SetupError(f"{self._url}: refuses it: {error}") from error
        except (GrafanaException, requests.RequestException) as error:
            raise UpstreamUnavailable(f"{self._url}: {error}") from error


def _change(
    what: str, there: Mapping[str, Any] | None, wanted: Mapping[str, Any], apply: Callable[[], Any]
) -> Change | None:
    before, after = _lines(there), _lines(wanted)
    if before == after:
        return None
    diff = difflib.unified_diff(before, after, "there", "wanted", lineterm="", n=1)
    return Change(what, there is None, tuple(diff), apply)


def _lines(content: Mapping[str, Any] | None) -> list[str]:
    return [] if content is None else json.dumps(content, indent=2, sort_keys=True).splitlines()


def _ours(there: Any, wanted: Any) -> Any:
    """What is there, less the keys that nobody has asked for: Grafana adds some of its own."""
    if isinstance(there, dict) and isinstance(wanted, Mapping):
        return {name: _ours(value, wanted[name]) for name, value in there.items() if name in wanted}
    if isinstance(there, list) and isinstance(wanted, list) and len(there) == len(wanted):
        return [_ours(one, other) for one, other in zip(there, wanted, strict=True)]
    return there


def _without(dashboard: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in dashboard.items() if name not in _NOT_OURS}
