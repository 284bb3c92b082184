"""What the numbers of a benchmark depend on, without names of hosts or users."""

import importlib.metadata
import os
import pathlib
import platform

PACKAGES = ("jax", "jaxlib", "numpy", "optax", "scipy")


def describe_cpu() -> dict:
    """The processor and the versions; no backend of JAX is started."""
    model = platform.processor() or platform.machine()
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), model)
    except OSError:
        model = f"{model} (no /proc/cpuinfo)"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {"cpu": model, "cores": cores, "system": platform.system(), "python": platform.python_version(), **versions}


def describe_machine() -> dict:
    """The same with JAX's devices."""
    import jax

    device = jax.devices()[0]
    devices = {"backend": device.platform, "device": device.device_kind, "num_devices": jax.device_count()}
    about = describe_cpu()
    return about | {"machine": platform.machine(), "cpu_count": about["cores"]} | devices
