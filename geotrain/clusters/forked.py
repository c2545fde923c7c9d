"""Imported first by the process that local workers are forked from (Python's fork server), and by no other: it leaves the flow's process
group, as they do (`detach`). A signal to the group would end it, and Dask would take its workers for lost.
"""

import os

os.setpgrp()
