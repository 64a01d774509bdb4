"""What plug-ins may implement. One file a subject; docs/hooks.md is checked against them.

A site's plug-in wins over ours: pluggy calls the newest registration first, and built-ins are
registered first. No argument of an implementation may have a default (pluggy would not pass it).
"""

from wnodes_core.hookspecs import image, lrms, network, storage, template, vm, volume

ALL = (lrms, image, storage, network, template, vm, volume)
