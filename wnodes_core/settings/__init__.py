"""The site's settings: ``load()`` gives one frozen, checked ``Settings``; nothing else reads YAML.

``schema`` holds the dataclasses (the only list of keys there is), ``values`` turns a word into a
value, ``source`` reads YAML with its line numbers, ``load`` joins them, ``show`` prints them again.
"""

from wnodes_core.settings.load import defaults_for_user, load
from wnodes_core.settings.schema import (
    DaemonSettings,
    ImageSettings,
    PluginSettings,
    PurgeSettings,
    Rule,
    Settings,
    VmSettings,
)

__all__ = [
    "DaemonSettings",
    "ImageSettings",
    "PluginSettings",
    "PurgeSettings",
    "Rule",
    "Settings",
    "VmSettings",
    "defaults_for_user",
    "load",
]
