"""The WebUI's way in."""

from klora.webui.register import register
from klora.webui.script import make_script

register()
KLoraScript = make_script()
