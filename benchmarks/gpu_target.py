"""The description of a GPU for XLA's compiler, so that it can compile for it on a machine without one.

The numbers are those of NVIDIA's data sheet and programming guide for an H200. XLA reads them to choose the sizes of
blocks, and what to fuse.
"""

from typing import Any

# Of each data type in XLA's numbering (12 is float64, 11 float32, 10 float16, 16 bfloat16, 4 int32, 8 uint32):
# clock in GHz, units per core, operations per clock.
_SCALAR_UNITS = {
    4: (1.98, 64, 1),
    8: (1.98, 64, 1),
    10: (1.98, 128, 2),
    11: (1.98, 128, 1),
    12: (1.98, 64, 1),
    16: (1.98, 128, 2),
}
# 2 and 6 are 8-bit integers, 19 and 20 are 8-bit floats.
_MATRIX_UNITS = {
    2: (1.83, 4, 1024),
    6: (1.83, 4, 1024),
    10: (1.83, 4, 512),
    11: (1.83, 4, 256),
    12: (1.98, 4, 32),
    16: (1.83, 4, 512),
    19: (1.83, 4, 1024),
    20: (1.83, 4, 1024),
}


def _units(rates: dict[int, tuple[float, int, int]]) -> dict[str, Any]:
    fields = ("clock_rate_ghz", "units_per_core", "ops_per_clock")
    return {
        "rate_infos": [{"key": kind, "value": dict(zip(fields, rate, strict=True))} for kind, rate in rates.items()]
    }


_H200: dict[str, Any] = {
    "gpu_device_info": {
        "threads_per_block_limit": 1024,
        "threads_per_warp": 32,
        "shared_memory_per_block": 48 * 1024,
        "shared_memory_per_core": 228 * 1024,
        "shared_memory_per_block_optin": 227 * 1024,
        "threads_per_core_limit": 2048,
        "registers_per_core_limit": 65536,
        "registers_per_block_limit": 65536,
        "core_count": 132,
        "fpus_per_core": 128,
        "block_dim_limit_x": 2**31 - 1,
        "block_dim_limit_y": 65535,
        "block_dim_limit_z": 65535,
        "thread_dim_limit_x": 1024,
        "thread_dim_limit_y": 1024,
        "thread_dim_limit_z": 64,
        "memory_bandwidth": 4_800_000_000_000,
        "l2_cache_size": 50 * 2**20,
        "clock_rate_ghz": 1.98,
        "device_memory_size": 141 * 2**30,
        "pcie_bandwidth": 32 * 2**30,
        "device_address_bits": 64,
        "ecc_enabled": True,
        "cuda_compute_capability": {"major": 9, "minor": 0},
        "scalar_unit_description": _units(_SCALAR_UNITS),
        "matrix_unit_description": _units(_MATRIX_UNITS),
        "device_vendor": "NVIDIA Corporation",
        "platform_version": "Compute Capability 9.0",
        "name": "NVIDIA H200",
        "driver_version": "12.9.0",
        "runtime_version": "12.9.0",
        "compile_time_toolkit_version": "12.9.0",
        "dnn_version": "9.10.0",
    },
    "platform_name": "CUDA",
    "dnn_version_info": {"major": 9, "minor": 10, "patch": 0},
    "device_description_str": "NVIDIA H200",
}


def _text(fields: dict[str, Any]) -> str:
    """Return fields in the text format of protocol buffers."""
    parts = []
    for name, value in fields.items():
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, dict):
                parts.append(f"{name} {{ {_text(item)} }}")
            elif isinstance(item, bool):
                parts.append(f"{name}: {'true' if item else 'false'}")
            else:
                parts.append(f'{name}: "{item}"' if isinstance(item, str) else f"{name}: {item}")
    return " ".join(parts)


H200 = _text(_H200)
