"""SD.Next as a host: the diffusers pipeline that it has loaded (`host`), and weights stored its own way (`weights`)."""

from klora.hosts.sdnext.host import SdnextHost, is_pipeline, is_refined

__all__ = ["SdnextHost", "is_pipeline", "is_refined"]
