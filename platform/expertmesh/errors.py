"""The few exceptions of the project, grouped by who must act."""


class ExpertMeshError(Exception):
    """Base of all errors that ExpertMesh raises on purpose; its text is meant for a person."""


class ManifestError(ExpertMeshError):
    """The author of a manifest must act: names the file, the field, the value and the remedy."""


class SetupError(ExpertMeshError):
    """The operator of this machine must act: a port in use, a missing program, a stale process."""


class UpstreamUnavailable(ExpertMeshError):
    """Another process did not answer or refused; trying again later may help."""
