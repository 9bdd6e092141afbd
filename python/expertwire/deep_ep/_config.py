"""Tuning of DeepEP's kernels. Of it expertwire takes the number of SMs; sizes are hints, and answered
for every number of ranks."""

from __future__ import annotations

from dataclasses import dataclass

from .. import HighThroughput


@dataclass
class Config:
    num_sms: int = 20
    num_max_nvl_chunked_send_tokens: int = 6
    num_max_nvl_chunked_recv_tokens: int = 256
    num_max_rdma_chunked_send_tokens: int = 6
    num_max_rdma_chunked_recv_tokens: int = 256

    def get_nvl_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        """Bytes that an object of expertwire takes for such rows, in steps of 128."""
        taken = HighThroughput.memory_bytes(
            num_ranks, hidden=(hidden_bytes + 15) // 16 * 8, experts=num_ranks, top_k=1,
            max_tokens=0, dtype="bfloat16")
        return (taken + 127) // 128 * 128

    def get_rdma_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        """0: ranks on one host need no such buffer."""
        return 0
