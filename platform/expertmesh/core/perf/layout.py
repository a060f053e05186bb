"""How one group is cut over its GPUs."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Layout:
    """One group: `data` attention ranks of `tensor` GPUs each.

    The experts lie whole on `expert` GPUs, or are cut over all GPUs when it is 1. vLLM knows only
    these two: `expert` is 1 or the world size.
    """

    tensor: int = 1
    data: int = 1
    expert: int = 1
    redundant_experts: int = 0
    """Copies of hot experts in all, per layer, over the group."""

    def __post_init__(self) -> None:
        if self.tensor < 1 or self.data < 1 or self.redundant_experts < 0:
            raise ValueError(f"a layout has at least one GPU and no negative copies: {self}")
        if self.expert not in (1, self.world_size):
            raise ValueError(f"experts lie over 1 or all {self.world_size} GPUs: {self}")
        if self.redundant_experts and self.expert == 1:
            raise ValueError(f"copies of experts need expert parallelism: {self}")

    @property
    def world_size(self) -> int:
        """GPUs of the group."""
        return self.tensor * self.data

    @property
    def expert_parallel(self) -> bool:
        return self.expert > 1

    def nodes(self, gpus_per_node: int) -> int:
        """Nodes that the group takes; the last may be shared."""
        return -(-self.world_size // gpus_per_node)

    def expert_slots(self, experts: int) -> int:
        """Experts of one layer that a GPU holds, the cut ones counted whole."""
        if self.expert == 1:
            return experts
        return -(-(experts + self.redundant_experts) // self.expert)
