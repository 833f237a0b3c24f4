"""`lit-rlhf plan`: what a run would take in memory and hours, found by running its steps on tensors that hold no numbers."""
