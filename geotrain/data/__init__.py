"""Where the data is and how its rows reach a training step: inventory, leases, batches."""
