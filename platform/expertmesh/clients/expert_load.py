"""How often the experts of a running group are asked, from one of its ranks."""

import json
from http.client import HTTPException
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

from expertmesh.errors import UpstreamUnavailable

PATH = "/em/experts"
TIMEOUT_S = 5.0


def read_expert_load(url: str, mesh_token: str) -> Any:
    """The rank's answer to `GET /em/experts`: its own share of the experts, by layer.

    `url` is the rank's base URL, with or without that path. Raises UpstreamUnavailable, naming the
    URL, when the rank does not answer or refuses.
    """
    if urlsplit(url).scheme not in ("http", "https"):
        raise UpstreamUnavailable(f"{url}: is no URL of a rank; write http://host:port/<group>")
    whole = url.rstrip("/")
    if not whole.endswith(PATH):
        whole += PATH
    request = Request(whole, headers={"Authorization": f"Bearer {mesh_token}"})
    try:
        with urlopen(request, timeout=TIMEOUT_S) as answer:
            return json.load(answer)
    except HTTPError as error:
        error.close()
        hint = "; the mesh token is not the group's" if error.code in (401, 403) else ""
        raise UpstreamUnavailable(f"{whole}: {error.code} {error.reason}{hint}") from None
    except (URLError, OSError, HTTPException) as error:
        raise UpstreamUnavailable(f"{whole}: does not answer: {error}") from None
    except ValueError:
        raise UpstreamUnavailable(f"{whole}: answers no JSON; is it a rank of a group?") from None
