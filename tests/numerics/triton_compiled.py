"""Every Triton kernel compiles to machine code, for which no GPU is needed: the interpreter accepts more than GPUs do.

Run by test_triton.py. By hand: pytest tests/support/triton_compiled.py
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from gnomon.specs import Alignment
from gnomon_workers.kernels import triton_select, triton_sparse, triton_update

HOPPER = 90
INT64 = {"order_ptr", "touched_ptr", "offsets_ptr", "tokens_ptr", "rows_ptr"}
INT32 = {"counts_ptr", "features_ptr", "slots_ptr"}
FLOAT32 = {"clip", "rate", "take1", "keep2", "take2", "eps", "root_correction"}

pytestmark = pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION:UserWarning")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compile, whatever earlier runs have left."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def type_of(argument: str) -> str:
    """Triton's name of an argument's type, by the names that the kernels use."""
    if argument.endswith("_ptr"):
        return "*i64" if argument in INT64 else "*i32" if argument in INT32 else "*fp32"
    return "fp32" if argument in FLOAT32 else "i32"


def compiled(kernel: Any, capability: int, options: dict[str, Any], **types: str) -> Any:
    """Machine code of a kernel launched with the given options; pointers and widths are multiples of 16."""
    launch = {"num_warps": options.pop("num_warps"), "num_stages": options.pop("num_stages", 3)}
    names = [name for name in kernel.arg_names if name not in options]
    signature = {name: types.get(name, type_of(name)) for name in names} | dict.fromkeys(options, "constexpr")
    aligned = [name for name in names if name.endswith("_ptr") or name.startswith("d_") or name == "n_features"]
    source = ASTSource(
        fn=kernel,
        signature={name: signature[name] for name in kernel.arg_names},
        constexprs=options,
        attrs={(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=launch)


@pytest.mark.parametrize("rule", get_args(Alignment))
def test_row_kernels_load_and_store_by_sixteen_bytes(rule: Alignment) -> None:
    options = {"COLUMNS": 4096, "ALIGNMENT": rule, "num_warps": 8}
    picks = triton_update.GRADIENT_BLOCKS.picks
    gradient = compiled(triton_update._gradient_kernel, HOPPER, options | {"PICKS": picks})
    update = compiled(triton_update._update_kernel, HOPPER, options | {"HAS_COPY": True}, copy_ptr="*bf16")
    for kernel in (gradient, update):
        assert "ld.global.v4" in kernel.asm["ptx"] and "st.global.v4" in kernel.asm["ptx"]


@pytest.mark.parametrize("kernel", [triton_sparse._segment_kernel, triton_sparse._sampled_kernel])
def test_sparse_kernels_load_by_sixteen_bytes(kernel: Any) -> None:
    options = triton_sparse.SAMPLED_BLOCKS.launch(4096)
    assert "ld.global.v4" in compiled(kernel, HOPPER, options).asm["ptx"]


SELECTION = {
    "_group_keys_kernel": {"GROUPS": 128, "WIDTH": 32},
    "_bound_kernel": {"GROUPS": 4096, "BITS": 15},
    "_candidates_kernel": {"GROUPS": triton_select.GROUPS_AT_ONCE, "WIDTH": 32},
    "_cut_kernel": {"CAPACITY": 256, "BITS": 31},
}
SELECTION_INT32 = ["keys_ptr", "features_ptr", "counts_ptr", "bounds_ptr", "listed_ptr", "n_listed_ptr"]


@pytest.mark.parametrize("name", SELECTION)
def test_selection_kernels_compile(name: str) -> None:
    types = dict.fromkeys(SELECTION_INT32, "*i32") | {"values_ptr": "*bf16", "out_features_ptr": "*i64"}
    kernel = compiled(getattr(triton_select, name), HOPPER, SELECTION[name] | {"num_warps": 4}, **types)
    assert kernel.metadata.shared <= 99 * 1024
    assert "ld.global.v4" in kernel.asm["ptx"] or name != "_group_keys_kernel"
