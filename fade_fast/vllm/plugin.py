"""Entry points, which vLLM calls in each of its processes, perhaps more than once."""

import os

BACKEND = "fade_fast.vllm.backend.FadeBackend"
PLATFORM = "fade_fast.vllm.platform.FadeCpuPlatform"


def register() -> None:
    """Give the name CUSTOM to our attention backend. vLLM accepts no new name that another process knows."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    register_backend(AttentionBackendEnum.CUSTOM, BACKEND)


def cpu_platform() -> str | None:
    """A CPU platform that honors CUSTOM, where vLLM itself would choose its CPU platform; else None.

    On GPUs vLLM honors CUSTOM without help. `FADE_VLLM_PLATFORM=0` leaves vLLM's own CPU platform in place,
    for use together with another platform plugin: vLLM allows one.
    """
    if os.environ.get("FADE_VLLM_PLATFORM") == "0":
        return None
    from vllm.platforms import cpu_platform_plugin

    return PLATFORM if cpu_platform_plugin() == "vllm.platforms.cpu.CpuPlatform" else None
