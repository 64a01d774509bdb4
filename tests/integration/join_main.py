"""A further launcher of a lease, as a job's second step is: ``python -I join_main.py FOLDER COMMAND…``."""

import os
import sys

from wnodes_core import launcher
from wnodes_core.errors import WnodesError
from wnodes_core.guest import client

closed = client.reserve_stdio()
command = launcher.command_of(tuple(sys.argv[2:]), dict(os.environ))
try:
    end = client.run(f"{sys.argv[1]}/keeper.sock", command, closed=closed, progress=client.show_progress)
except WnodesError as error:
    launcher.refuse(error)
launcher.finish(command, end)
