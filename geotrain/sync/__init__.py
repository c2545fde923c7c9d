"""The synchronization core: pure state machines and the arithmetic they order. No sockets, threads, clocks or randomness."""
