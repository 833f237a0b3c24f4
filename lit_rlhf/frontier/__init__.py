"""`lit-rlhf frontier`: PPO at several settings, what each point costs in KL and gains in proxy and gold reward, against best-of-n."""
