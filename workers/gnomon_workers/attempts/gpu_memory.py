"""How much memory a node's GPUs have, from what its Ray says of it; no GPU is touched for that."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

LABEL: Final = "gnomon.io/gpu-memory-bytes"
"""Of a Ray node: the bytes of one of its GPUs, the smallest where they differ."""
_TYPE: Final = "accelerator_type:"
_GIB_BY_TYPE: Final[Mapping[str, int]] = {"T4": 14, "A10G": 22, "L4": 22, "L40S": 44, "H200": 139}
"""Of those that come in one size only: what their driver leaves of it, in whole GiB.

The A100, the H100 and the V100 come in several, and need the label.
"""


def gpu_memory_bytes(node: Mapping[str, Any]) -> int | None:
    """Bytes of each GPU of a node as `ray.nodes()` lists it; None where it has none, or they are not known."""
    resources = node["Resources"]
    if not resources.get("GPU"):
        return None
    said = str((node.get("Labels") or {}).get(LABEL, ""))
    if said.isascii() and said.isdigit() and 0 < int(said) < 2**63:
        return int(said)
    types = [name.removeprefix(_TYPE) for name in resources if name.startswith(_TYPE)]
    gib = [_GIB_BY_TYPE.get(each) for each in types]
    known = [each for each in gib if each is not None]
    return min(known) << 30 if known and len(known) == len(gib) else None
