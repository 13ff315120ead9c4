"""SD.Next as a host: the diffusers pipeline that it has loaded (`host`), and weights stored its own way (`weights`)."""

from klora.hosts.sdnext.host import SdnextHost, is_detail, is_pipeline, is_refined, own_detail_prompt

__all__ = ["SdnextHost", "is_detail", "is_pipeline", "is_refined", "own_detail_prompt"]
