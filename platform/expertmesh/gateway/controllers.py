"""Which of several controllers to ask: one leads, and the others say where it is."""

from collections.abc import Iterable


class ControllerUrls:
    """Stays with the one that answers as the leader."""

    def __init__(self, configured: Iterable[str]) -> None:
        self._configured = tuple(dict.fromkeys(url.strip().rstrip("/") for url in configured))
        self.current = self._configured[0]
        self._tried: set[str] = set()

    def begin(self) -> None:
        """A new report is sent: each may be asked once for it."""
        self._tried = {self.current}

    def failed(self) -> bool:
        """The current one gave no answer. False when all have been asked for this report; the
        next report then begins with another one than this."""
        at = self._configured.index(self.current) if self.current in self._configured else -1
        for step in range(1, len(self._configured) + 1):
            url = self._configured[(at + step) % len(self._configured)]
            if url not in self._tried:
                return self._turn_to(url)
        self.current = self._configured[(at + 1) % len(self._configured)]
        return False

    def follows(self, leader: str) -> bool:
        """The current one named another as the leader. False when that one was asked already."""
        url = leader.rstrip("/")
        if not url.startswith(("http://", "https://")) or url in self._tried:
            return self.failed()
        return self._turn_to(url)

    def _turn_to(self, url: str) -> bool:
        self._tried.add(url)
        self.current = url
        return True
