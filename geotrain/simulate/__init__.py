"""The same job, planner, synchronization core and task on a virtual clock: how long, how much, how good, for a WAN not built yet."""
