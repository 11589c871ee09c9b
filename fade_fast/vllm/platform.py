"""vLLM's CPU platform, which would otherwise ignore `--attention-backend CUSTOM`."""

from vllm.platforms.cpu import CpuPlatform
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from . import options


class FadeCpuPlatform(CpuPlatform):
    """The CPU platform. It honors CUSTOM, and refuses what we do not serve before a model loads."""

    @classmethod
    def get_attn_backend_cls(cls, selected_backend, attn_selector_config, num_heads=None):
        if selected_backend != AttentionBackendEnum.CUSTOM:
            return super().get_attn_backend_cls(selected_backend, attn_selector_config, num_heads)
        return AttentionBackendEnum.CUSTOM.get_path()

    @classmethod
    def check_and_update_config(cls, vllm_config) -> None:
        options.check(vllm_config)
        super().check_and_update_config(vllm_config)
