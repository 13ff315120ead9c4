"""diffusers as a host: its modules (`pipeline`), what its loader makes of names (`names`), its time (`time`)."""

from klora.hosts.diffusers.follow import follow
from klora.hosts.diffusers.pipeline import DiffusersHost

__all__ = ["DiffusersHost", "follow"]
