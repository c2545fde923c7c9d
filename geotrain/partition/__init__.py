"""What runs inside a region: parameter server, workers, the training loop; and the handle by which the control plane drives them."""
