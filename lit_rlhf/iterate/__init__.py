"""`lit-rlhf iterate`: rounds of sampling, labelling, refitting the reward model and PPO; resumable, with one report."""
