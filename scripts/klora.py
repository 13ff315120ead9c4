"""The WebUI's way in."""

from klora.webui.register import register

register()
