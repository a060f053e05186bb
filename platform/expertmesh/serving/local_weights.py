"""Start engines on a model folder that is there already, without asking every node for it first."""

from ray.llm._internal.common.callbacks.base import CallbackBase


class LocalWeights(CallbackBase):
    """Ray runs a task per rank and node to download the model; each imports vLLM in a new process.

    On two cores that took half of a group's start, for a folder that needs no download.
    """

    async def on_before_node_init(self) -> None:
        self.ctx.run_init_node = False
